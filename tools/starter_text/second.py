"""The second round: experts one after the other, each with examples that are made while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .alone import Lone
from .plans import Round
from .shape import Shape
from .training import Step, train
from .weights import fresh_experts, stacked_experts
from .words import encode

_WARMUP = 20
# Examples that tell how long sources and targets are.
_MEASURED = 2000


def train_again(
    name: str,
    plan: Round,
    lone: Lone,
    lora: dict[str, Tensor],
    tokenizer: Tokenizer,
    work: Path,
    log: Callable[[str], None],
) -> dict[str, Tensor]:
    """Train one expert by its plan; goes on from its checkpoint.

    Args:
        name: of the expert.
        plan: what it sees.
        lone: the base.
        lora: factors of one expert, with which it begins.
        tokenizer: of the base.
        work: folder of the checkpoint.
        log: is told how it goes.

    Returns:
        Its factors.
    """
    sizes = _lengths(plan, tokenizer)

    def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
        seed = int(torch.randint(2**31, (1,), generator=rng))
        arrays = encode(tokenizer, plan.examples(Random(seed)))
        return tuple(
            torch.from_numpy(array[:, :size]).long() for array, size in zip(arrays, sizes, strict=True)
        )

    parameters = {key: value.detach().clone().requires_grad_(True) for key, value in lora.items()}
    first = draw(torch.Generator().manual_seed(0))
    step = Step(lambda batch: lone.loss(parameters, *batch), parameters, first, plan.rate, 0.0, 1.0)
    train(
        f"second-{name}", step, parameters, draw, steps=plan.steps, seconds=1.0, work=work, seed=5, log=log,
        warmup=_WARMUP,
    )  # fmt: skip
    return {key: value.detach() for key, value in parameters.items()}


def begun(
    shape: Shape, rank: int, seed: int, plan: Round, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The factors that a plan begins with.

    Args:
        shape: of the base.
        rank, seed: of fresh factors.
        plan: the plan.
        tensors: all experts, each matrix under "EXPERT.NAME".
    """
    if plan.start is None:
        return fresh_experts(shape, 1, rank, seed)
    prefix = f"{plan.start}."
    own = {key.removeprefix(prefix): one.float() for key, one in tensors.items() if key.startswith(prefix)}
    return stacked_experts(shape, [own])


def _lengths(plan: Round, tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokens of the longest source and target."""
    rng = Random(0)
    arrays = encode(tokenizer, [plan.make(rng) for _ in range(_MEASURED)])
    source, target = (int((array != 0).sum(1).max()) for array in arrays)
    return source, target

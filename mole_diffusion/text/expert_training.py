"""Training an expert for texts: a LoRA by PEFT itself, on the loop of `training`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import filling
from mole_diffusion.text.examples import pairs_of
from mole_diffusion.text.training import CrossEntropy
from mole_diffusion.training.loop import LoopResult, TrainingLoop
from mole_diffusion.training.objective import Parameters
from mole_diffusion.training.progress import TrainingEvent
from mole_diffusion.training.settings import COSMETIC, LoopSettings, choice, positive, whole

#: Matrices that experts change: queries and values, as PEFT and LoRAHub have it, or all.
TARGETS = {"qv": ("q", "v"), "all": ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")}


@dataclass(frozen=True, kw_only=True)
class TextExpertConfig(LoopSettings):
    """How an expert is trained.

    Args:
        iterations: Number of iterations.
        batch_size: Examples in each.
        rank: Of the LoRA; its alpha is twice that, as LoRAHub's.
        targets: "qv" or "all" matrices.
        learning_rate: Of AdamW.
        source_tokens: Most tokens of a text that is read.
        target_tokens: Most tokens of a text that is written.

    Raises:
        ConfigError: if a value is out of range.
    """

    iterations: int = whole(500)
    batch_size: int = whole(32)
    rank: int = whole(8)
    targets: str = choice("all", "qv")
    learning_rate: float = positive(2e-3)
    source_tokens: int = whole(512)
    target_tokens: int = whole(256)


def train_expert(
    model: Any,
    tokenizer: Any,
    examples: Any,
    out: Path,
    config: TextExpertConfig | None = None,
    *,
    work: Path | None = None,
    resume: bool | None = None,
    callback: Callable[[TrainingEvent], Any] | None = None,
) -> LoopResult:
    """Train a LoRA on examples and write it as a PEFT folder; the model is as before.

    Args:
        model: of the T5 family, without experts.
        tokenizer: of the model.
        examples: see `examples.pairs_of`.
        out: folder to write.
        config: settings.
        work: folder for checkpoints; None keeps them in memory.
        resume: see `TrainingLoop.run`.
        callback: called with a `TrainingEvent` after every iteration; `False` ends the training.

    Raises:
        ConfigError: there are no examples, or the model has no such matrices.
        TrainingError: see `TrainingLoop.run`.
    """
    config = config or TextExpertConfig()
    pairs = pairs_of(examples)
    with _wrapped(model, config) as wrapped:
        named: dict[str, Tensor] = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        learner = Parameters(
            named, lambda own: torch.optim.AdamW(own, lr=config.learning_rate, weight_decay=0.0)
        )
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in COSMETIC}
        facts = {"settings": settings, "examples": hashlib.sha256(repr(pairs).encode()).hexdigest()}
        objective = CrossEntropy(wrapped, tokenizer, pairs, config)
        loop = TrainingLoop(
            objective, learner, config, facts=facts, folder=work, callback=callback, what="expert"
        )
        wrapped.eval()
        result = loop.run(resume)
        with filling(out) as folder:
            wrapped.save_pretrained(folder)
    return result


@contextmanager
def _wrapped(model: Any, config: TextExpertConfig) -> Iterator[Any]:
    """The model with a fresh LoRA, which alone trains; afterwards the model as it was.

    Raises:
        ConfigError: it has no such matrices.
    """
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in TARGETS[config.targets] if name in present]
    if not targets:
        raise ConfigError(
            f"{type(model).__name__} has none of the matrices {', '.join(TARGETS[config.targets])}"
        )
    torch.manual_seed(config.seed)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lora = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=config.rank, lora_alpha=2 * config.rank, target_modules=targets
    )
    wrapped = get_peft_model(model, lora)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

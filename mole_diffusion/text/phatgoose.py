"""PHATGOOSE: a key per expert and matrix, learned by each expert alone, chooses among them.

Nothing is trained for a set: keys of experts that never met go together (Muqeeth et al. 2024,
arXiv 2402.05859).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.routing import KEYS, Route
from mole_diffusion.text.composed import Composed
from mole_diffusion.text.examples import pairs_of
from mole_diffusion.text.training import CrossEntropy
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import Parameters
from mole_diffusion.training.progress import TrainingEvent
from mole_diffusion.training.settings import COSMETIC, LoopSettings, positive, whole
from mole_diffusion.training.state import frozen

#: Canonical name of a matrix -> (d_in,) key of one expert.
ExpertKeys = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class KeyConfig(LoopSettings):
    """How an expert's keys are trained.

    Args:
        iterations: Number of iterations (theirs: 100).
        batch_size: Examples in each.
        learning_rate: Of AdamW.
        source_tokens: Most tokens of a text that is read.
        target_tokens: Most tokens of a text that is written.

    Raises:
        ConfigError: if a value is out of range.
    """

    iterations: int = whole(100)
    batch_size: int = whole(12)
    learning_rate: float = positive(5e-3)
    source_tokens: int = whole(512)
    target_tokens: int = whole(256)


def train_keys(
    composed: Composed,
    tokenizer: Any,
    name: str,
    examples: Any,
    config: KeyConfig | None = None,
    *,
    callback: Callable[[TrainingEvent], Any] | None = None,
) -> ExpertKeys:
    """Learn the keys of one expert on examples of its own task: `W x + sigmoid(v . x) B A x`, from v = 0.

    Args:
        composed: model and experts; they stay as they are.
        tokenizer: of the model.
        name: of the expert.
        examples: see `examples.pairs_of`.
        config: settings.
        callback: see `train_expert`.

    Raises:
        ConfigError: there is no such expert, or no examples.
        TrainingError: see `TrainingLoop.run`.
    """
    config = config or KeyConfig()
    if name not in composed.experts:
        raise ConfigError(f"no expert is called {name!r}; known are {list(composed.experts)}")
    pairs, expert = pairs_of(examples), composed.experts[name]
    keys = {
        matrix: torch.zeros(one.down.shape[1], device=composed.device, requires_grad=True)
        for own in expert.factors.values()
        for matrix, one in own.items()
    }
    learner = Parameters(
        dict(keys), lambda own: torch.optim.AdamW(own, lr=config.learning_rate, weight_decay=0.0)
    )
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in COSMETIC}
    facts = {
        "settings": settings,
        "expert": expert.sha256,
        "examples": hashlib.sha256(repr(pairs).encode()).hexdigest(),
    }
    objective = CrossEntropy(composed.model, tokenizer, pairs, config)
    loop = TrainingLoop(objective, learner, config, facts=facts, folder=None, callback=callback, what="keys")
    with frozen([composed.model], but=[]), composed.active(mixture="none"), _opened(composed, expert, keys):
        loop.run(None)
    return {matrix: key.detach() for matrix, key in keys.items()}


@contextmanager
def _opened(composed: Composed, expert: Expert, keys: Mapping[str, Tensor]) -> Iterator[None]:
    """Each matrix adds the expert's delta, as far as its key opens it to a token."""
    handles = []
    for part, own in expert.factors.items():
        mixture = composed.mixtures[part]
        for matrix, one in own.items():
            module = mixture.network.get_submodule(matrix.removeprefix(f"{part}."))
            down, up = (factor.to(composed.device) for factor in (one.down, one.up * one.scaling))
            handles.append(module.register_forward_hook(_Opening(down, up, keys[matrix])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Opening:
    """Forward hook of one matrix.

    Args:
        down, up: factors, with scaling.
        key: what opens them.
    """

    def __init__(self, down: Tensor, up: Tensor, key: Tensor) -> None:
        self._down, self._up, self._key = down, up, key

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        opened = torch.sigmoid(x @ self._key).unsqueeze(-1)
        delta = x @ self._down.float().T @ self._up.float().T
        return output + (opened * delta).to(output.dtype)


def phatgoose(composed: Composed, keys: Mapping[str, ExpertKeys], top_k: int = 2) -> Route:
    """The route by the keys of all of a model's experts, for `mixture=`.

    Args:
        composed: model and experts.
        keys: expert -> its keys, see `train_keys`.
        top_k: how many experts share a token (theirs: 2).

    Raises:
        ConfigError: an expert has no keys.
    """
    missing = [name for name in composed.experts if name not in keys]
    if missing:
        raise ConfigError(f"these experts have no keys: {', '.join(missing)}; train_keys makes them")
    matrices: dict[str, int] = {}
    for name in composed.experts:
        matrices |= {matrix: len(key) for matrix, key in keys[name].items()}
    # An expert without a matrix is never chosen there.
    joined = {
        matrix: torch.stack([keys[name].get(matrix, torch.zeros(width)).cpu() for name in composed.experts])
        for matrix, width in matrices.items()
    }
    return Route(KEYS, top_k=top_k, keys=joined)

"""Training gates on texts: the loop of `training`, and the cross entropy of what the model is to write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.text.composed import Composed
from mole_diffusion.text.examples import Pair, pairs_of
from mole_diffusion.text.start import begin, begun
from mole_diffusion.training.gates import Balanced, Gates
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import Losses, LossTerms
from mole_diffusion.training.progress import HistoryRow, TrainingEvent
from mole_diffusion.training.settings import COSMETIC, GateSettings, flag, whole
from mole_diffusion.training.state import GATES_FILE, frozen


@dataclass(frozen=True, kw_only=True)
class TextTrainingConfig(GateSettings):
    """How gates are trained on texts.

    Args:
        iterations: Number of iterations (paper: 800).
        batch_size: Examples in each (paper: 12).
        alpha: Weight of the balance loss.
        per_expert: Divide the balance loss by the number of experts: as a plain sum it grows with them, and
            forbids to choose few of many.
        probe: Examples that gates which nobody has trained begin with, see `start.begin`; 0 lets them begin
            with all experts equally, as in the paper.
        validate_every: Iterations between losses on the validation examples, where there are some.
        patience: How often that loss may fail to become smaller before the training ends; 0 never ends it.
            The gates are those of the smallest loss.
        source_tokens: Most tokens of a text that is read; longer ones are cut.
        target_tokens: Most tokens of a text that is written.

    Raises:
        ConfigError: if a value is out of range.
    """

    iterations: int = whole(800)
    batch_size: int = whole(12)
    per_expert: bool = flag(True)
    probe: int = whole(48, 0)
    validate_every: int = whole(50)
    patience: int = whole(0, 0)
    source_tokens: int = whole(512)
    target_tokens: int = whole(256)

    @classmethod
    def paper(cls) -> TextTrainingConfig:
        """The paper's settings: 800 iterations of 12, learning rate 1e-5 throughout, the balance loss a sum.

        They go with `MoLEConfig.paper()`, whose flattened gates have thousands of features; a gate for each
        token moves by 0.3 at most with this rate.
        """
        return cls(
            schedule="constant", gate_lr=1e-5, flatten_lr=1e-5, scalar_lr=1e-5, alpha=0.5, per_expert=False,
            probe=0,
        )  # fmt: skip


@dataclass(frozen=True)
class TextTrainingResult:
    """What a training did.

    Attributes:
        history: a row per iteration: loss, cross entropy, balance, entropy and mean weights.
        stopped: whether it ended before its last iteration.
        validation: iteration -> loss on the validation examples.
        best: the iteration that the gates are of, where there was a validation; else None.
        begun: expert -> its weight in the mixture that the gates began with.
        gates: the file with the gates, if there was a folder.
    """

    history: list[HistoryRow]
    stopped: bool
    validation: Mapping[int, float]
    best: int | None
    begun: Mapping[str, float]
    gates: Path | None


class Batching(Protocol):
    """What settings say of batches."""

    @property
    def batch_size(self) -> int:
        """Examples in each."""

    @property
    def seed(self) -> int:
        """Of their order."""

    @property
    def source_tokens(self) -> int:
        """Most tokens of a text that is read."""

    @property
    def target_tokens(self) -> int:
        """Most tokens of a text that is written."""


class CrossEntropy:
    """The objective: cross entropy of the targets, each token counting once in its batch.

    Args:
        model: the model, with whatever changes it.
        tokenizer: of the model.
        examples: what to read and to write.
        config: batch size, lengths and seed.
        padded: the number of tokens that every text is padded to; None for those of the longest.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Pair],
        config: Batching,
        padded: int | None = None,
    ) -> None:
        self._model, self._tokenizer, self._examples = model, tokenizer, examples
        self._config, self._padded = config, padded
        self._rng = torch.Generator()
        self._left: list[int] = []

    def prepare(self) -> None:
        """Begin with the first order of the examples."""
        self._rng.manual_seed(self._config.seed)
        self._left = []

    def losses(self, iteration: int) -> Losses:
        """The loss of the next batch."""
        loss = self.loss([self._examples[index] for index in self._draw()])
        yield LossTerms(loss, {"cross_entropy": float(loss.detach())})

    def state_dict(self) -> dict[str, Any]:
        """Where it is in the examples."""
        return {"rng": self._rng.get_state(), "left": list(self._left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._rng.set_state(state["rng"])
        self._left = list(state["left"])

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """Mean cross entropy of the tokens of these targets."""
        batch = self.batch(pairs)
        loss: Tensor = self._model(**batch, use_cache=False).loss
        return loss.float()

    def mean_loss(self, pairs: Sequence[Pair], size: int) -> float:
        """Mean over these pairs of the losses of so many at a time, without gradient."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(pairs), size):
                own = pairs[start : start + size]
                total += float(self.loss(own)) * len(own)
        return total / len(pairs)

    def batch(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """What the model takes; padding is -100 in the labels, and masked in both texts."""
        device = next(self._model.parameters()).device
        padding: dict[str, Any] = {"padding": True, "max_length": self._config.source_tokens}
        if self._padded is not None:
            padding = {"padding": "max_length", "max_length": self._padded}
        read = self._tokenizer([a for a, _ in pairs], return_tensors="pt", truncation=True, **padding)
        written = self._tokenizer(
            text_target=[b for _, b in pairs], return_tensors="pt", padding=True, truncation=True,
            max_length=self._config.target_tokens,
        )  # fmt: skip
        mask = written["attention_mask"]
        return {
            "input_ids": read["input_ids"].to(device),
            "attention_mask": read["attention_mask"].to(device),
            "labels": written["input_ids"].masked_fill(mask == 0, -100).to(device),
            # Padding of the targets must not count in the means that the balance loss is of.
            "decoder_attention_mask": mask.to(device),
        }

    def _draw(self) -> list[int]:
        """The next batch of an order that holds every example once; a few are drawn again and again."""
        size = self._config.batch_size
        chosen: list[int] = []
        while len(chosen) < size:
            if not self._left:
                self._left = torch.randperm(len(self._examples), generator=self._rng).tolist()
            chosen.append(self._left.pop())
        return chosen


class Validated:
    """An objective that knows the loss on other examples and the gates at the smallest one.

    Args:
        objective: what is trained on.
        gates: the gates.
        pairs: the other examples; none asks for nothing.
        config: how often, and how patient.
        begin: called before the first iteration.
    """

    def __init__(
        self,
        objective: CrossEntropy,
        gates: Gates,
        pairs: Sequence[Pair],
        config: TextTrainingConfig,
        begin: Callable[[], None],
    ) -> None:
        self._objective, self._gates, self._pairs, self._config = objective, gates, pairs, config
        self._begin = begin
        self.found: dict[int, float] = {}
        self._best: dict[str, Any] | None = None

    @property
    def best(self) -> int | None:
        """The iteration of the smallest loss."""
        return min(self.found, key=lambda one: self.found[one]) if self.found else None

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        since = sum(one > (self.best or 0) for one in self.found)
        return 0 < self._config.patience <= since

    def prepare(self) -> None:
        """Begin anew."""
        self._objective.prepare()
        self._begin()
        self.found, self._best = {}, None

    def losses(self, iteration: int) -> Losses:
        """Those of the objective; before them, the loss after the iteration before, where it is time."""
        self.validate(iteration)
        yield from self._objective.losses(iteration)

    def state_dict(self) -> dict[str, Any]:
        """That of the objective, and what was found."""
        return {"objective": self._objective.state_dict(), "found": self.found, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._objective.load_state_dict(state["objective"])
        self.found, self._best = dict(state["found"]), state["best"]

    def validate(self, done: int) -> None:
        """Take the loss after so many iterations, where it is time and not done."""
        if not self._pairs or not done or done % self._config.validate_every or done in self.found:
            return
        self.found[done] = self._objective.mean_loss(self._pairs, self._config.batch_size)
        if self.best == done:
            self._best = {
                part: {name: value.detach().clone() for name, value in state.items()}
                for part, state in self._gates.state_dict().items()
            }

    def restore(self) -> None:
        """Set the gates to those of the smallest loss, if any was taken."""
        if self._best is not None:
            self._gates.load_state_dict(self._best)


def train_gates(
    composed: Composed,
    tokenizer: Any,
    examples: Any,
    config: TextTrainingConfig | None = None,
    *,
    validation: Any = None,
    callback: Callable[[TrainingEvent], Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool | None = None,
) -> TextTrainingResult:
    """Train the gates of a model on examples.

    Args:
        composed: model and experts.
        tokenizer: of the model.
        examples: pairs, mappings, a `datasets.Dataset` or a JSONL file; see `examples.pairs_of`.
        config: settings.
        validation: other examples, for `patience`.
        callback: called with a `TrainingEvent` after every iteration; `False` ends the training.
        checkpoint_dir: folder for checkpoints, history and gates; None keeps everything in memory.
        resume: see `TrainingLoop.run`.

    Raises:
        ConfigError: the examples are none, or patience has nothing to look at.
        TrainingError: see `TrainingLoop.run`.
    """
    config = config or TextTrainingConfig()
    pairs = pairs_of(examples)
    others = [] if validation is None else pairs_of(validation, "validation")
    if config.patience and not others:
        raise ConfigError(
            f"patience is {config.patience}, and there are no validation examples; give some, or 0"
        )
    experts = len(composed.experts)
    share = experts if config.per_expert else 1
    gates = Gates(composed.mixtures, dataclasses.replace(config, alpha=config.alpha / share))
    objective = _objective(composed, tokenizer, pairs, config)
    tried = pairs[: config.probe]
    validated = Validated(objective, gates, others, config, lambda: begin(composed, objective, tried))
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    gates_file = None if folder is None else folder / GATES_FILE

    def after(event: TrainingEvent) -> Any:
        said = None if callback is None else callback(event)
        return False if validated.exhausted else said

    loop = TrainingLoop(
        Balanced(validated, gates), gates, config,
        facts=_facts(composed, config, pairs), folder=folder, callback=after, what="gates",
    )  # fmt: skip
    with _still(composed), composed.active(), gates.others_resting():
        result = loop.run(resume)
        validated.validate(len(result.history))
    validated.restore()
    first = begun(composed)
    if gates_file is not None:
        shown = {name: round(weight, 3) for name, weight in first.items()}
        composed.save_gates(gates_file, {"begun": json.dumps(shown)})
    return TextTrainingResult(
        result.history, result.stopped, validated.found, validated.best, first, gates_file
    )


def begin_gates(composed: Composed, tokenizer: Any, examples: Any) -> Mapping[str, float]:
    """What `train_gates` begins with, for other loops; see `start.begin`.

    Args:
        composed: model and experts, with gates that nobody has trained.
        tokenizer: of the model.
        examples: all of them are tried; a few dozen will do.

    Returns:
        Expert -> its weight.

    Raises:
        ConfigError: the examples are none.
    """
    pairs = pairs_of(examples)
    objective = _objective(composed, tokenizer, pairs, TextTrainingConfig())
    with _still(composed):
        begin(composed, objective, pairs)
    return begun(composed)


def _objective(
    composed: Composed, tokenizer: Any, pairs: Sequence[Pair], config: TextTrainingConfig
) -> CrossEntropy:
    """The loss on examples, padded as the gates are made for."""
    padded = composed.ensemble.flatten_tokens.get("encoder")
    return CrossEntropy(composed.model, tokenizer, pairs, config, padded if isinstance(padded, int) else None)


@contextmanager
def _still(composed: Composed) -> Iterator[None]:
    """The model is frozen and in evaluation mode, so that nothing is dropped at random."""
    trained = [parameter for mixture in composed.mixtures.values() for parameter in mixture.parameters()]
    with frozen([composed.model], but=trained):
        yield


def _facts(composed: Composed, config: TextTrainingConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What makes this training this training."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in COSMETIC}
    gates: dict[str, MoLEConfig] = {part: mixture.config for part, mixture in composed.mixtures.items()}
    return {
        "settings": settings,
        "gates": {part: form.to_dict() for part, form in gates.items()},
        "experts": {name: expert.sha256 for name, expert in composed.experts.items()},
        "base": {part: dict(mixture.base) for part, mixture in composed.mixtures.items()},
        "examples": hashlib.sha256(repr(list(pairs)).encode()).hexdigest(),
    }

"""What gates are compared with: experts merged or weighed once for all tokens and layers.

`lorahub` and `pems` mix *factors*, as their authors' code does: `sum_i w_i B_i` times `sum_i w_i A_i`, so an
expert's own delta has the weight `w_i^2`, and each pair leaves a cross term. The others weigh deltas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.experts import Expert, ExpertReport
from mole_diffusion.core.export import StaticLora, lora_header
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.text.composed import Composed
from mole_diffusion.text.examples import Pair, pairs_of
from mole_diffusion.text.export import write_adapter
from mole_diffusion.text.start import BATCH, loss_with, losses_alone
from mole_diffusion.text.training import CrossEntropy, TextTrainingConfig
from mole_diffusion.training.search import l1_penalty, minimise, optimiser_maker

METHODS = ("lorahub", "pems", "searched", "tuned", "alone")
#: LoRAHub's number of evaluations.
BUDGET = 40
#: Sums that `tuned` tries.
SUMS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)


@dataclass(frozen=True)
class Merged:
    """What a method made.

    Attributes:
        method: its name.
        weights: of the experts: of their factors, or of their deltas.
        expert: the merged expert of a method that mixes factors; else None.
        score: what the method made small; None where it tries nothing.
        evaluations: how often it looked at the examples.
    """

    method: str
    weights: Mapping[str, float]
    expert: Expert | None = None
    score: float | None = None
    evaluations: int = 0
    details: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": self.method,
            "weights": dict(self.weights),
            "score": self.score,
            "evaluations": self.evaluations,
        }

    def save(self, folder: Path, base: str = "") -> Path:
        """Write a merged expert as a PEFT folder."""
        if self.expert is None:
            raise ConfigError(f"{self.method!r} weighs deltas: there is no merged expert to write")
        factors = {
            part: {name: _plain(one) for name, one in own.items()}
            for part, own in self.expert.factors.items()
        }
        write_adapter(folder, StaticLora(factors), lora_header(self.method, [], {}, self.to_dict()), base)
        return folder


def mix_factors(experts: Sequence[Expert], weights: Mapping[str, float], name: str) -> Expert:
    """One expert of the weighted sums of factors, A and B alike.

    Raises:
        ConfigError: the experts' matrices, ranks or alphas differ.
    """
    first = experts[0]
    factors: dict[str, dict[str, LoraFactors]] = {}
    digest = hashlib.sha256(repr([(e.sha256, weights[e.name]) for e in experts]).encode()).hexdigest()
    for part, own in first.factors.items():
        factors[part] = {}
        for matrix, pair in own.items():
            same = [e.factors.get(part, {}).get(matrix) for e in experts]
            if any(
                one is None
                or one.down.shape != pair.down.shape
                or one.alpha != pair.alpha
                or one.bias is not None
                for one in same
            ):
                raise ConfigError(
                    f"factors can be mixed where all experts have equal ones: {matrix!r} differs"
                )
            found = [one for one in same if one is not None]
            factors[part][matrix] = LoraFactors(
                sum((weights[e.name] * one.down.float() for e, one in zip(experts, found, strict=True)),
                    torch.zeros(())),
                sum((weights[e.name] * one.up.float() for e, one in zip(experts, found, strict=True)),
                    torch.zeros(())),
                pair.alpha,
            )  # fmt: skip
    report = ExpertReport((), {}, ())
    return Expert(name, 1.0, digest, {"mole.kind": name}, factors, report, architectures=first.architectures)


def pems(composed: Composed) -> Merged:
    """PEMs' addition: the mean of all factors (Zhang et al. 2023, arXiv 2306.14870)."""
    experts = list(composed.experts.values())
    weights = {one.name: 1.0 / len(experts) for one in experts}
    return Merged("pems", weights, mix_factors(experts, weights, "pems"))


def lorahub(
    composed: Composed,
    tokenizer: Any,
    examples: Any,
    *,
    budget: int = BUDGET,
    seed: int = 0,
    literal: bool = True,
) -> Merged:
    """LoRAHub: weights of factors, searched without gradient (Huang et al. 2024, arXiv 2307.13269).

    Args:
        composed: model and experts.
        tokenizer: of the model.
        examples: what to judge weights on; theirs are five.
        budget: evaluations; theirs are 40.
        seed: of the search.
        literal: divide the mean loss by the number of examples, as their code does, so that the penalty on
            the weights counts five times as much.

    Raises:
        ConfigError: nevergrad is not installed, or the experts' factors cannot be mixed.
    """
    scorer = _Scorer(composed, tokenizer, pairs_of(examples))
    experts = list(composed.experts.values())

    def score(weights: Sequence[float]) -> tuple[float, int]:
        merged = mix_factors(experts, dict(zip(composed.experts, weights, strict=True)), "lorahub")
        loss = scorer.of_expert(merged)
        return (loss / len(scorer.pairs) if literal else loss) + l1_penalty(weights), 1

    found, value = minimise(score, optimiser_maker(len(experts), seed), budget, [0.0] * len(experts))
    weights = dict(zip(composed.experts, found, strict=True))
    return Merged("lorahub", weights, mix_factors(experts, weights, "lorahub"), value, budget)


def searched(
    composed: Composed, tokenizer: Any, examples: Any, *, budget: int = BUDGET, seed: int = 0
) -> Merged:
    """As `lorahub`, with weights of deltas and the plain mean loss."""
    scorer = _Scorer(composed, tokenizer, pairs_of(examples))
    names = list(composed.experts)

    def score(weights: Sequence[float]) -> tuple[float, int]:
        return scorer.of_weights(dict(zip(names, weights, strict=True))) + l1_penalty(weights), 1

    found, value = minimise(score, optimiser_maker(len(names), seed), budget, [0.0] * len(names))
    return Merged("searched", dict(zip(names, found, strict=True)), None, value, budget)


def tuned(composed: Composed, tokenizer: Any, examples: Any, *, sums: Sequence[float] = SUMS) -> Merged:
    """One weight for all experts: that of the smallest loss, from almost none to more than all in full."""
    scorer = _Scorer(composed, tokenizer, pairs_of(examples))
    names = list(composed.experts)
    scores = {one: scorer.of_weights(dict.fromkeys(names, one)) for one in sums}
    best = min(scores, key=lambda one: scores[one])
    return Merged("tuned", dict.fromkeys(names, best), None, scores[best], len(scores))


def alone(composed: Composed, tokenizer: Any, examples: Any) -> Merged:
    """The one expert whose loss is smallest by itself."""
    scorer = _Scorer(composed, tokenizer, pairs_of(examples))
    scores = scorer.alone()
    best = min(scores, key=lambda one: scores[one])
    return Merged("alone", {best: 1.0}, None, scores[best], len(scores))


class _Scorer:
    """The loss on some examples with experts or weights.

    Args:
        composed: model and experts.
        tokenizer: of the model.
        pairs: the examples.
    """

    def __init__(self, composed: Composed, tokenizer: Any, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self._composed = composed
        self._objective = CrossEntropy(composed.model, tokenizer, pairs, TextTrainingConfig())

    def of_expert(self, expert: Expert) -> float:
        """With this one in place of all."""
        ensemble = self._composed.ensemble
        with ensemble.standing_in(ensemble.build([expert])):
            return self._objective.mean_loss(self.pairs, BATCH)

    def of_weights(self, weights: Mapping[str, float]) -> float:
        """With fixed weights of the deltas."""
        return loss_with(self._composed, self._objective, self.pairs, weights)

    def alone(self) -> dict[str, float]:
        """With each expert by itself."""
        return losses_alone(self._composed, self._objective, self.pairs)


def _plain(one: LoraFactors) -> LoraFactors:
    """The same with its scaling inside."""
    return LoraFactors(one.down, one.up * one.scaling, float(one.rank))

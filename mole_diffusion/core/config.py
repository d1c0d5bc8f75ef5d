"""`MoLEConfig`: the form of the gates, validated when it is built."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .rules import FLAG, number, word

GRANULARITIES = ("matrix", "layer", "block", "network")
GATE_INPUTS = ("experts", "own", "hidden")
POOLINGS = ("mean", "token", "flatten")
COMPOSITIONS = ("delta", "output")
GATE_FUNCTIONS = ("softmax", "sigmoid")
_ALLOWED = {
    "granularity": word(GRANULARITIES),
    "gate_input": word(GATE_INPUTS),
    "pooling": word(POOLINGS),
    "composition": word(COMPOSITIONS),
    "gate_function": word(GATE_FUNCTIONS),
    **dict.fromkeys(("temperature", "strength", "text_strength"), number(0, math.inf, above=True)),
    **dict.fromkeys(("timestep", "learn_temperature", "learn_strength"), FLAG),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoLEConfig:
    """How gates are formed, and how experts are mixed.

    Args:
        granularity: the matrices that share one gate: "matrix", "layer" (attention or feed-forward), "block"
            (transformer block) or "network" (paper, Table 9).
        gate_input: "experts" (Eq. 9: the experts' own outputs, concatenated and normalised), "own" (the same,
            but each expert's logit reads that expert's output alone: parameters grow with N and not N^2) or
            "hidden" (the input of the group, as in the released code).
        pooling: "mean" (one gate per batch entry, any resolution), "token" (each token mixes for itself) or
            "flatten" (Eq. 10, literal: bound to one number of tokens).
        composition: "delta" (mix the low-rank deltas of each matrix) or "output" (Eq. 5-13: run the block
            once per expert and mix what the block returns; N + 1 passes).
        gate_function: "softmax" (Eq. 11) or "sigmoid" (each expert has a weight of its own, so that several
            can be fully on; at logits of zero both give 1/N).
        timestep: whether the gates of a denoiser also read the timestep.
        temperature: initial tau of Eq. 11, above 0.
        learn_temperature: whether tau is trained.
        strength: initial factor of the mixed delta in denoisers, above 0; the paper has 1.
        text_strength: the same in text encoders, where it is never trained: with 1, words that the gates give
            to their expert come out as if it were alone.
        learn_strength: whether the strength of each group of a denoiser is trained.

    Raises:
        ConfigError: a value is not allowed, or two settings contradict each other.
    """

    granularity: str = "block"
    gate_input: str = "experts"
    pooling: str = "token"
    composition: str = "delta"
    gate_function: str = "softmax"
    timestep: bool = False
    temperature: float = 1.0
    learn_temperature: bool = True
    strength: float = 1.6
    text_strength: float = 1.0
    learn_strength: bool = True

    def __post_init__(self) -> None:
        for name, rule in _ALLOWED.items():
            rule.demand(name, getattr(self, name))
        if self.granularity == "network" and self.pooling == "token":
            raise ConfigError(
                "granularity='network' does not go with pooling='token': the blocks of a network have "
                "different numbers of tokens; use pooling='mean' or a finer granularity."
            )
        if self.composition == "output" and self.granularity not in ("layer", "block"):
            raise ConfigError(
                f"composition='output' does not go with granularity={self.granularity!r}; it runs whole "
                "layers or blocks once per expert, so granularity must be 'layer' or 'block'."
            )

    @classmethod
    def paper(cls) -> MoLEConfig:
        """The paper's literal form: outputs of whole blocks, flattened gates, weights that sum to 1."""
        return cls(pooling="flatten", composition="output", strength=1.0, learn_strength=False)

    @classmethod
    def uniform(cls) -> MoLEConfig:
        """Pooled gates of fixed strength 1: untrained, they are normalised linear arithmetic (1/N each)."""
        return cls(pooling="mean", strength=1.0, learn_strength=False)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoLEConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a name is unknown, or a value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"Unknown settings {', '.join(unknown)}; allowed: {', '.join(known)}.")
        return cls(**values)

    def to_json(self) -> str:
        """All settings as one JSON object."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MoLEConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: the text is not a JSON object of allowed settings.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"The configuration is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"The configuration must be a JSON object, not {type(values).__name__}.")
        return cls.from_dict(values)

"""Freeze gates into a static mixture and write it as one plain LoRA.

A gate's weights depend on prompt, step and token; a LoRA knows none of these. With the weights frozen at
their means the mixture is `W + sum_i w_i scaling_i B_i A_i` with `w_i = mean(g_i) * strength * scale_i`,
which is one LoRA whose factors are the experts' factors side by side: exact, of rank `sum r_i`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import rules
from .checkpoint import write_safetensors
from .ensemble import Ensemble
from .errors import ConfigError
from .experts import Expert
from .factors import LoraFactors
from .factors import compress as compress_factors
from .functional import effective_strength
from .keys import DIALECTS, factor_keys
from .matrices import MatrixSlot
from .mixture import Mixture
from .networks import of_matrices
from .networks.base import Architecture, streams_of
from .records import MeanWeights

#: part -> canonical matrix name -> factors, with every weight and scaling inside (alpha equals the rank).
StaticFactors = dict[str, dict[str, LoraFactors]]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from what it replaces.

    Attributes:
        path: the file.
        format: "diffusers" or "kohya".
        experts: names of the experts inside.
        weights: mean gate weights that were frozen: part -> gate -> expert -> weight.
        matrices: matrices that the LoRA changes.
        ranks: part -> rank of its factors.
        compression_error: |compressed - exact| / |exact|, Frobenius norm over all matrices; 0 without `rank`.
        noise_difference: |static - gated| / |gated|, of the noise predictions over all calibration steps.
        effect_difference: |static - gated| / |gated - base|: the share of what the mixture changes in the
            base that the static form misses. 0 is as good as the gates, 1 no better than no LoRA at all.
        prompts: calibration prompts.
        steps: denoising steps of each.
    """

    path: Path
    format: str
    experts: tuple[str, ...]
    weights: MeanWeights
    matrices: int
    ranks: dict[str, int]
    compression_error: float
    noise_difference: float
    effect_difference: float
    prompts: tuple[str, ...]
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}


def check_target(path: str | Path, dialect: str, rank: int | None) -> Path:
    """The path of an export, checked before anything is computed.

    Raises:
        ConfigError: the dialect is unknown, the rank is below 1, or the file is not called .safetensors.
    """
    path = Path(path)
    if dialect not in DIALECTS:
        raise ConfigError(f"format is {dialect!r}; allowed are {', '.join(map(repr, DIALECTS))}")
    rules.whole().check("rank", rank)
    if path.suffix != ".safetensors":
        raise ConfigError(f"path is {str(path)!r}; a LoRA file ends in .safetensors")
    return path


@dataclass(frozen=True)
class StaticLora:
    """A mixture with its gates frozen, as the factors of one LoRA.

    Attributes:
        factors: part -> matrix -> factors.
        error: |compressed - exact| / |exact|, Frobenius norm over all matrices.
    """

    factors: StaticFactors
    error: float = 0.0

    @property
    def matrices(self) -> int:
        """How many matrices it changes."""
        return sum(map(len, self.factors.values()))

    @property
    def ranks(self) -> dict[str, int]:
        """Part -> rank of its factors."""
        return {part: max(pair.rank for pair in own.values()) for part, own in self.factors.items()}


def freeze(
    mixtures: Mapping[str, Mixture],
    weights: MeanWeights,
    *,
    active: Iterable[str] | None = None,
    scales: Mapping[str, float] | None = None,
    rank: int | None = None,
    fixed: bool = False,
) -> StaticLora:
    """The static mixture: exact, or the nearest one of a smaller rank.

    Args:
        mixtures, weights, active, scales, fixed: see `static_factors`.
        rank: largest rank to keep; None keeps everything.

    Raises:
        ConfigError: see `static_factors`.
    """
    factors = static_factors(mixtures, weights, active, scales, fixed=fixed)
    return StaticLora(factors) if rank is None else StaticLora(*compress(factors, rank))


def static_factors(
    mixtures: Mapping[str, Mixture],
    weights: MeanWeights,
    active: Iterable[str] | None = None,
    scales: Mapping[str, float] | None = None,
    *,
    fixed: bool = False,
) -> StaticFactors:
    """The static mixture by rank concatenation: exact, strength and scales included.

    Args:
        mixtures: part -> mixture.
        weights: mean gate weights for every gate of the mixtures.
        active: experts that were active when the weights were recorded; None for all.
        scales: factor per expert, in place of the one it was loaded with.
        fixed: the weights are fixed ones, which replace the gates and their strength.

    Raises:
        ConfigError: sigmoid gates, whose strength changes from token to token and is not recorded.
    """
    factors: StaticFactors = {}
    for part, mixture in mixtures.items():
        if mixture.config.gate_function == "sigmoid" and not fixed:
            raise ConfigError(
                f"the gates of the {part} have gate_function='sigmoid', which has no static mixture; allowed "
                "is 'softmax'"
            )
        names = mixture.expert_names
        counting = mixture.chosen(None if active is None else list(active), scales)
        chosen = tuple(i for i, name in enumerate(names) if name in counting)
        factor = {expert.name: expert.scale for expert in mixture.experts} | dict(scales or {})
        own: dict[str, LoraFactors] = {}
        for group in mixture.groups:
            strength = group.gate.strength.detach().float().cpu()
            strong = 1.0 if fixed else float(effective_strength(strength, float(len(chosen)), len(names)))
            for slot in group.slots:
                # A matrix that image and text tokens go through together has the mean of their gates.
                gates = [weights[part][group.label(stream)] for stream in streams_of(slot.stream)]
                shares = {
                    i: sum(gate[names[i]] for gate in gates) / len(gates) * strong * factor[names[i]]
                    for i in slot.mixed(chosen)
                }
                if shares:
                    own[slot.name] = _concatenate(slot, shares)
        if own:
            factors[part] = own
    return factors


def _concatenate(slot: MatrixSlot, shares: Mapping[int, float]) -> LoraFactors:
    """Factors (sum r_i, in) and (out, sum r_i) of one matrix; those of convolutions have four axes.

    Raises:
        ConfigError: an expert brings a bias.
    """
    downs, ups = [], []
    for index, share in shares.items():
        if slot.factors[index].bias is not None:
            raise ConfigError(f"an expert changes the bias of {slot.name!r}; a plain LoRA cannot hold that")
        down, up = slot.factors[index].matrices
        downs.append(down.detach().float().cpu())
        ups.append(up.detach().float().cpu() * (slot.factors[index].scaling * share))
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    kernel: Any = getattr(slot.module, "kernel_size", None)
    if kernel is not None:
        down, up = down.view(len(down), -1, *kernel), up[..., None, None]
    return LoraFactors(down, up, alpha=float(down.shape[0]))


def compress(factors: StaticFactors, rank: int) -> tuple[StaticFactors, float]:
    """The nearest LoRA of a smaller rank, matrix by matrix, and the relative error over all of them.

    Args:
        factors: with weights and scaling inside.
        rank: largest rank to keep per matrix; matrices of a smaller rank stay as they are.

    Returns:
        Factors, and the error |compressed - exact| / |exact| in the Frobenius norm.
    """
    dropped = total = 0.0
    compressed: StaticFactors = {}
    for part, matrices in factors.items():
        for name, pair in matrices.items():
            kept, error = compress_factors(pair, rank)
            whole = _squared_norm(pair)
            compressed.setdefault(part, {})[name] = kept
            dropped, total = dropped + error**2 * whole, total + whole
    return compressed, math.sqrt(dropped / total) if total else 0.0


def _squared_norm(pair: LoraFactors) -> float:
    """|up down|^2 = <up^T up, down down^T>: the dense matrix is never built."""
    down, up = (factor.double() for factor in pair.matrices)
    return float(((up.T @ up) * (down @ down.T)).sum()) * pair.scaling**2


def lora_tensors(
    factors: StaticFactors,
    dialect: str,
    dtype: torch.dtype,
    *,
    xl: bool = False,
    kinds: Mapping[str, Architecture] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a LoRA file.

    All matrices of a network get one rank, smaller ones are filled up with zeros: without alphas, older
    diffusers take the rank of the first matrix for the alpha of all.

    Args:
        factors: with weights and scaling inside.
        dialect: "diffusers" or "kohya".
        dtype: type of the factors.
        xl: whether the base has two text encoders; factors for the second one say so too.
        kinds: what the networks are, where that is known.
    """
    tensors: dict[str, Tensor] = {}
    xl = xl or any(_numbered(slot, matrices) for slot, matrices in factors.items())
    for network, matrices in factors.items():
        rank = max(pair.rank for pair in matrices.values())
        kind = (kinds or {}).get(network)
        for name, pair in matrices.items():
            missing = rank - pair.rank
            rest = [0, 0] * (pair.down.dim() - 2)
            padded = {
                "down": nn.functional.pad(pair.down, [*rest, 0, 0, 0, missing]),
                "up": nn.functional.pad(pair.up, [*rest, 0, missing]),
                "alpha": torch.tensor(float(rank)),
            }
            for role, key in factor_keys(network, name, dialect, xl=xl, kind=kind).items():
                tensors[key] = padded[role].to(dtype).contiguous()
    return tensors


def _numbered(slot: str, matrices: Iterable[str]) -> bool:
    """Whether a network is not the first of its kind in the base."""
    architecture = of_matrices(matrices)
    return architecture is not None and slot in architecture.slots[1:]


def ensemble_tensors(
    ensemble: Ensemble, lora: StaticLora, dialect: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`lora_tensors`, named for the base that an ensemble's networks belong to."""
    kinds = {part: mixture.architecture for part, mixture in ensemble.mixtures.items()}
    slots = [slot for kind in kinds.values() for slot in kind.slots[1:]]
    xl = any(part in slots for part in ensemble.networks)
    return lora_tensors(lora.factors, dialect, dtype, xl=xl, kinds=kinds)


def lora_header(
    kind: str, experts: Iterable[Expert], facts: Mapping[str, str], more: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What a LoRA file that was made of experts says about itself; its triggers make it a ready expert.

    Args:
        kind: what it is, in words ("mole.kind").
        experts: what it was made of: a JSON list of names, hashes and scales ("mole.experts").
        facts: of the base, see `Ensemble`.
        more: further entries by name, written as JSON ("mole.NAME").
    """
    made_of = list(experts)
    triggers = [trigger for expert in made_of for trigger in expert.triggers]
    sources = [{"name": e.name, "sha256": e.sha256, "scale": e.scale} for e in made_of]
    return {
        **facts,
        **({"mole.trigger": "|".join(triggers)} if triggers else {}),
        "mole.kind": kind,
        "mole.experts": json.dumps(sources),
        **{f"mole.{name}": json.dumps(value) for name, value in (more or {}).items()},
    }


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file; it appears whole or not at all.

    Args:
        path: file to write or replace.
        tensors: from `lora_tensors`.
        metadata: from `lora_header`.
    """
    write_safetensors(path, tensors, {"format": "pt", **metadata})

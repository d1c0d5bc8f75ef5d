"""Which experts of a mixture count, and how much: what users say of them by name, checked and by index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .auto import Auto
from .config import MoLEConfig
from .errors import AllExpertsMaskedError, ConfigError, RegionMaskError, UnknownExpertError
from .experts import Expert
from .gated_balance import Styled
from .routing import Route
from .scaling import check_scale


def by_name(experts: Iterable[Expert]) -> dict[str, Expert]:
    """Experts by name, in their order.

    Raises:
        ConfigError: two have one name.
    """
    chosen = list(experts)
    names = [expert.name for expert in chosen]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"Expert names must differ; used more than once: {', '.join(doubled)}.")
    return dict(zip(names, chosen, strict=True))


def check_together(
    auto: Auto | None,
    weights: Mapping[str, float] | None,
    route: Route | None,
    region_masks: Mapping[str, Tensor] | None,
    config: MoLEConfig,
    styled: Styled | None = None,
) -> None:
    """Refuse what excludes each other; see `Mixture.activate`.

    Raises:
        ConfigError: two ways of weighing the experts are asked for.
    """
    if auto is not None and (weights is not None or route is not None):
        raise ConfigError("auto finds weights by the prompt: it goes with neither weights nor a route.")
    if styled is not None and not (auto is None and weights is None and route is None):
        raise ConfigError("styled looks after gates: it goes with neither auto, nor weights, nor a route.")
    if route is not None and (weights is not None or region_masks or config.composition == "output"):
        raise ConfigError(
            "A route is how matrices weigh the experts by themselves: it goes with neither fixed "
            "weights, nor region masks, nor composition='output'."
        )


def counting(
    experts: Sequence[Expert], names: Sequence[str] | None, scales: Mapping[str, float]
) -> tuple[tuple[int, ...], list[float]]:
    """Indices of the experts that count, and the scale of each expert.

    Args:
        experts: all of them.
        names: of those that are asked for; None for all.
        scales: factor per expert, in place of its own; who has 0 does not count.

    Raises:
        UnknownExpertError: a name is not among the experts.
        AllExpertsMaskedError: `names` is empty.
        ConfigError: a scale is not finite, or far too large.
    """
    active = tuple(range(len(experts)))
    if names is not None:
        active = tuple(sorted({_index(experts, name) for name in _listed(names)}))
        if not active:
            known = ", ".join(expert.name for expert in experts)
            raise AllExpertsMaskedError(
                f"active_experts is empty; name at least one of {known}, or disable()."
            )
    found = [expert.scale for expert in experts]
    for name, scale in scales.items():
        found[_index(experts, name)] = check_scale("scale", name, scale)
    # Where gates read whole block outputs they read those of experts that are left out too.
    kept = [scale or expert.scale or 1.0 for scale, expert in zip(found, experts, strict=True)]
    return tuple(i for i in active if found[i] != 0.0), kept


def fixed_weights(
    experts: Sequence[Expert], active: tuple[int, ...], weights: Mapping[str, float] | None
) -> tuple[tuple[int, ...], list[float] | None]:
    """The experts that count with fixed weights, and the weight of each expert; None where gates say it.

    Args:
        experts: all of them.
        active: indices of those that count so far.
        weights: by name; who is not named has 0, and does not count.

    Raises:
        UnknownExpertError: a name is not among the experts.
        ConfigError: a weight is not finite, or far too large.
    """
    if weights is None:
        return active, None if active else [0.0] * len(experts)
    fixed = [0.0] * len(experts)
    for name, weight in weights.items():
        fixed[_index(experts, name)] = check_scale("weight", name, weight)
    return tuple(i for i in active if fixed[i] != 0.0), fixed


def checked_masks(experts: Sequence[Expert], masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Region masks by the index of their expert, (H, W) float32 on the CPU.

    Raises:
        UnknownExpertError: a name is not among the experts.
        RegionMaskError: a mask has other axes, or values outside of 0 to 1.
    """
    checked = {}
    for name, mask in masks.items():
        index = _index(experts, name)
        if mask.dim() != 2:
            raise RegionMaskError(
                f"The region mask of {name!r} has shape {tuple(mask.shape)}; allowed: (height, width)."
            )
        mask = mask.detach().float().cpu()
        low, high = float(mask.min()), float(mask.max())
        if not (low >= 0.0 and high <= 1.0):
            raise RegionMaskError(
                f"The region mask of {name!r} has values from {low:g} to {high:g}; allowed: 0 to 1."
            )
        checked[index] = mask
    return checked


def _listed(names: Sequence[str]) -> Sequence[str]:
    """One name alone is a list of one."""
    return [names] if isinstance(names, str) else names


def _index(experts: Sequence[Expert], name: str) -> int:
    known = tuple(expert.name for expert in experts)
    if name not in known:
        raise UnknownExpertError(name, known)
    return known.index(name)

"""DoRA experts: what they add is computed from the base's weights, and anew when somebody changes those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InjectionError
from .factors import LoraFactors

#: The weight of a module as it is without anybody's patches; hosts that patch weights in place know it.
BaseWeight = Callable[[nn.Module], Any]
# Numbers of a weight that are looked at: a LoRA that is fused changes all of them.
_LOOKED_AT = 16


def own_weight(module: nn.Module) -> Any:
    """The weight as it is now."""
    return getattr(module, "weight", None)


@dataclass(frozen=True, eq=False)
class Dora:
    """An expert's DoRA of one matrix.

    Attributes:
        factors: as in the file, with magnitudes.
        matrix, expert: their names, for errors.
        inputs: how many of the matrix' inputs the factors know; None for all.
        widened: (inputs of the matrix, size of the kernel) where they know only some.
    """

    factors: LoraFactors
    matrix: str
    expert: str
    inputs: int | None = None
    widened: tuple[int, int] | None = None

    def plain(self, weight: Any, rows: slice | None) -> LoraFactors:
        """Factors that need no base weight any more.

        Args:
            weight: of the module.
            rows: those that are the matrix; None for all.
        Raises:
            InjectionError: there is no plain weight, or the magnitudes are not for this matrix.
        """
        if not is_plain(weight):
            raise InjectionError(
                f"Expert {self.expert!r} is a DoRA and {self.matrix!r} of the network has no plain weights "
                "in memory (quantised or offloaded): what a DoRA adds is computed from them. Load the expert "
                "first, then offload; a quantised base cannot take it."
            )
        part = weight[slice(None) if rows is None else rows, : self.inputs]
        magnitude = self.factors.magnitude
        if magnitude is not None and magnitude.per_input and magnitude.values.numel() != part.shape[1]:
            raise InjectionError(
                f"Expert {self.expert!r} does not fit {self.matrix!r}: it has DoRA magnitudes for "
                f"{magnitude.values.numel()} inputs, the matrix has {part.shape[1]}."
            )
        found = self.factors.against(part)
        return found if self.widened is None else found.widened(*self.widened)


def is_plain(weight: Any) -> bool:
    """Whether a weight's numbers can be read."""
    return isinstance(weight, Tensor) and not weight.is_meta and weight.is_floating_point()


def looks(weights: Sequence[Any]) -> list[tuple[float, ...] | None]:
    """A few numbers of each weight, which tell whether it is still the same; None for one without any.

    Those of a device cross from it together.
    """
    with torch.inference_mode(False), torch.no_grad():
        taken = [_look(weight) if is_plain(weight) else None for weight in weights]
        by_device: dict[torch.device, list[Tensor]] = {}
        for numbers in taken:
            if numbers is not None:
                by_device.setdefault(numbers.device, []).append(numbers)
        moved = {device: iter(torch.cat(own).tolist()) for device, own in by_device.items()}
    return [
        None if one is None else tuple(next(moved[one.device]) for _ in range(one.numel())) for one in taken
    ]


def _look(weight: Tensor) -> Tensor:
    numbers = weight.detach().reshape(-1)
    return numbers[:: max(1, numbers.numel() // _LOOKED_AT)][:_LOOKED_AT].float()

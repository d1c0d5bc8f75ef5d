"""`DoraSlots`: keeps DoRA experts in step with the base's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dora import BaseWeight, looks
from .matrices import MatrixSlot


class DoraSlots:
    """The matrices for which some expert is a DoRA, computed from the weights of their modules.

    Args:
        slots: computed just now.
        base_weight: the weight of a module without anybody's patches.

    Attributes:
        due: whether the next forward is to look whether somebody changed the weights.
    """

    def __init__(self, slots: Sequence[MatrixSlot], base_weight: BaseWeight) -> None:
        self._slots, self._base_weight = slots, base_weight
        self._looks = self._look()
        self.due = False

    def renew(self) -> bool:
        """Compute DoRA experts anew where somebody changed the weights (a LoRA was fused, or unfused).

        Returns:
            Whether there were any.
        """
        found = self._look()
        self.due = bool(self._slots)
        changed = {
            slot.name: slot
            for slot, before, now in zip(self._slots, self._looks, found, strict=True)
            if now is not None and now != before
        }
        for slot in changed.values():
            with torch.inference_mode(False), torch.no_grad():
                slot.measure(self._base_weight(slot.module))
        self._looks = [old if now is None else now for old, now in zip(self._looks, found, strict=True)]
        return bool(changed)

    def _look(self) -> list[tuple[float, ...] | None]:
        """What the weights look like now."""
        return looks([self._base_weight(slot.module) for slot in self._slots]) if self._slots else []

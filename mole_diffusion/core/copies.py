"""`Copies`: what a mixture keeps on devices, for hosts that count and free memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .groups import Group
from .matrices import Bundle, MatrixSlot
from .ranks import Layouts, gate_bytes


class Copies:
    """The copies of factors that forwards make on a device and keep, and the gates.

    Args:
        groups, bundles: the matrices of a mixture.
        layouts: of the mixture.
        experts: N.
    """

    def __init__(
        self, groups: Sequence[Group], bundles: Sequence[Bundle], layouts: Layouts, experts: int
    ) -> None:
        self._group_of = {slot.name: group for group in groups for slot in group.slots}
        self._bundles = bundles
        self._layouts = layouts
        self._experts = experts

    def make(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make now what the first forward with the present choice of experts would make.

        Blocks that run once per expert make theirs one by one.

        Args:
            device, dtype: of the matrices' outputs.
        """
        for bundle in self._bundles:
            if self._group_of[bundle.slots[0].name].block is None:
                bundle.make_ready(self._layouts, device, dtype)
                for slot in filter(self._is_read, bundle.slots):
                    slot.gate_factors(self._experts, device)

    @property
    def made(self) -> bool:
        """Whether there are any, wherever."""
        return any(slot.keeps for bundle in self._bundles for slot in bundle.slots)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of copies and gates with the present choice of experts, whether they are made or not.

        Args:
            dtype: of the matrices' outputs.
        """
        total = sum(bundle.device_bytes(dtype.itemsize) for bundle in self._bundles)
        for bundle in self._bundles:
            read = filter(self._is_read, bundle.slots)
            total += sum(gate_bytes(slot.factors, self._experts) for slot in read)
        gates = {id(group): group.gate for group in self._group_of.values()}.values()
        values = [value for gate in gates for value in (*gate.parameters(), *gate.buffers())]
        return total + sum(value.numel() * value.element_size() for value in values)

    def _is_read(self, slot: MatrixSlot) -> bool:
        """Whether a gate reads the experts' outputs off this matrix."""
        gate = self._group_of[slot.name].gate
        return slot.answers and gate.config.gate_input != "hidden" and not gate.indifferent

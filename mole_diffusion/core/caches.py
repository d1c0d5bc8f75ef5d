"""Tensors that are derived once and kept: from factors, which never change, and from gates' parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .torch_state import is_compiling

# Tensors (per device, data type and active experts) that a matrix keeps ready before it drops them all; more
# than one forward needs, also with many experts that run one by one.
KEPT = 64

T = TypeVar("T")


class TensorCache:
    """Keeps derived tensors, so that factors are concatenated and cast once and not per call."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def get(self, key: Any, build: Callable[[], T]) -> T:
        """The value of `key`, built at first request, outside inference mode so that training may use it."""
        if key not in self._values:
            if len(self._values) >= KEPT:
                self._values.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._values[key] = build()
        value: T = self._values[key]
        return value

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._values)

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()


class Plans(Generic[T]):
    """What forwards need, made once per choice of experts, device and data type."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, dict[tuple[torch.device, torch.dtype], T]] = {}
        self._current: dict[tuple[torch.device, torch.dtype], T] = {}

    @property
    def places(self) -> list[tuple[torch.device, torch.dtype]]:
        """Devices and data types of forwards so far, with any choice."""
        return list(dict.fromkeys(place for plans in self._kept.values() for place in plans))

    def choose(self, choice: Hashable) -> None:
        """What forwards will need depends on this."""
        if choice not in self._kept and len(self._kept) >= KEPT:
            self._kept.clear()
        self._current = self._kept.setdefault(choice, {})

    def get(self, device: torch.device, dtype: torch.dtype, build: Callable[[], T]) -> T:
        """What forwards with the present choice need, built at first request, outside inference mode."""
        found = self._current.get((device, dtype))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = build()
            self._current[device, dtype] = found
        return found

    def clear(self) -> None:
        """Drop everything; the choice stays."""
        for plans in self._kept.values():
            plans.clear()


class ParameterCache:
    """Keeps what is derived from parameters for as long as these stay as they are and nobody trains them.

    A parameter has changed when its version or its storage has: `copy_`, `load_state_dict` and optimisers are
    noticed. Fused optimisers do not count versions, hence nothing is kept while a parameter has a gradient.
    A change behind autograd's back (`parameter.data.copy_`) is noticed after a forward with gradient or
    `clear`.
    """

    def __init__(self) -> None:
        self._values: dict[Any, tuple[list[tuple[Tensor, int]], Tensor]] = {}

    def get(self, key: Any, parameters: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        """What `build` makes of the parameters; anew where it needs a gradient or a compiler traces it."""
        if is_compiling():
            return build()
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            self._values.clear()
            return build()
        # Tensors of inference mode have no version.
        if any(parameter.grad is not None or parameter.is_inference() for parameter in parameters):
            return build()
        kept = self._values.get(key)
        if kept is not None and all(
            seen.data_ptr() == now.data_ptr() and version == now._version
            for (seen, version), now in zip(kept[0], parameters, strict=True)
        ):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            value = build()
        if len(self._values) >= KEPT:
            self._values.clear()
        # Aliases keep the storage, so that no other can take its address.
        self._values[key] = [(one.detach(), one._version) for one in parameters], value
        return value

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()

"""Experts in ComfyUI's memory management: loaded, counted and freed as a small model beside the large one.

ComfyUI asks what hangs on a MODEL or CLIP whenever it loads it (`model_patches_models`), makes room for all
of it together, and frees what has waited longest. What experts keep on a device are copies of their factors
and their gates; the files' own tensors stay in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from mole_diffusion.core.mixture import Mixture

#: What is listed here is asked for its models, and nobody reads it while sampling.
_LIST = "mole_experts"


class Experts(nn.Module):
    """The experts on the networks of one MODEL or CLIP, under the name that ComfyUI's log shows.

    Args:
        mixtures: of the networks.
        dtype: says what the networks compute in.
    """

    def __init__(self, mixtures: Sequence[Mixture], dtype: Callable[[], torch.dtype]) -> None:
        super().__init__()
        self.mixtures = mixtures
        self.dtype = dtype
        self.device: torch.device | None = None

    @property
    def is_ready(self) -> bool:
        """Whether they have copies on a device."""
        return any(mixture.copies.made for mixture in self.mixtures)

    def make_ready(self, device: torch.device) -> None:
        """Make the copies; what is there already stays."""
        if not self.is_ready:
            for mixture in self.mixtures:
                mixture.to(device)
                mixture.copies.make(device, self.dtype())

    def release(self, device: torch.device) -> None:
        """Let the copies go, and move the gates to where they wait."""
        for mixture in self.mixtures:
            mixture.to(device)
            mixture.release()


class ExpertsPatcher(ModelPatcher):  # type: ignore[misc]
    """What ComfyUI's memory management handles in place of weights: all of them or none.

    See ComfyUI's `ModelPatcher` for arguments and methods.
    """

    size: int

    def model_size(self) -> int:
        """Bytes on the device while they are in use."""
        if self.size <= 0:
            self.size = sum(one.copies.bytes(self.model.dtype()) for one in self.model.mixtures)
        return int(self.size)

    def loaded_size(self) -> int:
        """All of it, or nothing."""
        return self.model_size() if self.model.is_ready else 0

    def partially_load(self, device_to: torch.device, *_: Any, **__: Any) -> int:
        """Load; experts are small, and run from the device alone."""
        before = self.loaded_size()
        self.model.make_ready(device_to)
        self.model.device = device_to
        return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, *_: Any, **__: Any) -> int:
        """Nothing: whoever needs more asks for all of it next."""
        return 0

    def detach(self, unpatch_all: bool = True) -> Experts:
        """Free the device, if all is to go: before every run ComfyUI lets clones go that stay."""
        if unpatch_all and self.model.is_ready:
            self.model.release(self.offload_device)
            self.model.device = self.offload_device
        experts: Experts = self.model
        return experts


class _Listed:
    """What a MODEL or CLIP lists: its experts, the same for all clones."""

    def __init__(self, patcher: ExpertsPatcher) -> None:
        self._patcher = patcher

    def models(self) -> list[ExpertsPatcher]:
        """What is to be loaded together with it."""
        return [self._patcher]

    def __deepcopy__(self, _: Any) -> _Listed:
        return self


def count(patcher: Any, mixtures: Sequence[Mixture]) -> None:
    """Let ComfyUI load, count and free experts together with a MODEL or CLIP and all clones made of it.

    Args:
        patcher: ComfyUI's ModelPatcher of a MODEL or CLIP. One with dynamic VRAM makes room for whatever is
            allocated, and would load whole beside something that is not dynamic: there nothing is listed.
        mixtures: of its networks.
    """
    options = patcher.model_options["transformer_options"]
    patches = {name: own for name, own in options.get("patches", {}).items() if name != _LIST}
    if mixtures and not is_dynamic(patcher):
        model = patcher.model
        experts = Experts(mixtures, lambda: _computed_in(model))
        patches[_LIST] = [_Listed(ExpertsPatcher(experts, patcher.load_device, patcher.offload_device))]
    options["patches"] = patches


def is_dynamic(patcher: Any) -> bool:
    """Whether a model is loaded with dynamic VRAM, which newer cores have on some cards."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def _computed_in(model: Any) -> torch.dtype:
    """Data type of what a MODEL's or CLIP's matrices give."""
    cast = getattr(model, "manual_cast_dtype", None)
    if cast is None and hasattr(model, "get_dtype"):
        cast = model.get_dtype()
    # ComfyUI's text encoders embed in single precision, whatever their weights are in.
    return cast if isinstance(cast, torch.dtype) and hasattr(model, "diffusion_model") else torch.float32

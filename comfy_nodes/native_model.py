"""Copies of ComfyUI's MODEL, CLIP and VAE that gates are trained on, free of ComfyUI's habits.

Nodes run in inference mode, whose tensors autograd refuses, and share one network among all clones; so the
trainer gets copies in memory of its own, with the weights as they are patched (a LoRA of the core counts).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import TrainingError

from .auto import ClipReader
from .binding import slot_of
from .memory import is_dynamic

#: Says in newer cores that somebody trains.
_TRAINS = "in_training"


class CopiedModel:
    """What denoisers on copies of ComfyUI's objects have in common.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        size: height and width of the pictures in pixels; None for the model's own.
        usual: that of models that do not say.
        dtype: of the copied network; None for its own.

    Attributes:
        network: the copy of the network that predicts.
        text_encoder: the copy of the CLIP's model, whole or in part.
        clip: ComfyUI's own CLIP.
        reader: reads the texts that are encoded; None for nobody.
        device: where everything runs.
    """

    dtype = torch.float32
    text_encoder: nn.Module
    reader: ClipReader | None = None

    def __init__(
        self, model: Any, clip: Any, vae: Any, size: int | None, usual: int, dtype: torch.dtype | None
    ) -> None:
        self.device: torch.device = model.load_device
        self.network: Any = copied(model, model.model.diffusion_model, self.device, dtype)
        self._autoencoder = copied(vae.patcher, vae.first_stage_model, self.device, torch.float32)
        self.clip, self._format = clip, model.model.latent_format
        self._encoded_channels = int(vae.latent_channels)
        configured: int = getattr(model.model.model_config, "mole_picture_size", usual)
        self._size = configured if size is None else size
        self._factor = int(vae.spacial_compression_encode())

    @property
    def part(self) -> str:
        """What gates files call the network that predicts."""
        return slot_of(self.network)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The network that predicts, text encoder and VAE."""
        return {self.part: self.network, "text_encoder": self.text_encoder, "vae": self._autoencoder}

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return self._size, self._size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""
        side = self._size // self._factor
        return int(self._format.latent_channels), side, side

    def combined(self, without: Tensor, with_text: Tensor, scale: float) -> Tensor:
        """See `Denoiser.combined`."""
        return without + scale * (with_text - without)

    def check_vae(self) -> None:
        """Refuse VAEs of other models.

        Raises:
            TrainingError: the VAE makes latents that the MODEL cannot read.
        """
        expected = self.latent_shape[0]
        if self._encoded_channels != expected:
            raise TrainingError(
                f"This VAE makes latents of {self._encoded_channels} channels, this MODEL reads {expected}; "
                "connect the MODEL's own VAE."
            )

    def training(self, *, checkpointing: bool, decodes: bool) -> AbstractContextManager[None]:
        """Nothing to prepare: the copies are as training needs them.

        Raises:
            TrainingError: ComfyUI's networks do not recompute their activations.
        """
        if checkpointing:
            raise TrainingError("gradient_checkpointing is for models of diffusers; ComfyUI's have none.")
        return nullcontext()

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """See `Denoiser.encode`; without gradient."""
        latents = self._autoencoder.encode(self._framed((pictures * 2 - 1).to(self.device, torch.float32)))
        read: Tensor = self._format.process_in(latents)
        return self._unframed(read)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Denoiser.decode`."""
        pixels = self._autoencoder.decode(self._format.process_out(self._framed(latents.float())))
        return (self._unframed(pixels) / 2 + 0.5).clamp(0, 1)

    def _framed(self, pictures: Tensor) -> Tensor:
        """Pictures as videos of one frame, where the model is one for videos."""
        return pictures.unsqueeze(2) if getattr(self._format, "latent_dimensions", 2) == 3 else pictures

    @staticmethod
    def _unframed(pictures: Tensor) -> Tensor:
        return pictures[:, :, 0] if pictures.dim() == 5 else pictures

    def digest(self) -> str:
        """Tells bases apart: a hash over some of the weights."""
        digest = hashlib.sha256()
        for part in (self.network, self.text_encoder):
            parameters = [p for _, p in sorted(part.named_parameters()) if p.numel() < 1_000_000]
            for parameter in parameters[:: max(1, len(parameters) // 20)]:
                digest.update(json.dumps(parameter.flatten()[:64].tolist()).encode())
        return digest.hexdigest()


@contextmanager
def differentiable() -> Iterator[None]:
    """Networks compute by what has gradients: newer cores have faster forms that have none."""
    management: Any = comfy.model_management
    before = getattr(management, _TRAINS, None)
    if before is None:
        yield
        return
    setattr(management, _TRAINS, True)
    try:
        yield
    finally:
        setattr(management, _TRAINS, before)


def copied(patcher: Any, network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A copy of a network in memory that autograd accepts, with its patches, without hooks.

    Args:
        patcher: ComfyUI's, of this network.
        network: what is copied; may be a part.
        device: where the copy goes.
        dtype: its type; None leaves it as it is.

    Raises:
        TrainingError: its weights come and go with dynamic VRAM.
    """
    if is_dynamic(patcher):
        raise TrainingError(
            f"{type(patcher.model).__name__} is loaded with dynamic VRAM, where weights come and go and "
            "cannot be copied for training: start ComfyUI with --disable-dynamic-vram to train gates."
        )
    comfy.model_management.load_models_gpu(
        [patcher],
        memory_required=_size(network, dtype),
        force_patch_weights=True,
        force_full_load=True,
    )
    with torch.inference_mode(False), patcher.use_ejected():
        duplicate = copy.deepcopy(network).to(device=device)
        if dtype is not None:
            duplicate = duplicate.to(dtype=dtype)
    module: Any
    for module in duplicate.modules():
        if dtype is not None and isinstance(getattr(module, "dtype", None), torch.dtype):
            module.dtype = dtype
    _let_go(patcher)
    return duplicate.requires_grad_(False).eval()


def _size(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of a copy."""
    values = (*network.parameters(), *network.buffers())
    return sum(value.numel() * (dtype or value.dtype).itemsize for value in values)


def _let_go(patcher: Any) -> None:
    """Let ComfyUI take a model off the device, of which there is a copy now."""
    loaded = comfy.model_management.current_loaded_models
    others = [one for one in loaded if one.model is None or not patcher.is_clone(one.model)]
    if len(others) < len(loaded):
        comfy.model_management.free_memory(1e30, patcher.load_device, keep_loaded=others)


def free_inputs(network: nn.Module) -> None:
    """Let a network of ComfyUI be trained through: CLIP and FLUX add to their hidden states in place, which
    layer norms keep.
    """
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))

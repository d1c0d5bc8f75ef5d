"""What denoisers out of pipelines of diffusers have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mole_diffusion.pictures.denoisers import autoencoder

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class PipelineDenoiser:
    """Networks, device and autoencoder of a pipeline, as a `Denoiser` has them.

    Args:
        pipe: the pipeline; experts on its networks count as it says.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        predicts: the pipeline's name of the network that predicts.
    """

    predicts: ClassVar[str]

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None) -> None:
        self._pipe = pipe
        self._size = size

    @property
    def network(self) -> nn.Module:
        """The network that predicts."""
        network: nn.Module = getattr(self._pipe, self.predicts)
        return network

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """That network, text encoders and VAE."""
        names = (self.predicts, *_TEXT_ENCODERS, "vae")
        found = {name: getattr(self._pipe, name, None) for name in names}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        network: Any = self.network
        device: torch.device = network.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        network: Any = self.network
        dtype: torch.dtype = network.dtype
        return dtype

    def combined(self, without: Tensor, with_text: Tensor, scale: float) -> Tensor:
        """See `Denoiser.combined`."""
        return without + scale * (with_text - without)

    @contextmanager
    def training(self, *, checkpointing: bool, decodes: bool) -> Iterator[None]:
        """See `Denoiser.training`."""
        recomputed = [self.network, *([self._pipe.vae] if decodes else [])] if checkpointing else []
        with autoencoder.gradient_checkpointing(recomputed), autoencoder.full_precision(self._pipe.vae):
            yield

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """See `Denoiser.encode`; without gradient."""
        return autoencoder.encode(self._pipe.vae, pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Denoiser.decode`."""
        return autoencoder.decode(self._pipe.vae, latents)

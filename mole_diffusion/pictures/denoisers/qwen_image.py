"""Qwen-Image as a denoiser: its autoencoder is one for videos, and guidance keeps the prediction's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser


class VideoLatents(FlowDenoiser):
    """A pipeline whose autoencoder is one for videos, of which a picture is one frame."""

    @property
    def channels(self) -> int:
        """See `FlowDenoiser`."""
        return int(self._pipe.vae.config.z_dim)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """See `Denoiser.encode`; without gradient."""
        vae = self._pipe.vae
        frames = (pictures * 2 - 1).to(vae.device, vae.dtype).unsqueeze(2)
        mean, spread = self._statistics()
        normalised: Tensor = (vae.encode(frames).latent_dist.mode().squeeze(2) - mean) / spread
        return normalised.float()

    def decode(self, latents: Tensor) -> Tensor:
        """See `Denoiser.decode`."""
        vae = self._pipe.vae
        mean, spread = self._statistics()
        frames: Tensor = vae.decode((latents.to(vae.dtype) * spread + mean).unsqueeze(2)).sample
        return (frames[:, :, 0].float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, channels, 1, 1) of latents."""
        vae = self._pipe.vae
        config, options = vae.config, {"device": vae.device, "dtype": vae.dtype}
        mean, spread = (torch.tensor(one, **options) for one in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1), spread.view(1, -1, 1, 1)


class QwenImageDenoiser(VideoLatents):
    """A pipeline of Qwen-Image as a `Denoiser`."""

    def combined(self, without: Tensor, with_text: Tensor, scale: float) -> Tensor:
        """See `Denoiser.combined`; the length of each token's velocity stays that with the text."""
        mixed = super().combined(without, with_text, scale)
        lengths = [self._pack(one).norm(dim=-1, keepdim=True) for one in (with_text, mixed)]
        return self._unpack(self._pack(mixed) * (lengths[0] / lengths[1]), mixed.shape)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does, and keep where they end."""
        text, mask = self._pipe.encode_prompt(prompt=list(texts), device=self.device)
        if mask is None:
            mask = torch.ones(text.shape[:2], device=text.device)
        return Condition({"encoder_hidden_states": text, "encoder_hidden_states_mask": mask.bool()})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        height, width = latents.shape[-2:]
        found: Tensor = self._pipe.transformer(
            hidden_states=self._pack(latents.to(self.dtype)),
            timestep=times.to(latents.device, self.dtype).expand(len(latents)),
            img_shapes=[[(1, height // self.patch, width // self.patch)]] * len(latents),
            return_dict=False,
            **condition.tensors,
        )[0]
        return self._unpack(found, latents.shape)

    def _pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self._pipe._pack_latents(latents, *latents.shape)
        return packed

    def _unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        factor = self._pipe.vae_scale_factor
        pixels: Any = (shape[-2] * factor, shape[-1] * factor)
        frames: Tensor = self._pipe._unpack_latents(packed, *pixels, factor)
        return frames.squeeze(2)

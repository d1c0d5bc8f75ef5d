"""Anima as a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers.qwen_image import VideoLatents


class AnimaDenoiser(VideoLatents):
    """A pipeline of Anima as a `Denoiser`; its transformer reads videos, of which a picture is one frame."""

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does."""
        text, _ = self._pipe.encode_prompt(list(texts), device=self.device)
        return Condition({"encoder_hidden_states": text})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        height, width = (side * self._pipe.vae_scale_factor for side in latents.shape[-2:])
        found: Tensor = self._pipe.transformer(
            hidden_states=latents.to(self.dtype).unsqueeze(2),
            timestep=times.to(latents.device, self.dtype).expand(len(latents)),
            padding_mask=latents.new_zeros(1, 1, height, width, dtype=self.dtype),
            return_dict=False,
            **condition.tensors,
        )[0]
        return found.squeeze(2)

    def _set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """With the scheduler's own shift."""
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy()
        scheduler.set_timesteps(sigmas=sigmas)

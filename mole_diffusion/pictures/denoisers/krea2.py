"""Krea 2 as a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers.qwen_image import VideoLatents

# Side of the pictures that the pipeline draws by itself.
_SIDE = 1024
# The shift of distilled models; others' depends on the number of tokens, up to so many.
_DISTILLED_SHIFT, _LARGEST = 1.15, 6400


class Krea2Denoiser(VideoLatents):
    """A pipeline of Krea 2 as a `Denoiser`."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """See `FlowDenoiser`."""
        return self._size or (_SIDE, _SIDE)

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`; this family counts from 0 for none, others from 1."""
        return 1 + max(scale, 0.0)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does, and keep where they end."""
        text, mask = self._pipe.encode_prompt(list(texts), self.device)
        return Condition({"encoder_hidden_states": text, "encoder_attention_mask": mask})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        pipe, (batch, channels, height, width) = self._pipe, latents.shape
        words = condition.tensors["encoder_hidden_states"].shape[1]
        grid = height // self.patch, width // self.patch
        found: Tensor = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.to(self.dtype), batch, channels, height, width),
            timestep=times.to(latents.device, self.dtype).expand(batch),
            position_ids=pipe.prepare_position_ids(words, *grid, latents.device),
            return_dict=False,
            **condition.tensors,
        )[0]
        factor = pipe.vae_scale_factor
        frames: Tensor = pipe._unpack_latents(found, height * factor, width * factor)
        return frames.squeeze(2)

    def _set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Shifted by the number of tokens, or as distilled."""
        from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        defaults = (256, _LARGEST, 0.5, 1.15)
        given = [scheduler.config.get(name, value) for name, value in zip(names, defaults, strict=True)]
        distilled = self._pipe.config.get("is_distilled")
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy()
        mu = _DISTILLED_SHIFT if distilled else calculate_shift(tokens, *given)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

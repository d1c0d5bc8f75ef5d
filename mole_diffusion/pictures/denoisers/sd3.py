"""Stable Diffusion 3 and 3.5 as denoisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition, Replay
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser


class SD3Denoiser(FlowDenoiser):
    """A pipeline of Stable Diffusion 3 as a `Denoiser`."""

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does."""
        tokens, _, pooled, _ = self._encoded(list(texts), guided=False)
        return Condition({"encoder_hidden_states": tokens, "pooled_projections": pooled})

    def _encoded(self, texts: list[str], *, guided: bool) -> Any:
        return self._pipe.encode_prompt(
            texts, None, None, device=self.device, do_classifier_free_guidance=guided
        )

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        steps = (times * 1000).to(self.dtype).expand(len(latents))
        prediction: Tensor = self._pipe.transformer(
            latents.to(self.dtype), timestep=steps, **condition.tensors
        ).sample
        return prediction

    def replay(self, prompt: str, guided: bool) -> Replay:
        """See `FlowDenoiser`; the negative prompt stands first in the batch."""
        tokens, negative, pooled, other = self._encoded([prompt], guided=guided)
        if guided:
            tokens, pooled = torch.cat([negative, tokens]), torch.cat([other, pooled])

        def told(given: Mapping[str, Any]) -> dict[str, Any]:
            return {**given, "encoder_hidden_states": tokens, "pooled_projections": pooled}

        return told

    def _set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """With the scheduler's own shift."""
        scheduler.set_timesteps(steps)

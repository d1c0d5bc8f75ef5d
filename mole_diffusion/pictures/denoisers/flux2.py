"""FLUX.2 as a denoiser: latents are packed and normalised outside the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser

# Pixels of the autoencoder's latent that are one of the network's, along each side.
_PACKED = 2


class Flux2Denoiser(FlowDenoiser):
    """A pipeline of FLUX.2 as a `Denoiser`: dev reads the guidance, distilled klein ignores it."""

    patch: ClassVar[int] = 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""
        unit = self._pipe.vae_scale_factor * _PACKED
        height, width = (side // unit for side in self.picture_size)
        return self._pipe.vae.config.latent_channels * _PACKED**2, height, width

    @property
    def reads_guidance(self) -> bool:
        """See `FlowDenoiser`."""
        return bool(self._pipe.transformer.config.guidance_embeds)

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`."""
        return 1.0 if self._pipe.config.get("is_distilled") else super().guided(scale)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does."""
        encoded, _ = self._pipe.encode_prompt(list(texts), device=self.device)
        return Condition({"encoder_hidden_states": encoded})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        pipe, text = self._pipe, condition.tensors["encoder_hidden_states"]
        told: dict[str, Any] = {}
        if self.reads_guidance:
            told["guidance"] = torch.full([len(latents)], self._embedded, device=latents.device)
        found: Tensor = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.to(self.dtype)),
            encoder_hidden_states=text,
            timestep=times.to(latents.device, self.dtype).expand(len(latents)),
            img_ids=pipe._prepare_latent_ids(latents).to(latents.device),
            txt_ids=pipe._prepare_text_ids(text).to(latents.device),
            return_dict=False,
            **told,
        )[0]
        return found.transpose(1, 2).reshape(latents.shape)

    def _set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Shifted by the number of tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy()
        scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """See `Denoiser.encode`; without gradient."""
        vae = self._pipe.vae
        means = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        mean, spread = self._statistics()
        normalised: Tensor = (self._pipe._patchify_latents(means) - mean) / spread
        return normalised.float()

    def decode(self, latents: Tensor) -> Tensor:
        """See `Denoiser.decode`."""
        vae = self._pipe.vae
        mean, spread = self._statistics()
        unpacked = self._pipe._unpatchify_latents(latents.to(vae.dtype) * spread + mean)
        pictures: Tensor = vae.decode(unpacked).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, channels, 1, 1) of packed latents."""
        vae = self._pipe.vae
        variance = vae.bn.running_var + vae.config.batch_norm_eps
        return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)

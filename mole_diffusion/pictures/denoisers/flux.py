"""FLUX.1 and Chroma as denoisers: packed latents, and what the networks are told beside the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition, Replay
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser


class FluxDenoiser(FlowDenoiser):
    """A pipeline of FLUX.1 as a `Denoiser`; models that were distilled read the guidance."""

    @property
    def reads_guidance(self) -> bool:
        """See `FlowDenoiser`."""
        return bool(getattr(self._pipe.transformer.config, "guidance_embeds", False))

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does."""
        tokens, pooled, _ = self._pipe.encode_prompt(
            list(texts), None, device=self.device, num_images_per_prompt=1
        )
        return Condition({"encoder_hidden_states": tokens, "pooled_projections": pooled})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        batch, channels, height, width = latents.shape
        pipe, text = self._pipe, condition.tensors["encoder_hidden_states"]
        options: dict[str, Any] = {"device": latents.device, "dtype": self.dtype}
        packed = pipe._pack_latents(latents.to(self.dtype), batch, channels, height, width)
        told = {
            **condition.tensors,
            "timestep": times.to(**options).expand(batch),
            "img_ids": pipe._prepare_latent_image_ids(batch, height // 2, width // 2, *options.values()),
            "txt_ids": torch.zeros(text.shape[1], 3, **options),
            **self._told(packed),
        }
        found = pipe.transformer(packed, **told, return_dict=False)[0]
        factor = pipe.vae_scale_factor
        unpacked: Tensor = pipe._unpack_latents(found, height * factor, width * factor, factor)
        return unpacked

    def _told(self, packed: Tensor) -> dict[str, Any]:
        """What networks of the family read beside that."""
        if not self.reads_guidance:
            return {}
        return {"guidance": torch.full([len(packed)], self._embedded, device=packed.device)}

    def replay(self, prompt: str, guided: bool) -> Replay:
        """See `FlowDenoiser`; the pooled text is that of a text encoder which experts may change."""
        encoded = self.encode_texts([prompt]).tensors

        def told(given: Mapping[str, Any]) -> dict[str, Any]:
            count = len(given["encoder_hidden_states"])
            return {**given, **{name: one.expand(count, *one.shape[1:]) for name, one in encoded.items()}}

        return told


class ChromaDenoiser(FluxDenoiser):
    """A pipeline of Chroma as a `Denoiser`."""

    @contextmanager
    def training(self, *, checkpointing: bool, decodes: bool) -> Iterator[None]:
        """See `Denoiser.training`.

        Raises:
            TrainingError: activations are to be recomputed, which diffusers' Chroma does without the mask of
                the text.
        """
        if checkpointing:
            raise TrainingError(
                "gradient_checkpointing cannot be used with Chroma: diffusers recomputes its single blocks "
                "without the mask of the text, so that gradients would be wrong; train without it"
            )
        with super().training(checkpointing=False, decodes=decodes):
            yield

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does, and keep where they end."""
        tokens, _, mask, *_ = self._pipe.encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"encoder_hidden_states": tokens, "text_mask": mask})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        told = dict(condition.tensors)
        image = latents.shape[-2] * latents.shape[-1] // self.patch**2
        mask = self._pipe._prepare_attention_mask(len(latents), image, self.dtype, told.pop("text_mask"))
        return super().predict(latents, times, Condition({**told, "attention_mask": mask}))

    def replay(self, prompt: str, guided: bool) -> Replay:
        """See `FlowDenoiser`."""
        return dict

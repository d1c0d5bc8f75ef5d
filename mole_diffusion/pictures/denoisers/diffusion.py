"""Stable Diffusion 1, 2 and XL out of pipelines of diffusers.

Noise levels are those of a DDIM scheduler with the betas of the pipeline, whichever sampler the pipeline
itself is set to: it is deterministic, differentiable, and knows all prediction types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition, Replay
from mole_diffusion.pictures.denoisers.pipeline import PipelineDenoiser

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# SDXL's refiner: scores of beauty that the pipeline tells it, with a text and without, and the share of the
# noise levels, the lowest, that it was trained on.
_BEAUTY, _PLAIN, _REFINED = 6.0, 2.5, 0.2


class DiffusionDenoiser(PipelineDenoiser):
    """A pipeline of Stable Diffusion 1, 2 or XL as a `Denoiser`.

    Args:
        pipe: the pipeline; experts on its networks count as it says.
        size: height and width of the pictures in pixels; None for the model's own.
    """

    predicts = "unet"

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        if self._size is not None:
            return self._size
        size, factor = self._pipe.unet.config.sample_size, self._pipe.vae_scale_factor
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * factor, columns * factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""
        height, width = self.picture_size
        factor = self._pipe.vae_scale_factor
        return self._pipe.vae.config.latent_channels, height // factor, width // factor

    @cached_property
    def scheduler(self) -> Any:
        """A DDIM scheduler with the pipeline's betas and prediction type, without clipping.

        Raises:
            TrainingError: the pipeline's scheduler has no betas or another prediction type (flow matching).
        """
        from diffusers import DDIMScheduler

        theirs = self._pipe.scheduler
        prediction = theirs.config.get("prediction_type", "epsilon")
        if "beta_schedule" not in theirs.config or prediction not in _PREDICTION_TYPES:
            raise TrainingError(
                f"scheduler {type(theirs).__name__} with prediction type {prediction!r} cannot be trained "
                f"with; allowed are schedulers with betas and one of {_PREDICTION_TYPES}"
            )
        return DDIMScheduler.from_config(theirs.config, clip_sample=False, thresholding=False)

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`: these networks read none."""
        return scale

    def check_trainable(self) -> None:
        """Refuse other schedulers, and UNets that read more than latents.

        Raises:
            TrainingError: it is such a one.
        """
        channels, expected = self._pipe.unet.config.in_channels, self.latent_shape[0]
        if channels != expected:
            raise TrainingError(
                f"gates of this UNet cannot be trained: it reads {channels} channels, latents have"
                f" {expected} (an inpainting UNet reads mask and picture too); train on the base"
            )
        _ = self.scheduler

    @property
    def _refines(self) -> bool:
        """Whether it is SDXL's refiner, which knows a little noise alone."""
        return bool(self._pipe.config.get("requires_aesthetics_score", False))

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does; SDXL is told the size of the picture too, its refiner where the
        picture begins and how beautiful it is: less where the text is empty, as the pipeline's negative one.

        Raises:
            TrainingError: the UNet wants to know more than that.
        """
        encoded = self._pipe.encode_prompt(
            list(texts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if getattr(self._pipe.unet.config, "addition_embed_type", None) is None:
            return Condition({"encoder_hidden_states": encoded[0]})
        tokens, _, pooled, _ = encoded
        if self._pipe.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([bool(text) for text in texts], device=tokens.device)
            tokens, pooled = tokens * kept[:, None, None], pooled * kept[:, None]
        size = self.picture_size
        told = [((_BEAUTY if text else _PLAIN),) if self._refines else size for text in texts]
        sizes = torch.tensor(
            [[*size, 0, 0, *last] for last in told], device=tokens.device, dtype=tokens.dtype
        )
        self._check_added(pooled, sizes)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return Condition({"encoder_hidden_states": tokens, **added})

    def _check_added(self, pooled: Tensor, sizes: Tensor) -> None:
        config = self._pipe.unet.config
        found = pooled.shape[1] + sizes.shape[1] * config.addition_time_embed_dim
        if found != config.projection_class_embeddings_input_dim:
            raise TrainingError(
                "gates of this UNet cannot be trained: its added conditions are "
                f"{config.projection_class_embeddings_input_dim} wide, pooled text and picture sizes are "
                f"{found}; SDXL's refiner is told a score of beauty, and says so in its pipeline's "
                "configuration: requires_aesthetics_score"
            )

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        told: dict[str, Any] = dict(condition.tensors)
        added = {name: told.pop(name) for name in ("text_embeds", "time_ids") if name in told}
        if added:
            told["added_cond_kwargs"] = added
        prediction: Tensor = self._pipe.unet(latents.to(self.dtype), times, **told).sample
        return prediction

    def replay(self, prompt: str, guided: bool) -> Replay:
        """Encode a prompt as the networks are now, for forwards that were recorded.

        Args:
            prompt: the prompt.
            guided: whether their batch has the negative prompt too, before it.

        Returns:
            Keyword arguments of the UNet in such a forward -> the same with this text.
        """
        encoded = self._pipe.encode_prompt(
            prompt,
            device=self._pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        # Prompt and negative; for SDXL the same of the pooled text.
        text, *pooled = [
            torch.cat([negative, own]) if guided else own
            for own, negative in zip(encoded[::2], encoded[1::2], strict=True)
        ]

        def told(given: Mapping[str, Any]) -> dict[str, Any]:
            if not pooled:
                return {**given, "encoder_hidden_states": text}
            added = {**given["added_cond_kwargs"], "text_embeds": pooled[0]}
            return {**given, "encoder_hidden_states": text, "added_cond_kwargs": added}

        return told

    def random_times(self, count: int, draws: torch.Generator) -> Tensor:
        """Timesteps, all equally likely."""
        return torch.randint(self._timesteps, (count,), generator=draws)

    def times_at(self, shares: Tensor) -> Tensor:
        """Timesteps at shares of the schedule."""
        return (shares * self._timesteps).long().clamp(max=self._timesteps - 1)

    @property
    def _timesteps(self) -> int:
        count: int = self.scheduler.config.num_train_timesteps
        return int(count * _REFINED) if self._refines else count

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Denoiser.noisy`."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, times)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noise, velocity or the latents themselves, by the prediction type."""
        prediction = self.scheduler.config.prediction_type
        if prediction == "epsilon":
            return noise
        if prediction == "sample":
            return latents
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, times)
        return velocity

    def schedule(self, steps: int) -> Tensor:
        """See `Denoiser.schedule`.

        Raises:
            TrainingError: it cannot draw.
        """
        if self._refines:
            raise TrainingError(
                "SDXL's refiner cannot draw from noise alone: give every concept pictures, and set "
                "collage_background='sources'; guidance by CLIP is for the base"
            )
        self.scheduler.set_timesteps(steps)
        times: Tensor = self.scheduler.timesteps
        return times

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.step`."""
        result = self.scheduler.step(prediction, int(time), latents)
        return result.prev_sample.to(latents.dtype), result.pred_original_sample.to(latents.dtype)

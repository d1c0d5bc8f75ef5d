"""Transformers that are trained by flow matching, out of pipelines of diffusers.

Times are shares of noise: at s latents are (1 - s) x + s noise, and networks predict noise - x. Steps are
Euler's, as those of diffusers' flow-matching scheduler, with gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition, Replay
from mole_diffusion.pictures.denoisers.pipeline import PipelineDenoiser
from mole_diffusion.pictures.flow_matching import FlowMatching


class FlowDenoiser(FlowMatching, PipelineDenoiser, ABC):
    """A pipeline around a transformer as a `Denoiser`; what its family is told stands in a subclass.

    Args:
        pipe: the pipeline; experts on its networks count as it says.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        patch: side of the square of latent pixels that is one token; sizes are cut to multiples of it.
    """

    predicts = "transformer"
    patch: ClassVar[int] = 2

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None) -> None:
        super().__init__(pipe, size)
        self._embedded = 1.0
        self._levels: Tensor | None = None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        if self._size is not None:
            return self._size
        side = self._pipe.default_sample_size * self._pipe.vae_scale_factor
        return side, side

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""
        unit = self._pipe.vae_scale_factor * self.patch
        height, width = (self.patch * (side // unit) for side in self.picture_size)
        return self.channels, height, width

    @property
    def channels(self) -> int:
        """Of the autoencoder's latents."""
        return int(self._pipe.vae.config.latent_channels)

    @property
    def reads_guidance(self) -> bool:
        """Whether the network is told how strong guidance is, and needs no second pass for it."""
        return False

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`."""
        self._embedded = scale
        return 1.0 if self.reads_guidance else scale

    def check_trainable(self) -> None:
        """Refuse schedulers of diffusions.

        Raises:
            TrainingError: it is one.
        """
        scheduler = self._pipe.scheduler
        if "shift" not in scheduler.config:
            raise TrainingError(
                f"scheduler {type(scheduler).__name__} cannot be trained with; this model needs one of flow "
                "matching, such as FlowMatchEulerDiscreteScheduler"
            )

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does."""

    @abstractmethod
    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""

    def replay(self, prompt: str, guided: bool) -> Replay:
        """See `DiffusionDenoiser.replay`; as recorded, where experts change no text encoder."""
        return dict

    @property
    def fixed_shift(self) -> float:
        """See `FlowMatching.fixed_shift`."""
        config = self._pipe.scheduler.config
        return 1.0 if config.get("use_dynamic_shifting") else float(config.shift)

    def schedule(self, steps: int) -> Tensor:
        """See `Denoiser.schedule`; as the pipeline has it for pictures of this size."""
        scheduler = type(self._pipe.scheduler).from_config(self._pipe.scheduler.config)
        _, height, width = self.latent_shape
        self._set_timesteps(scheduler, steps, height * width // self.patch**2)
        self._levels = scheduler.sigmas.float().cpu()
        return self._levels[:-1]

    def _set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """As the family's pipelines do: from 1 to 1 / steps, shifted by the number of tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        defaults = (256, 4096, 0.5, 1.15)
        given = [scheduler.config.get(name, value) for name, value in zip(names, defaults, strict=True)]
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, *given))

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.step`."""
        if self._levels is None:
            raise TrainingError("step() goes through the times of schedule(), which was not called")
        level = float(time)
        lower = float(self._levels[int((self._levels - level).abs().argmin()) + 1])
        velocity = prediction.to(latents.dtype)
        return latents + (lower - level) * velocity, latents - level * velocity

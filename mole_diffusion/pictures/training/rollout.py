"""Sampling for training: without gradient up to a step, with gradient from there on.

Everything here runs on a DDIM scheduler with the noise schedule of the pipeline, whichever sampler the
pipeline itself is set to: it is deterministic, differentiable, and knows all prediction types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.training.conditions import TextCondition

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def training_scheduler(scheduler: Any) -> Any:
    """A DDIM scheduler with the same betas and prediction type, without clipping.

    A host without diffusers brings its own, ready for training, and says so by an attribute ``for_training``.

    Raises:
        TrainingError: if the pipeline's scheduler has no betas or another prediction type (flow matching).
    """
    if getattr(scheduler, "for_training", False):
        return scheduler
    from diffusers import DDIMScheduler

    prediction = scheduler.config.get("prediction_type", "epsilon")
    if "beta_schedule" not in scheduler.config or prediction not in _PREDICTION_TYPES:
        raise TrainingError(
            f"scheduler {type(scheduler).__name__} with prediction type {prediction!r} cannot be trained "
            f"with; allowed are schedulers with betas and one of {_PREDICTION_TYPES}"
        )
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


@dataclass
class PassCounter:
    """Counts what training costs: passes of the UNet, with and without gradient, and of the decoder."""

    with_gradient: int = 0
    without_gradient: int = 0
    decoded: int = 0

    def unet(self) -> None:
        """Count one pass of the UNet."""
        if torch.is_grad_enabled():
            self.with_gradient += 1
        else:
            self.without_gradient += 1

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the counts."""
        vars(self).update(state)


@dataclass
class Sampler:
    """Samples latents with classifier-free guidance.

    Args:
        unet: The UNet, gates attached.
        scheduler: From :func:`training_scheduler`.
        guidance: Scale of classifier-free guidance; 1 or less skips the empty prompt.
        counter: Counts the passes.
    """

    unet: Any
    scheduler: Any
    guidance: float
    counter: PassCounter = field(default_factory=PassCounter)

    def predict(self, latents: Tensor, timestep: Any, text: TextCondition, empty: TextCondition) -> Tensor:
        """Guided prediction of the UNet, conditional and unconditional in one pass.

        Args:
            latents: (batch, 4, h, w).
            timestep: A scalar or (batch,).
            text: As many texts.
            empty: The empty prompt, once or for each text.

        Returns:
            (batch, 4, h, w).
        """
        self.counter.unet()
        if self.guidance <= 1:
            plain: Tensor = self.unet(latents, timestep, **text.arguments()).sample
            return plain
        output = self.unet(torch.cat([latents, latents]), timestep, **text.after(empty).arguments()).sample
        without, with_text = output.chunk(2)
        guided: Tensor = without + self.guidance * (with_text - without)
        return guided

    def start(self, steps: int, batch: int, shape: tuple[int, int, int], draws: torch.Generator) -> Tensor:
        """Set the schedule to ``steps`` and return noise (batch, *shape) to start from."""
        self.scheduler.set_timesteps(steps)
        noise = torch.randn(batch, *shape, generator=draws).to(self.unet.device, self.unet.dtype)
        scaled: Tensor = noise * self.scheduler.init_noise_sigma
        return scaled

    def run(
        self, latents: Tensor, text: TextCondition, empty: TextCondition, first: int, last: int
    ) -> Tensor:
        """Take the steps ``first .. last - 1`` of the schedule; latents in, latents out."""
        for timestep in self.scheduler.timesteps[first:last]:
            latents = self.step(latents, timestep, text, empty)[0]
        return latents

    def step(
        self, latents: Tensor, timestep: Tensor, text: TextCondition, empty: TextCondition
    ) -> tuple[Tensor, Tensor]:
        """One step: the next latents and the predicted clean latents."""
        prediction = self.predict(latents, timestep, text, empty)
        result = self.scheduler.step(prediction, int(timestep), latents)
        return result.prev_sample.to(latents.dtype), result.pred_original_sample.to(latents.dtype)

    @torch.no_grad()
    def sample(
        self,
        steps: int,
        text: TextCondition,
        empty: TextCondition,
        shape: tuple[int, int, int],
        draws: torch.Generator,
    ) -> Tensor:
        """Sample clean latents (batch, *shape) over the whole schedule, without gradient."""
        return self.run(self.start(steps, len(text), shape, draws), text, empty, 0, steps)

    def rollout(
        self,
        steps: int,
        target: int,
        truncated: int,
        text: TextCondition,
        empty: TextCondition,
        shape: tuple[int, int, int],
        draws: torch.Generator,
    ) -> Tensor:
        """Predicted clean latents at step ``target`` of ``steps``, with gradient through the last
        ``truncated`` steps.

        Args:
            steps: Length of the schedule.
            target: Index of the step whose prediction is returned, 0 .. steps - 1.
            truncated: Steps with gradient, ``target`` among them.
            text: A text for each latent, with gradient.
            empty: The empty prompt, with gradient.
            shape: Shape of one latent.
            draws: Generator of the noise, on the CPU.

        Returns:
            (batch, *shape).
        """
        first = max(0, target + 1 - truncated)
        with torch.no_grad():
            latents = self.start(steps, len(text), shape, draws)
            latents = self.run(latents, text.detach(), empty.detach(), 0, first)
        latents = self.run(latents, text, empty, first, target)
        return self.step(latents, self.scheduler.timesteps[target], text, empty)[1]


def denoising_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should predict, by the scheduler's prediction type; all (batch, 4, h, w)."""
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return latents
    target: Tensor = scheduler.get_velocity(latents, noise, timesteps)
    return target

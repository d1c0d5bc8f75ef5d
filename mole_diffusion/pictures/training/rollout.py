"""Sampling for training: without gradient up to a step, with gradient from there on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition, Denoiser


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
        denoiser: The model, gates attached.
        guidance: Scale of classifier-free guidance; 1 or less skips the empty prompt.
        counter: Counts the passes.
        rescale: Share by which guided predictions get the deviation of plain ones (Lin et al. 2023, 3.4).
    """

    denoiser: Denoiser
    guidance: float
    counter: PassCounter = field(default_factory=PassCounter)
    rescale: float = 0.0

    def predict(self, latents: Tensor, time: Tensor, text: Condition, empty: Condition) -> Tensor:
        """Guided prediction, conditional and unconditional in one pass.

        Args:
            latents: (batch, c, h, w).
            time: A scalar.
            text: As many texts.
            empty: The empty prompt, once or for each text.

        Returns:
            (batch, c, h, w).
        """
        self.counter.unet()
        guidance = self.denoiser.guided(self.guidance)
        if guidance <= 1:
            return self.denoiser.predict(latents, time, text)
        output = self.denoiser.predict(torch.cat([latents, latents]), time, text.after(empty))
        without, with_text = output.chunk(2)
        guided = self.denoiser.combined(without, with_text, guidance)
        if not self.rescale:
            return guided
        ratio = with_text.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)

    def noise(self, batch: int, draws: torch.Generator) -> Tensor:
        """Noise (batch, *latent_shape) to start from."""
        drawn = torch.randn(batch, *self.denoiser.latent_shape, generator=draws)
        return drawn.to(self.denoiser.device, self.denoiser.dtype)

    def run(self, latents: Tensor, times: Tensor, text: Condition, empty: Condition) -> Tensor:
        """Take the steps of some times of the schedule; latents in, latents out."""
        for time in times:
            latents = self.step(latents, time, text, empty)[0]
        return latents

    def step(self, latents: Tensor, time: Tensor, text: Condition, empty: Condition) -> tuple[Tensor, Tensor]:
        """One step: the next latents and the predicted clean latents."""
        return self.denoiser.step(self.predict(latents, time, text, empty), time, latents)

    def rollout(
        self,
        steps: int,
        target: int,
        truncated: int,
        text: Condition,
        empty: Condition,
        draws: torch.Generator,
    ) -> Tensor:
        """Predicted clean latents at step `target` of `steps`, with gradient through the last `truncated`
        steps.

        Args:
            steps: Length of the schedule.
            target: Index of the step whose prediction is returned, 0 .. steps - 1.
            truncated: Steps with gradient, `target` among them.
            text: A text for each latent, with gradient.
            empty: The empty prompt, with gradient.
            draws: Generator of the noise, on the CPU.

        Returns:
            (batch, c, h, w).
        """
        first = max(0, target + 1 - truncated)
        times = self.denoiser.schedule(steps)
        with torch.no_grad():
            latents = self.noise(len(text), draws)
            latents = self.run(latents, times[:first], text.detach(), empty.detach())
        latents = self.run(latents, times[first:target], text, empty)
        return self.step(latents, times[target], text, empty)[1]

"""Flow matching, as transformers are trained in every host: noise, velocity, a fixed shift of times."""

from __future__ import annotations

import torch
from torch import Tensor


class FlowMatching:
    """What is the same of every such `Denoiser`; times are shares of noise."""

    @property
    def fixed_shift(self) -> float:
        """How far times are shifted towards noise; 1 where that depends on the size of what is drawn."""
        raise NotImplementedError

    def random_times(self, count: int, draws: torch.Generator) -> Tensor:
        """Shares of noise as models are trained: all equally likely before the fixed shift."""
        return self._shifted(torch.rand(count, generator=draws))

    def times_at(self, shares: Tensor) -> Tensor:
        """Shares of noise at shares of the schedule."""
        return self._shifted(shares.float())

    def _shifted(self, times: Tensor) -> Tensor:
        return self.fixed_shift * times / (1 + (self.fixed_shift - 1) * times)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Denoiser.noisy`."""
        share = times.to(latents).view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity from the picture to the noise."""
        return noise - latents

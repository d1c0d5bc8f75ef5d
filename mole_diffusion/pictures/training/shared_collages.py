"""Collages for shared gates: the network looks at the words first, as it does while a layout forms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.training.collage_objective import CollageObjective
from mole_diffusion.pictures.training.denoising import NoisyBatch, Times

# Share of the schedule at which it looks: the layout forms there, see `AutoSettings.until`.
_LOOK = 0.95


class SharedCollages(CollageObjective):
    """The denoising loss of collages where `mixture` shares the tokens out.

    All collages of a batch are at one time, as the pictures of a call are: one forward without gradient finds
    the places, one with gradient is learned from.

    Args:
        args: see `CollageObjective`.
        mixture: a `pictures.auto.AutoMixture`.
    """

    def __init__(self, *args: Any, mixture: Any) -> None:
        super().__init__(*args)
        self._mixture = mixture

    def _drawing(self, times: Times) -> Times:
        """The same time for all."""
        return lambda count, draws: times(1, draws).expand(count)

    def _composing(self) -> AbstractContextManager[Any]:
        """Anew in each iteration: nothing is known of the places of the last one."""
        return self._bench.composing(mixture=self._mixture)

    def _predict(self, batch: NoisyBatch, captions: Sequence[str]) -> Tensor:
        bench = self._bench
        text, _ = bench.encode_texts(captions)
        bench.denoiser.guided(bench.sampler.guidance)
        times = bench.denoiser.times_at(torch.tensor([_LOOK])).to(bench.device).expand(len(batch))
        with torch.no_grad():
            bench.counter.unet()
            bench.denoiser.predict(bench.denoiser.noisy(batch.latents, batch.noise, times), times, text)
        bench.counter.unet()
        return bench.denoiser.predict(batch.noisy, batch.times, text)

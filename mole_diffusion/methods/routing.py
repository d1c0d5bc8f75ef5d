"""LoRA-Switch and LoRA-Composite: one expert at a time in the UNet (Zhong et al. 2024, arXiv 2402.16843).

Both run the pipeline's own sampling loop; hooks on the UNet choose the expert. The text encoder runs once
per picture, as in the authors' code: with the first expert alone for Switch, and with all experts at weight 1
for Composite. Their code keeps an expert for five of 100-200 steps; here it changes at every step, so that
few steps are enough for all. The order is that of loading, or of `active_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.predictions import prediction_of, with_prediction
from mole_diffusion.pictures.choosing import Request, register
from mole_diffusion.pictures.components import networks_of

ROUTED = ("switch", "composite")


@dataclass(frozen=True)
class Routing:
    """Switch or Composite as what `pipe(prompt, mixture=word)` means.

    Attributes:
        word: "switch" or "composite".
    """

    word: str

    def engaged(self, pipe: Any, request: Request) -> AbstractContextManager[None]:
        """Let the pipeline's networks compute so inside the `with` block; see `routed`."""
        return routed(pipe, self.word, request)


@contextmanager
def routed(pipe: Any, mixture: str, request: Request) -> Iterator[None]:
    """Switch or Composite in every forward of the pipeline's networks inside the `with` block.

    Schedulers that evaluate the UNet twice a step (Heun, KDPM2) keep one expert for both. Forwards that
    somebody runs outside the sampling loop count as well.

    Args:
        pipe: the pipeline.
        mixture: "switch" or "composite".
        request: options of the call; all are honoured.

    Raises:
        NoExpertsError, UnknownExpertError, AllExpertsMaskedError, RegionMaskError: as for any mixture.
        ConfigError: the pipeline draws with a transformer.
    """
    if UNET not in networks_of(pipe):
        raise ConfigError(
            f"mixture={mixture!r} takes turns in the forwards of a UNet, and {type(pipe).__name__} draws "
            "with a transformer: train gates, or use mixture='nla'"
        )
    with pipe.composing(mixture="la", **request.arguments()):
        names = list(pipe.experts if request.active_experts is None else request.active_experts)
        mixtures: dict[str, Mixture] = dict(pipe.mixtures)
        unet = mixtures.pop(UNET, None)
        if mixture == "switch":
            for encoder in mixtures.values():
                encoder.activate(names[:1], expert_scales=request.expert_scales, weights={names[0]: 1.0})
        if unet is None:
            yield
            return

        def choose(index: int) -> None:
            name = names[index % len(names)]
            unet.activate(
                [name],
                expert_scales=request.expert_scales,
                region_masks=request.region_masks,
                latent_size=request.latent_size,
                weights={name: 1.0},
            )

        network = networks_of(pipe)[UNET]
        handles = (
            _switching(network, choose, lambda: int(getattr(pipe.scheduler, "order", 1)))
            if mixture == "switch"
            else _averaging(network, choose, len(names))
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _switching(
    network: torch.nn.Module, choose: Callable[[int], None], order: Callable[[], int]
) -> Sequence[Any]:
    """The next expert before every step."""
    count = 0

    def before(*_: Any) -> None:
        nonlocal count
        choose(count // order())
        count += 1

    # First of all: the mixture's own hook begins a forward with what is active then.
    return [network.register_forward_pre_hook(before, prepend=True)]


def _averaging(network: torch.nn.Module, choose: Callable[[int], None], experts: int) -> Sequence[Any]:
    """One pass per expert in place of one; the mean of the predictions of either guidance branch.

    Guidance is linear, so this is the mean of the guided predictions.
    """
    inside = False

    def before(*_: Any) -> None:
        if not inside:
            choose(0)

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            total = prediction_of(output)
            for index in range(1, experts):
                choose(index)
                total = total + prediction_of(module(*args, **kwargs))
        finally:
            inside = False
        return with_prediction(output, total / experts)

    return [
        network.register_forward_pre_hook(before, prepend=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]


for _word in ROUTED:
    register(_word, Routing(_word))

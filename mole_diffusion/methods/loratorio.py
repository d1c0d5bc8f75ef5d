"""LoRAtorio: patches of the experts' predictions, weighed by how far each is from the base's.

Foteinopoulou et al. 2025 (arXiv 2508.11624), written from its abstract; patch and temperature are this
package's. An expert that has something to say of a place departs from the base there. N + 1 passes per
forward in place of one. The text encoder runs with all experts at weight 1, as for Composite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.predictions import prediction_of, with_prediction
from mole_diffusion.pictures.choosing import Request, register
from mole_diffusion.pictures.components import networks_of

LORATORIO = "loratorio"


@dataclass(frozen=True)
class LoRAtorio:
    """As what `pipe(prompt, mixture=...)` means.

    Attributes:
        patch: side of the patches, in latent pixels.
        temperature: of the softmin over the cosines, which lie close together.
    """

    patch: int = 2
    temperature: float = 0.05

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Raises:
            NoExpertsError, UnknownExpertError, AllExpertsMaskedError, RegionMaskError: as for any mixture.
            ConfigError: the denoiser is no UNet.
        """
        with pipe.composing(mixture="la", **request.arguments()):
            unet: Mixture | None = pipe.mixtures.get("unet")
            if unet is None:
                raise ConfigError("mixture='loratorio' needs experts that change a UNet")
            names = list(pipe.experts if request.active_experts is None else request.active_experts)
            handles = self._hooks(pipe, unet, names, request)
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                unet.enable()

    def _hooks(self, pipe: Any, unet: Mixture, names: Sequence[str], request: Request) -> Sequence[Any]:
        network, inside = networks_of(pipe)["unet"], False

        def before(*_: Any) -> None:
            if not inside:
                unet.disable()  # the base

        def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            nonlocal inside
            if inside:
                return None
            inside = True
            unet.enable()
            try:
                base, own = prediction_of(output), []
                for name in names:
                    unet.activate(
                        [name],
                        expert_scales=request.expert_scales,
                        region_masks=request.region_masks,
                        latent_size=request.latent_size,
                        weights={name: 1.0},
                    )
                    own.append(prediction_of(module(*args, **kwargs)))
            finally:
                inside = False
            mixed = self.mixed(base, torch.stack(own))
            if getattr(pipe, "do_classifier_free_guidance", False):
                half = len(base) // 2  # the negative prompt's comes first
                mixed = torch.cat([(mixed[:half] + base[:half]) / 2, mixed[half:]])
            return with_prediction(output, mixed)

        return [
            network.register_forward_pre_hook(before, prepend=True),
            network.register_forward_hook(after, with_kwargs=True),
        ]

    def mixed(self, base: Tensor, own: Tensor) -> Tensor:
        """The experts' predictions, each weighed in each patch by its distance from the base's.

        Args:
            base: (B, C, H, W).
            own: (N, B, C, H, W).
        Returns:
            (B, C, H, W).
        """
        height, width = base.shape[-2:]
        cosines = torch.stack([self._cosine(base, one) for one in own.float()])
        weights = torch.softmax(-cosines / self.temperature, dim=0)
        full = [F.interpolate(one, scale_factor=self.patch)[..., :height, :width] for one in weights]
        return torch.stack([w * one for w, one in zip(full, own.float(), strict=True)]).sum(0).to(base.dtype)

    def _cosine(self, base: Tensor, one: Tensor) -> Tensor:
        """(B, 1, h, w) cosine of each patch; those at the lower and right edge may be smaller."""

        def summed(values: Tensor) -> Tensor:
            total = values.sum(1, keepdim=True)
            return F.avg_pool2d(total, self.patch, ceil_mode=True, count_include_pad=False)

        base = base.float()
        lengths = summed(base * base).sqrt() * summed(one * one).sqrt()
        return summed(base * one) / lengths.clamp_min(1e-12)


register(LORATORIO, LoRAtorio())

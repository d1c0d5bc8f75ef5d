"""What generators do to pictures: codec and noise, one prediction from a noisy state, blur, wrong colours."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import base
from .scenes import Dice
from .workshop import Workshop


class Softener:
    """Degrades pictures with the starter's own codec and base."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.noise = base.Noise(shop.device)

    @cached_property
    def _networks(self) -> tuple[Any, Any]:
        unet, encoder = base.load_unet(self.shop.out), base.load_text_encoder(self.shop.out)
        unet.requires_grad_(False).to(self.shop.device, memory_format=torch.channels_last)
        return unet, encoder.requires_grad_(False).to(self.shop.device)

    @torch.no_grad()
    def generated(self, pictures: Tensor, ids: Tensor, dice: Dice, style: Tensor) -> Tensor:
        """A third passes the codec with noisy latents, a third the base from a half noisy state.

        Args:
            pictures: (N, 3, H, W) in 0..1.
            ids: captions for the base, (N, tokens).
            style: `Placed.style`; what is in a style, which the base does not know, passes the codec at most.
        """
        unet, encoder = self._networks
        count = len(pictures)
        latents = self.shop.encode(pictures)
        shaken = latents + dice.normal(*latents.shape) * dice.uniform(count, 1, 1, 1) * 0.4
        timesteps = 40 + dice.below(420, count)
        noisy, _ = self.noise.add(latents, dice.normal(*latents.shape), timesteps)
        with self.shop.mixed_precision():
            predicted = unet(noisy, timesteps, encoder(ids)[0]).sample.float()
        guessed = self.noise.clean(noisy, predicted, timesteps)
        lot = dice.uniform(count, 1, 1, 1)
        lot = torch.where(style.view(-1, 1, 1, 1) > 0, lot / 3 + (lot > 0.5), lot)
        made = self.shop.decode(torch.where(lot < 1 / 3, shaken, guessed))
        return torch.where(lot > 2 / 3, pictures, made)

    @staticmethod
    def worn(pictures: Tensor, dice: Dice) -> Tensor:
        """Half of the pictures blurred by up to two pixels, all with a small change of colour; in -1..1."""
        count, _, height, width = pictures.shape
        sigma = (dice.uniform(count, 1) * 4 - 2).clamp(min=0.05)
        offsets = torch.arange(-5, 6, device=pictures.device)
        kernel = torch.exp(-offsets.square() / (2 * sigma.square()))
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
        flat = F.pad(pictures.reshape(1, count * 3, height, width), (5, 5, 5, 5), mode="replicate")
        flat = F.conv2d(flat, kernel[..., None, :], groups=count * 3)
        flat = F.conv2d(flat, kernel[..., None], groups=count * 3)
        gain = 0.92 + 0.16 * dice.uniform(count, 3, 1, 1)
        lift = 0.08 * (dice.uniform(count, 1, 1, 1) * 2 - 1)
        out = (flat.view(count, 3, height, width) * 2 - 1) * gain + lift
        return out.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def stored(pictures: Tensor) -> Tensor:
    """Bytes of pictures in 0..1, for pools."""
    return (pictures * 255).round().to(torch.uint8)


def restored(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 of their bytes."""
    return pictures.float() / 255

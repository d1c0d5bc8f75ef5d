"""What all objectives share: networks, random draws, sampling and the pass counter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mole_diffusion.pictures.denoiser import Condition, Denoiser
from mole_diffusion.pictures.denoisers.autoencoder import SmallDecoder
from mole_diffusion.pictures.training.denoising import NoisyBatch
from mole_diffusion.pictures.training.rollout import PassCounter, Sampler
from mole_diffusion.pictures.training.tasks import Pictures

#: Guidance where neither the settings nor the pipeline say.
_GUIDANCE = 5.0


class Draws:
    """The trainer's own generators, torch's and Python's; global ones stay untouched."""

    def __init__(self, seed: int) -> None:
        self.tensors = torch.Generator().manual_seed(seed)
        self.choices = random.Random(seed)

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"tensors": self.tensors.get_state(), "choices": self.choices.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.tensors.set_state(state["tensors"])
        version, numbers, gauss = state["choices"]
        self.choices.setstate((version, tuple(numbers), gauss))


class Composing(Protocol):
    """Chooses which experts count inside a `with` block."""

    def __call__(
        self, *, active_experts: Sequence[str] | None = None, mixture: Any = "gates"
    ) -> AbstractContextManager[None]:
        """All, some or (`mixture="none"`) none; see `composing` of the pipelines."""


@dataclass
class Workbench:
    """Everything an objective needs.

    Args:
        denoiser: The model, with experts.
        composing: Chooses which of them count.
        settings: How pictures are drawn.
        seed: Seed of everything that is drawn.
        small_decoder: Folder or hub id of an `AutoencoderTiny` that decodes for CLIP; None for its own.

    Raises:
        TrainingError: the model cannot be trained with.
    """

    denoiser: Denoiser
    composing: Composing
    settings: Pictures
    seed: int
    small_decoder: str | None = None
    draws: Draws = field(init=False)
    counter: PassCounter = field(default_factory=PassCounter)
    sampler: Sampler = field(init=False)
    _decoder: SmallDecoder | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.denoiser.check_trainable()
        self.draws = Draws(self.seed)
        given = self.settings.guidance
        guidance = _GUIDANCE if given is None else given
        self.sampler = Sampler(self.denoiser, guidance, self.counter, self.settings.guidance_rescale or 0.0)
        if self.small_decoder is not None:
            self._decoder = SmallDecoder(self.small_decoder, self.device)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.denoiser.device

    @property
    def networks(self) -> list[nn.Module]:
        """Every network that takes part."""
        own = list(self.denoiser.networks.values())
        return own if self._decoder is None else [*own, self._decoder.network]

    @contextmanager
    def training(self, *, decodes: bool) -> Iterator[None]:
        """The networks as training needs them, see `Denoiser.training`."""
        wanted, small = self.settings.gradient_checkpointing, self._decoder
        with ExitStack() as stack:
            own = decodes and small is None
            stack.enter_context(self.denoiser.training(checkpointing=wanted, decodes=own))
            if small is not None:
                stack.enter_context(small.training(checkpointing=wanted and decodes))
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for the frozen networks, where asked for."""
        if not self.settings.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def encode_texts(self, texts: Sequence[str]) -> tuple[Condition, Condition]:
        """The texts, and the empty prompt alone, encoded in one pass, with gradient.

        Equal texts are encoded once.
        """
        unique = list(dict.fromkeys(["", *texts]))
        encoded = self.denoiser.encode_texts(unique)
        return encoded[[unique.index(text) for text in texts]], encoded[:1]

    def predict(self, batch: NoisyBatch, texts: Sequence[str]) -> Tensor:
        """What the network says of a noisy batch with these texts, with gradient."""
        text, _ = self.encode_texts(texts)
        self.counter.unet()
        # One pass; networks that read guidance are trained at the value that is drawn with.
        self.denoiser.guided(self.sampler.guidance)
        return self.denoiser.predict(batch.noisy, batch.times, text)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in 0..1 from latents, with gradient, for CLIP."""
        self.counter.decoded += 1
        return (self._decoder or self.denoiser).decode(latents)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents (batch, c, h, w), float32, of pictures (batch, 3, H, W) in 0..1; no gradient."""
        with self.autocast():
            return self.denoiser.encode(pictures)

    @torch.no_grad()
    def draw(self, texts: Sequence[str], draws: torch.Generator, **composition: Any) -> Tensor:
        """Draw one picture per text: (len(texts), 3, H, W) in 0..1, in steps of 1/255 so that it survives a
        file.

        Args:
            texts: The prompts.
            draws: Generator of the noise.
            composition: Which experts count, as for `composing`.
        """
        times = self.denoiser.schedule(self.settings.sampling_steps)
        latents = self.sampler.noise(len(texts), draws)
        with self.autocast():
            with self.composing(**composition):
                latents = self.sampler.run(latents, times, *self.encode_texts(texts))
            pictures = self.denoiser.decode(latents)
        return (pictures * 255).round().cpu() / 255


def picture_tensor(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A PIL picture as (3, H, W) in 0..1, scaled to cover `size` and cropped to its centre."""
    height, width = size
    picture = picture.convert("RGB")
    scale = max(height / picture.height, width / picture.width)
    scaled = picture.resize(
        (max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    pixels = np.asarray(scaled.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def tensor_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 as a PIL picture."""
    return Image.fromarray((pixels.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())

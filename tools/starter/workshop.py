"""What the steps of the build share: device, stage, and pools of scenes that are used several times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .captions import Captions
from .loop import Batch
from .scenes import Dice, Director
from .stage import HUES, Stage


@dataclass
class Workshop:
    """One run of the build.

    Attributes:
        work: folder for checkpoints.
        out: the starter's folder.
        device: where everything is drawn and trained.
        scale: share of the steps that are taken; 1 is the starter, less is a trial.
        graph: capture CUDA graphs.
        hues: turns of hue the stage keeps.
    """

    work: Path
    out: Path
    device: torch.device
    scale: float = 1.0
    graph: bool = True
    hues: int = HUES

    def steps(self, count: int) -> int:
        """So many steps of `count` are taken."""
        return max(4, round(count * self.scale))

    def amount(self, count: int) -> int:
        """So many of `count` examples of a batch or chunks of a pool are taken; trials take fewer."""
        return count if self.scale >= 1 else max(4, round(count * min(1.0, self.scale * 4)))

    @cached_property
    def stage(self) -> Stage:
        """Drawings and backgrounds."""
        return Stage(self.device, self.hues)

    @cached_property
    def director(self) -> Director:
        """Random scenes."""
        return Director(self.stage)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The starter's tokenizer."""
        return CLIPTokenizer.from_pretrained(self.out / "tokenizer")

    @cached_property
    def captions(self) -> Captions:
        """Captions in tokens."""
        return Captions(self.tokenizer, self.device)

    @cached_property
    def codec(self) -> AutoencoderTiny:
        """The finished codec, frozen."""
        return load_codec(self.out, self.device)

    def dice(self, *seed: int) -> Dice:
        """Random numbers from a seed."""
        return Dice(self.device, *seed)

    def mixed_precision(self) -> torch.autocast:
        """bfloat16 where it is safe; without the cache of cast weights, which graphs do not allow."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents as the network sees them, of pictures (N, 3, H, W) in 0..1."""
        with torch.no_grad(), self.mixed_precision():
            latents = self.codec.encode((pictures * 2 - 1).to(memory_format=torch.channels_last)).latents
        return latents.float() * self.codec.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in 0..1 of latents as the network sees them."""
        with torch.no_grad(), self.mixed_precision():
            made = self.codec.decode(latents / self.codec.config.scaling_factor).sample
        return (made.float() / 2 + 0.5).clamp(0, 1)


def load_codec(out: Path, device: torch.device) -> AutoencoderTiny:
    """The codec of the starter in `out`, frozen, in single precision."""
    codec = AutoencoderTiny.from_pretrained(out / "vae", torch_dtype=torch.float32)
    return codec.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def save_half(network: nn.Module, path: Path) -> None:
    """Write a network's weights in half precision as safetensors."""
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in weights.items()}, path)


class Pool:
    """Rows made by `make(number, count)`, replaced in turn, so that each is used several times.

    What it holds at a step follows from the step's number alone as long as the pool is filled from the start;
    a resumed run fills it anew with the rows of its step.

    Args:
        make: rows of chunk `number`.
        chunk: rows made at once.
        chunks: chunks that are held.
        every: a chunk is replaced in every so manyth step.
    """

    def __init__(self, make: Callable[[int, int], Batch], chunk: int, chunks: int, every: int = 1) -> None:
        self.make, self.chunk, self.chunks, self.every = make, chunk, chunks, every
        self.newest = -1
        self.rows: Batch = {}

    def _put(self, number: int) -> None:
        fresh = self.make(number, self.chunk)
        if not self.rows:
            self.rows = {
                name: torch.empty(
                    (self.chunk * self.chunks, *value.shape[1:]), dtype=value.dtype, device=value.device
                )
                for name, value in fresh.items()
            }
        first = number % self.chunks * self.chunk
        for name, value in fresh.items():
            self.rows[name][first : first + self.chunk] = value

    def sample(self, step: int, batch: int, dice: Dice) -> Batch:
        """`batch` random rows for one step."""
        wanted = self.chunks - 1 + step // self.every
        for number in range(max(self.newest + 1, wanted - self.chunks + 1), wanted + 1):
            self._put(number)
        self.newest = wanted
        picks = dice.below(self.chunk * self.chunks, batch)
        return {name: value[picks] for name, value in self.rows.items()}

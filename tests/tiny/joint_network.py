"""A small denoiser that is none of ours: text and image in one sequence, fused projections, modulation.

Text first, padded, with a mask; rows of modulation run before anything else of their block, as (B, 1, d); the
time is 1 for a clean picture and 0 for noise. One block keeps the streams apart, the others join them.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 16, 4, 12, 6
HEADS = 2


class Projections(nn.Module):
    """q, k and v of one tensor: one Linear, or three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in "qkv")
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.qkv(x).chunk(3, dim=-1)
            if hasattr(self, "qkv")
            else (self.to_q(x), self.to_k(x), self.to_v(x))
        )


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """(B, L, d) attention to the keys (B, L) that are no padding."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, keys[:, None, None]).transpose(1, 2).flatten(2)


def modulate(x: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale)


class ApartBlock(nn.Module):
    """Image and text have matrices of their own and attend to each other; the text's run first."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.image, self.text = Projections(fused), Projections(fused)
        self.image_mlp, self.text_mlp = FeedForward(), FeedForward()

    def forward(self, image: Tensor, text: Tensor, time: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scales = self.modulation(F.silu(time)).chunk(4, dim=-1)
        ours, theirs = self.text(modulate(text, scales[0])), self.image(modulate(image, scales[1]))
        mixed = attend(*(torch.cat(pair, dim=1) for pair in zip(ours, theirs, strict=True)), keys)
        text = text + self.text.out(mixed[:, : text.shape[1]])
        image = image + self.image.out(mixed[:, text.shape[1] :])
        text = text + self.text_mlp(modulate(text, scales[2]))
        return text, image + self.image_mlp(modulate(image, scales[3]))


class JoinedBlock(nn.Module):
    """Image and text tokens run through the same matrices in one sequence, first through a wide one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.attn = Projections(fused)

    def forward(self, x: Tensor, time: Tensor, keys: Tensor) -> Tensor:
        read = modulate(x, self.modulation(F.silu(time)))
        wide = F.gelu(self.wide(read))
        return x + self.attn.out(attend(*self.attn(read), keys)) + self.narrow(wide)


class JointNetwork(nn.Module):
    """See the file.

    Args:
        fused: whether q, k and v are one Linear each; the parted form has the same weights.
    """

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.time_in = nn.Linear(8, WIDTH)
        self.image_in = nn.Linear(4 * CHANNELS, WIDTH)
        self.text_in = nn.Linear(TEXT_WIDTH, WIDTH)
        self.apart = nn.ModuleList([ApartBlock(fused)])
        self.joined = nn.ModuleList(JoinedBlock(fused) for _ in range(2))
        self.modulation_out = nn.Linear(WIDTH, WIDTH)
        self.image_out = nn.Linear(WIDTH, 4 * CHANNELS)

    def forward(self, latent: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Latent (B, 4, H, W), time (B,), text (B, T, 12) with its mask (B, T) -> (B, 4, H, W)."""
        waves = torch.arange(8, device=time.device)
        row = self.time_in(torch.cos(time.float()[:, None] * waves).to(latent.dtype))
        image = self.image_in(F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2))
        keys = torch.cat([mask.bool(), torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
        text = self.text_in(text)
        for block in self.apart:
            text, image = block(image, text, row.unsqueeze(1), keys)
        x = torch.cat([text, image], dim=1)
        for block in self.joined:
            x = block(x, row.unsqueeze(1), keys)
        image = modulate(x[:, text.shape[1] :], self.modulation_out(F.silu(row)).unsqueeze(1))
        pixels = self.image_out(image).transpose(1, 2).unflatten(2, (latent.shape[2] // 2, -1))
        return F.pixel_shuffle(pixels, 2)


def parted(network: JointNetwork) -> JointNetwork:
    """The same network with a Linear each for q, k and v."""
    twin = JointNetwork(fused=False).to(next(network.parameters()).dtype)
    state = {}
    for key, value in copy.deepcopy(network.state_dict()).items():
        if ".qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {key.replace(".qkv.", f".to_{x}."): part for x, part in parts}
        else:
            state[key] = value
    twin.load_state_dict(state)
    return twin.train(network.training)

"""Toy networks under the names of the real hosts, in both flavours.

AUTOMATIC1111: plain `nn.Linear`. Forge: a Linear that is no `nn.Linear`, parameters that are inference
tensors, blocks that change their input in place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TEXT, TOKENS = 16, 12, 6


class ForgeLinear(nn.Module):
    """Not an `nn.Linear`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CrossAttention(nn.Module):
    def __init__(self, linear: Any, width: int, context: int) -> None:
        super().__init__()
        self.to_q = linear(width, width, bias=False)
        self.to_k = linear(context, width, bias=False)
        self.to_v = linear(context, width, bias=False)
        self.to_out = nn.Sequential(linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(F.scaled_dot_product_attention(q, k, v))


class GEGLU(nn.Module):
    def __init__(self, linear: Any, width: int) -> None:
        super().__init__()
        self.proj = linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, linear: Any, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(linear, width), nn.Dropout(0.0), linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    in_place = False

    def __init__(self, linear: Any, width: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(linear, width, width), CrossAttention(linear, width, TEXT)
        self.ff = FeedForward(linear, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.in_place:
            x += self.attn1(self.norm1(x))
            x += self.attn2(self.norm2(x), context)
            x += self.ff(self.norm3(x))
            return x
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, linear: Any, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(linear, width)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


class ResBlock(nn.Module):
    def __init__(self, linear: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(WIDTH, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Entry(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return super().forward(x)


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb, context)
        return x


class UNetModel(nn.Module):
    """LDM's UNet with two levels, one residual block each."""

    def __init__(self, linear: Any = nn.Linear, width: int = 16) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(linear(8, WIDTH), nn.SiLU(), linear(WIDTH, WIDTH))
        row, wide = TimestepEmbedSequential, 2 * width
        self.input_blocks = nn.ModuleList(
            [
                row(Entry(4, width, 3, padding=1)),
                row(ResBlock(linear, width, width), SpatialTransformer(linear, width)),
                row(Downsample(width)),
                row(ResBlock(linear, width, wide)),
            ]
        )
        self.middle_block = row(
            ResBlock(linear, wide, wide), SpatialTransformer(linear, wide), ResBlock(linear, wide, wide)
        )
        self.output_blocks = nn.ModuleList(
            [
                row(ResBlock(linear, 2 * wide, wide)),
                row(ResBlock(linear, wide + width, wide), Upsample(wide)),
                row(ResBlock(linear, wide + width, width), SpatialTransformer(linear, width)),
                row(ResBlock(linear, 2 * width, width), SpatialTransformer(linear, width)),
            ]
        )
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        angles = timesteps[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        emb = self.time_embed(torch.cat([angles.sin(), angles.cos()], dim=-1))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            # Forge's blocks change their input in place; the skip keeps its own copy there too.
            skips.append(x.clone())
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


class CLIPAttention(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (linear(TEXT, TEXT) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class CLIPLayer(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(linear)
        self.mlp = nn.ModuleDict({"fc1": linear(TEXT, 24), "fc2": linear(24, TEXT)})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(TEXT), nn.LayerNorm(TEXT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPTextModel(nn.Module):
    """The part of transformers' class that experts see."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.text_model = CLIPTextTransformer(linear)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)


class CLIPTextTransformer(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, TEXT)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPLayer(linear) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class OpenCLIP(nn.Module):
    """An encoder that computes q, k and v with one parameter: nothing for experts to be attached to."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.transformer = nn.Module()
        self.model.transformer.resblocks = nn.ModuleList([nn.MultiheadAttention(TEXT, 1, batch_first=True)])
        self.embedding = nn.Embedding(256, TEXT)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x + self.model.transformer.resblocks[0](x, x, x, need_weights=False)[0]


def _encode(encoder: nn.Module, texts: list[str]) -> Tensor:
    ids = torch.tensor([[ord(char) % 256 for char in text.ljust(TOKENS)[:TOKENS]] for text in texts])
    return encoder(ids)


class A1111Model(nn.Module):
    """`sd_model` of AUTOMATIC1111: the text encoder in a wrapper."""

    conditional_first = True

    def __init__(self, seed: int, *, encoder: str = "clip", width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(width=width).eval()
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.wrapped = OpenCLIP() if encoder == "open_clip" else nn.Module()
        if encoder == "clip":
            self.cond_stage_model.wrapped.transformer = CLIPTextModel(nn.Linear)
        self.requires_grad_(False)

    @property
    def unet(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def encoder(self) -> nn.Module:
        wrapped = self.cond_stage_model.wrapped
        return getattr(wrapped, "transformer", wrapped)

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        return _encode(self.encoder, texts)

    def new_batch(self) -> None:
        """Nothing changes between batches."""


class ForgeModel:
    """`sd_model` of Forge: patchers that are made anew for every batch, around modules that stay."""

    conditional_first = False

    def __init__(self, seed: int, *, encoder: str = "clip", width: int = 16) -> None:
        torch.manual_seed(seed)
        with torch.inference_mode():
            self._unet = UNetModel(ForgeLinear, width).eval().requires_grad_(False)
            for module in self._unet.modules():
                if isinstance(module, BasicTransformerBlock):
                    module.in_place = True
            self._model = nn.Module()
            self._model.diffusion_model = self._unet
            self._model.lora_loader = SimpleNamespace(backup={})
            self._clip = nn.Module()
            self._clip.clip_l = nn.Module()
            self._clip.clip_l.transformer = CLIPTextModel(ForgeLinear).requires_grad_(False)
        self.new_batch()

    def new_batch(self) -> None:
        self.forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=self._model),
            clip=SimpleNamespace(cond_stage_model=self._clip),
        )

    @property
    def unet(self) -> nn.Module:
        return self._unet

    @property
    def encoder(self) -> nn.Module:
        return self._clip.clip_l.transformer

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        return _encode(self.encoder, texts)


FLAVOURS = {"a1111": A1111Model, "forge": ForgeModel}

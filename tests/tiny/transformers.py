"""Tiny denoising transformers of diffusers with random weights, none of them zero, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from .copying import clone

BLOCKS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
SD3_BLOCKS: dict[str, Any] = {
    "patch_size": 2,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
# Two texts, as long as pipelines pad them; Chroma's network is told where they end.
TEXT = 512
LENGTHS = (512, 200)


def filled(network: nn.Module, seed: int = 4) -> nn.Module:
    """The network with noise on its weights: some of diffusers' start at zero, or at one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return network.eval()


def make_flux(**settings: Any) -> FluxTransformer2DModel:
    torch.manual_seed(5)
    given = {**BLOCKS, "pooled_projection_dim": 24, "guidance_embeds": True, **settings}
    return filled(FluxTransformer2DModel(**given))


def make_chroma(**settings: Any) -> ChromaTransformer2DModel:
    torch.manual_seed(6)
    approximator = {
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return filled(ChromaTransformer2DModel(**BLOCKS, **approximator, **settings))


def make_sd3(**settings: Any) -> SD3Transformer2DModel:
    """As 3.5 medium: the first blocks attend to the image alone too, the last one ends the text."""
    torch.manual_seed(7)
    given = {**SD3_BLOCKS, "sample_size": 16, "in_channels": 4, "out_channels": 4, **settings}
    return filled(SD3Transformer2DModel(**given))


def sd3_inputs(size: int = 8, text: int = 333) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 4, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(2, text, 32, generator=generator),
        "pooled_projections": torch.randn(2, 24, generator=generator),
        "timestep": torch.tensor([500.0, 250.0]),
    }


def make_flux2(**settings: Any) -> Flux2Transformer2DModel:
    torch.manual_seed(9)
    given = {**BLOCKS, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32, **settings}
    return filled(Flux2Transformer2DModel(**given))


def flux2_inputs(size: int = 8, text: int = TEXT) -> dict[str, Tensor]:
    """Latents are packed outside: a token for each of their pixels."""
    told = packed(size, text, patch=1)
    del told["pooled_projections"]
    words = torch.zeros(text, 4)
    words[:, 3] = torch.arange(text)
    return {**told, "img_ids": torch.nn.functional.pad(told["img_ids"], (0, 1)), "txt_ids": words}


def make_qwen_image(**settings: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(10)
    given = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        **settings,
    }
    return filled(QwenImageTransformer2DModel(**given))


def qwen_image_inputs(size: int = 8, lengths: tuple[int, ...] = (12, 5)) -> dict[str, Any]:
    """The second text is shorter, and padded."""
    told, text = packed(size, max(lengths)), max(lengths)
    kept = torch.arange(text) < torch.tensor(lengths)[:, None]
    return {
        **{name: told[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")},
        "encoder_hidden_states_mask": kept,
        "img_shapes": [[(1, size // 2, size // 2)] for _ in lengths],
    }


def make_krea2(**settings: Any) -> Krea2Transformer2DModel:
    torch.manual_seed(11)
    given = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 4, 8),
        **settings,
    }
    return filled(Krea2Transformer2DModel(**given))


def krea2_inputs(size: int = 8, lengths: tuple[int, ...] = (12, 5)) -> dict[str, Any]:
    """What three layers say of each word; the second text is shorter, and padded."""
    told, text = packed(size), max(lengths)
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": told["hidden_states"],
        "encoder_hidden_states": torch.randn(2, text, 3, 16, generator=generator),
        "timestep": told["timestep"],
        "position_ids": torch.cat([torch.zeros(text, 3), told["img_ids"]]),
        "encoder_attention_mask": torch.arange(text) < torch.tensor(lengths)[:, None],
    }


def make_anima(**settings: Any) -> CosmosTransformer3DModel:
    torch.manual_seed(12)
    given = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 24,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
        **settings,
    }
    return filled(CosmosTransformer3DModel(**given))


def anima_inputs(size: int = 8, text: int = TEXT) -> dict[str, Tensor]:
    """Videos of one frame; the mask says which of their pixels are padding: none, for both."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 4, 1, size, size, generator=generator),
        "timestep": torch.tensor([0.5, 0.25]),
        "encoder_hidden_states": torch.randn(2, text, 24, generator=generator),
        "padding_mask": torch.zeros(1, 1, size, size),
    }


def make_z_image(**settings: Any) -> ZImageTransformer2DModel:
    torch.manual_seed(8)
    given = {
        "in_channels": 4,
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [8, 8, 8],
        "axes_lens": [256, 32, 32],
        **settings,
    }
    return filled(ZImageTransformer2DModel(**given))


def z_image_inputs(size: int = 8, lengths: tuple[int, ...] = (7, 40)) -> dict[str, Any]:
    """The texts are padded to 32 and 64 tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "x": [torch.randn(4, 1, size, size, generator=generator) for _ in lengths],
        # Times that bfloat16 has too, a thousand times as large.
        "t": torch.tensor([0.5, 0.25]),
        "cap_feats": [torch.randn(length, 32, generator=generator) for length in lengths],
    }


def places(rows: int, columns: int, picture: int = 0) -> Tensor:
    """(rows * columns, 3) ids of image tokens, row by row."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = picture
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return ids.reshape(-1, 3)


def packed(size: int, text: int = TEXT, patch: int = 2) -> dict[str, Tensor]:
    """What the FLUX family reads, of two pictures of (size, size) latents."""
    generator = torch.Generator().manual_seed(3)
    side = size // patch
    return {
        "hidden_states": torch.randn(2, side * side, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, text, 32, generator=generator),
        "pooled_projections": torch.randn(2, 24, generator=generator),
        # Times and guidance that bfloat16 has too, a thousand times as large.
        "timestep": torch.tensor([0.5, 0.25]),
        "guidance": torch.full((2,), 4.0),
        "img_ids": places(side, side),
        "txt_ids": torch.zeros(text, 3),
    }


def flux_inputs(size: int = 8, text: int = TEXT) -> dict[str, Tensor]:
    return packed(size, text)


def chroma_inputs(size: int = 8, text: int = TEXT, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """The second text is shorter, and padded."""
    told = packed(size, text)
    del told["pooled_projections"], told["guidance"]
    kept = torch.arange(text) < torch.tensor(lengths)[:, None]
    image = torch.ones(2, told["hidden_states"].shape[1], dtype=torch.bool)
    return {**told, "attention_mask": torch.cat([kept, image], dim=1)}


@dataclass(frozen=True)
class Kind:
    """A network of diffusers and what it reads.

    Attributes:
        make: a new one.
        inputs: of two pictures with a side of the latent.
        other: the network as another host has it, or None.
        flattens: whether texts have one length, which flattened gates need.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    other: Callable[[nn.Module], nn.Module] | None = None
    flattens: bool = True

    def run(self, network: nn.Module, batch: slice, size: int) -> Tensor:
        # Quantised weights are whole numbers.
        dtype = next(one.dtype for one in network.parameters() if one.is_floating_point())
        told = {
            name: value if name.endswith("ids") else _rows(value, batch, dtype)
            for name, value in self.inputs(size).items()
        }
        found = network(**told).sample
        return torch.stack(found) if isinstance(found, list) else found


def _rows(value: Any, batch: slice, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [one.to(dtype) if isinstance(one, Tensor) else one for one in value[batch]]
    value = value[batch] if len(value) > 1 else value  # else it is for all pictures
    return value.to(dtype) if value.is_floating_point() else value


def fused(network: nn.Module) -> nn.Module:
    """A copy whose attentions run q, k and v as one."""

    twin: Any = clone(network)
    twin.fuse_qkv_projections()
    return twin


KINDS: dict[type[nn.Module], Kind] = {
    FluxTransformer2DModel: Kind(make_flux, flux_inputs, fused),
    ChromaTransformer2DModel: Kind(make_chroma, chroma_inputs),
    Flux2Transformer2DModel: Kind(make_flux2, flux2_inputs),
    SD3Transformer2DModel: Kind(make_sd3, sd3_inputs),
    CosmosTransformer3DModel: Kind(make_anima, anima_inputs),
    Krea2Transformer2DModel: Kind(make_krea2, krea2_inputs, flattens=False),
    QwenImageTransformer2DModel: Kind(make_qwen_image, qwen_image_inputs, flattens=False),
    ZImageTransformer2DModel: Kind(make_z_image, z_image_inputs, flattens=False),
}

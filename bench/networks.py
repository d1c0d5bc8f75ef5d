"""Networks of known shapes with random weights, bare, with gated experts and with PEFT's adapters."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture, inject

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT_TOKENS = 77

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """What is run: UNet settings, side of the latents, width of the text.

    Attributes:
        name: what tables call it.
        unet: arguments of `UNet2DConditionModel`.
        side: height and width of the latents.
        text_width: features of the text's tokens.
        dtype: of the weights and inputs.
        conditions: what the network is told beside the text: name -> features.
    """

    name: str
    unet: dict[str, Any]
    side: int
    text_width: int
    dtype: torch.dtype
    conditions: dict[str, int] = field(default_factory=dict)


SD15 = Shape(
    name="SD 1.5",
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    side=64,
    text_width=768,
    dtype=torch.bfloat16,
)
SDXL = Shape(
    name="SDXL",
    unet={
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    side=128,
    text_width=2048,
    dtype=torch.bfloat16,
    conditions={"text_embeds": 1280, "time_ids": 6},
)
TINY = Shape(
    name="tiny SD 1.5",
    unet={
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    side=16,
    text_width=32,
    dtype=torch.bfloat16,
)
TINY_XL = Shape(
    name="tiny SDXL",
    unet={
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    side=16,
    text_width=32,
    dtype=torch.bfloat16,
    conditions={"text_embeds": 16, "time_ids": 6},
)


def make_unet(shape: Shape, device: torch.device | str = "cpu") -> UNet2DConditionModel:
    """A UNet of random weights, made where it will run."""
    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**shape.unet).to(shape.dtype).eval()


def inputs_of(
    shape: Shape, batch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random latents (batch, 4, side, side), text (batch, 77, width) and the network's other conditions."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator).to(device, shape.dtype)

    conditions = {name: random(features) for name, features in shape.conditions.items()}
    return random(4, shape.side, shape.side), random(TEXT_TOKENS, shape.text_width), conditions


def forward_of(network: nn.Module, shape: Shape, batch: int, device: torch.device | str = "cpu") -> Forward:
    """A step of the network on random inputs that are the same for every network of this shape."""
    latents, text, conditions = inputs_of(shape, batch, device)
    timestep = torch.tensor(500, device=device)  # a number would be copied there in every step
    added = {"added_cond_kwargs": conditions} if conditions else {}
    return lambda: network(latents, timestep, encoder_hidden_states=text, **added).sample


def share_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A second module tree on the same tensors: hooks and wrappers of one do not touch the other."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*unet.parameters(), *unet.buffers()]}
    return copy.deepcopy(unet, memo)


def add_adapters(unet: UNet2DConditionModel, names: Sequence[str]) -> None:
    """Unmerged PEFT adapters with random factors (seeded by their name's place), all active at weight 1/N."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    with unet.conv_in.weight.device, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for seed, name in enumerate(names):
            torch.manual_seed(100 + seed)
            unet.add_adapter(config, adapter_name=name)
    activate_adapters(unet, names)
    unet.to(unet.conv_in.weight.dtype)


def activate_adapters(unet: UNet2DConditionModel, names: Sequence[str]) -> None:
    """These adapters alone, each with weight 1/N."""
    unet.set_adapters(list(names), [1.0 / len(names)] * len(names))


def experts_of(unet: UNet2DConditionModel, names: Sequence[str]) -> list[Expert]:
    """The same adapters as experts; as from files, their factors are on the CPU."""
    return [
        Expert.from_state_dict(
            {
                f"unet.{key}": value.cpu()
                for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()
            },
            name=name,
            sha256=name,
        )
        for name in names
    ]


def gated(unet: UNet2DConditionModel, experts: Sequence[Expert], config: MoLEConfig) -> Mixture:
    """Inject, and give the gates random projections, so that they decide something, as trained ones do."""
    device = unet.conv_in.weight.device
    mixture = inject(unet, experts, config, part="unet").to(device)
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device))
    return mixture


def mean_spread(mixture: Mixture, forward: Forward) -> float:
    """Mean difference between the largest and the smallest gate weight; 0 means uniform gates."""
    forward()
    spreads = [float((w.amax(dim=-1) - w.amin(dim=-1)).mean()) for w in mixture.live_weights().values()]
    return statistics.mean(spreads)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|| ours - theirs || / || theirs ||."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())

"""Tiny real networks, random experts, PEFT as the oracle, and a UNet under LDM names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from mole_diffusion import Expert, Mixture
from mole_diffusion.core import networks

from .copying import clone
from .joint_network import CHANNELS, TEXT_TOKENS, TEXT_WIDTH, JointNetwork, parted
from .joint_table import JOINT_TABLE
from .transformers import KINDS

networks.register(JOINT_TABLE)

JOINT_TARGETS = (
    *("to_q", "to_k", "to_v", ".out", "fc1", "fc2", "wide", "narrow"),
    *("modulation", "modulation_out", "time_in", "image_in", "text_in", "image_out"),
)
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LATENT = 8
WIDTH = 16
TEXT = 77
CLIP_TEXT = 12
NAMES = ("dog", "cat", "boot", "clock", "vase", "robot")
#: Number, kind of network and its shapes -> experts.
_MADE: dict[tuple[object, ...], tuple[Expert, ...]] = {}


def make_unet(*, linear: bool = True, layers: int = 1) -> UNet2DConditionModel:
    """Two levels, `2 layers + 2` transformer blocks; `linear` as SD 2.x, else 1x1 convolutions as SD 1.x."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=layers,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=linear,
    ).eval()


def make_joint() -> JointNetwork:
    torch.manual_seed(4)
    return JointNetwork().eval()


def make_clip() -> CLIPTextModel:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return CLIPTextModel(config).eval()


def lora_state(network: nn.Module, rank: int, seed: int, leaves: Sequence[str] = ()) -> dict[str, Tensor]:
    """A LoRA that visibly changes the network: PEFT keys, canonical names, no prefix."""
    generator = torch.Generator().manual_seed(seed)
    targets = tuple(leaves) or {"unet": UNET_TARGETS, "text_encoder": CLIP_TARGETS}.get(
        part_of(network), JOINT_TARGETS
    )
    # Every matrix that a transformer of diffusers runs.
    sites = {site.name for site in networks.map_network(network).sites} if type(network) in KINDS else ()
    state = {}
    # Only the joint network goes by other names than the canonical ones; the others need no copy to be read.
    canonical = parted(network) if isinstance(network, JointNetwork) else network
    for name, module in canonical.named_modules():
        if name in sites if sites and not leaves else name.endswith(targets):
            out, fan_in, *kernel = module.weight.shape
            state[f"{name}.lora_A.weight"] = torch.randn(rank, fan_in, *kernel, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = (
                torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.2
            )
    return state


def states(count: int, network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Name -> LoRA, with ranks that differ."""
    return {NAMES[i]: lora_state(network, 2 + i % 3, 10 + i) for i in range(count)}


def to_experts(loras: Mapping[str, Mapping[str, Tensor]], part: str) -> list[Expert]:
    return [
        Expert.from_state_dict({f"{part}.{k}": v for k, v in state.items()}, name=name)
        for name, state in loras.items()
    ]


def make_experts(count: int, network: nn.Module) -> list[Expert]:
    """Experts are frozen: tests of networks alike share them, but for those that inference mode makes."""
    if torch.is_inference_mode_enabled():
        return to_experts(states(count, network), part_of(network))
    shapes = tuple((name, tuple(weight.shape)) for name, weight in network.named_parameters())
    key = (count, type(network), shapes)
    if key not in _MADE:
        _MADE[key] = tuple(to_experts(states(count, network), part_of(network)))
    return list(_MADE[key])


def part_of(network: nn.Module) -> str:
    if isinstance(network, JointNetwork) or type(network) in KINDS:
        return "transformer"
    return "text_encoder" if isinstance(network, CLIPTextModel) else "unet"


def twin(network: nn.Module) -> nn.Module:
    """A copy whose modules have the canonical names."""
    return parted(network) if isinstance(network, JointNetwork) else clone(network)


def run(network: nn.Module, *, batch: slice = slice(None), size: int = LATENT, grad: bool = False) -> Tensor:
    """One forward of a UNet (diffusers or LDM names) or a text encoder on two fixed inputs, as (B, ...)."""
    with torch.set_grad_enabled(grad):
        return _run(network, batch, size)


def _run(network: nn.Module, batch: slice, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(network, CLIPTextModel):
        ids = torch.randint(3, 64, (2, CLIP_TEXT), generator=generator)[batch]
        return network(ids).last_hidden_state
    if type(network) in KINDS:
        return KINDS[type(network)].run(network, batch, size)
    dtype = next(network.parameters()).dtype
    if isinstance(network, JointNetwork):
        latent = torch.randn(2, CHANNELS, size, size, generator=generator)[batch].to(dtype)
        text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator)[batch].to(dtype)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])[batch]
        return network(latent, torch.tensor([0.5, 0.3])[batch], text, mask)
    x = torch.randn(2, 4, size, size, generator=generator)[batch].to(dtype)
    text = torch.randn(2, TEXT, WIDTH, generator=generator)[batch].to(dtype)
    output = network(x, torch.tensor(500), text)
    return output if isinstance(output, Tensor) else output.sample


def with_peft(
    network: nn.Module,
    loras: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    alpha: float = 0,
) -> nn.Module:
    """The oracle: a copy of the network with the LoRAs attached by PEFT, each with its weight."""
    model = twin(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT remarks on every adapter after the first
        _add_adapters(model, loras, alpha)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(loras))
            for name, weight in weights.items():
                module.set_scale(name, weight)
    return model.eval()


def _add_adapters(model: nn.Module, loras: Mapping[str, Mapping[str, Tensor]], alpha: float) -> None:
    for name, state in loras.items():
        rank = next(v.shape[0] for k, v in state.items() if "lora_A" in k)
        modules = sorted({key.split(".lora_")[0] for key in state})
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=modules)
        inject_adapter_in_model(config, model, name)
        set_peft_model_state_dict(model, dict(state), adapter_name=name)


def randomise(mixture: Mixture, seed: int = 7) -> None:
    """As if trained: random projections, temperatures and strengths."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(mixture.gates.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("projection"):
                value.copy_(noise)
            else:
                value.add_(0.3 * noise)


def active_weights(mixture: Mixture, active: Sequence[int] = (0, 1, 2)) -> Tensor:
    """(M, B, n) weights of all gates in the last forward."""
    return torch.stack(list(mixture.live_weights().values()))[..., list(active)]


class LDMSequential(nn.Sequential):
    """`TimestepEmbedSequential` of LDM, around diffusers' modules."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResnetBlock2D):
                x = layer(x, emb)
            elif isinstance(layer, Transformer2DModel):
                x = layer(x, encoder_hidden_states=context, return_dict=False)[0]
            else:
                x = layer(x)
        return x


class LDMUNet(nn.Module):
    """A diffusers UNet's own modules under the names and in the arrangement of LDM's UNetModel."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        unet = clone(unet)
        self.time_proj, self.time_embed = unet.time_proj, unet.time_embedding
        rows = [LDMSequential(unet.conv_in)]
        for block in unet.down_blocks:
            rows += [LDMSequential(*layers) for layers in zip_layers(block)]
            rows += [LDMSequential(sampler) for sampler in block.downsamplers or []]
        self.input_blocks = nn.ModuleList(rows)
        middle = unet.mid_block
        self.middle_block = LDMSequential(middle.resnets[0], middle.attentions[0], middle.resnets[1])
        rows = []
        for block in unet.up_blocks:
            layers = zip_layers(block)
            layers[-1] += list(block.upsamplers or [])
            rows += [LDMSequential(*layer) for layer in layers]
        self.output_blocks = nn.ModuleList(rows)
        self.out = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(self.time_proj(timesteps.expand(x.shape[0])).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def zip_layers(block: nn.Module) -> list[list[nn.Module]]:
    """[[resnet, attention], ...] or [[resnet], ...] of a diffusers block."""
    attentions = getattr(block, "attentions", None)
    if attentions is None:
        return [[resnet] for resnet in block.resnets]
    return [[resnet, attention] for resnet, attention in zip(block.resnets, attentions, strict=True)]

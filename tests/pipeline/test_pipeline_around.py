"""ControlNet and IP-Adapter of diffusers around networks that carry experts."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from pipeline_helpers import CLOSE, build, train_a_little, with_adapters

from mole_diffusion import MoLEConfig, StableDiffusionXLMoLEPipeline

WHITE = Image.new("RGB", (32, 32), "white")
IMAGE_WIDTH, IMAGE_TOKENS = 12, 4


def controlled(cls: Any, pipe: Any, controlnet: ControlNetModel) -> Any:
    made = cls.from_pipe(pipe, controlnet=copy.deepcopy(controlnet))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("prefix", ["", "xl_"], ids=["sd", "xl"])
def test_controlnet_from_pipe(prefix, request, draw) -> None:
    ours, plain = request.getfixturevalue(f"{prefix}loaded"), request.getfixturevalue(f"{prefix}plain")
    files = request.getfixturevalue(f"{prefix}lora_files")
    train_a_little(ours)
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    # Zero where it is fresh: it would change nothing.
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    cls = StableDiffusionXLControlNetPipeline if prefix else StableDiffusionControlNetPipeline
    around = controlled(cls, ours, net)
    uncontrolled = draw(ours)
    gated = draw(around, image=WHITE)
    assert (gated - uncontrolled).abs().max() > 0.01
    with ours.composing(active_experts=["cat"]):
        one = draw(around, image=WHITE)
    with ours.composing(mixture="none"):
        base = draw(around, image=WHITE)
    oracle = controlled(cls, plain, net)
    torch.testing.assert_close(base, draw(oracle, image=WHITE), rtol=0, atol=0)
    with_adapters(oracle, files, {"cat": 1.0})
    torch.testing.assert_close(one, draw(oracle, image=WHITE), **CLOSE)
    torch.testing.assert_close(draw(around, image=WHITE), gated, rtol=0, atol=0)


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The content of an IP-Adapter file with random weights."""
    generator = torch.Generator().manual_seed(6)
    width = unet.config.cross_attention_dim
    projection = ImageProjection(
        cross_attention_dim=width, image_embed_dim=IMAGE_WIDTH, num_image_text_embeds=IMAGE_TOKENS
    )
    image = {
        "proj.weight": torch.randn(projection.image_embeds.weight.shape, generator=generator) * 0.3,
        "proj.bias": torch.zeros(projection.image_embeds.bias.shape),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attention = {}
    names = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(names):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for leaf in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(out, width, generator=generator) * 0.3
            attention[f"{2 * number + 1}.{leaf}.weight"] = weight
    return {"image_proj": image, "ip_adapter": attention}


def adapted(pipe: Any) -> Any:
    state = ip_adapter(pipe.unet)
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


PICTURE = {
    "ip_adapter_image_embeds": [torch.randn(2, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(2))]
}


@pytest.mark.parametrize("prefix", ["", "xl_"], ids=["sd", "xl"])
def test_ip_adapter(prefix, request, draw) -> None:
    ours, plain = request.getfixturevalue(f"{prefix}loaded"), request.getfixturevalue(f"{prefix}plain")
    files = request.getfixturevalue(f"{prefix}lora_files")
    train_a_little(ours)
    before = draw(ours)
    adapted(ours)
    gated = draw(ours, **PICTURE)
    assert (gated - before).abs().max() > 0.01
    assert len(ours.gate_weights()) > 0
    one = draw(ours, active_experts=["cat"], **PICTURE)
    adapted(plain)
    torch.testing.assert_close(draw(ours, mixture="none", **PICTURE), draw(plain, **PICTURE), rtol=0, atol=0)
    with_adapters(plain, files, {"cat": 1.0})
    torch.testing.assert_close(one, draw(plain, **PICTURE), **CLOSE)
    ours.unload_ip_adapter()
    torch.testing.assert_close(draw(ours), before, **CLOSE)


@pytest.mark.parametrize("composition", ["delta", "output"])
def test_experts_after_an_ip_adapter(composition, xl_components, xl_lora_files, draw) -> None:
    """Also where whole blocks run once per expert: their text comes with the picture's tokens."""
    ours = adapted(build(StableDiffusionXLMoLEPipeline, xl_components))
    ours.configure(MoLEConfig(composition=composition))
    for name, path in xl_lora_files.items():
        ours.load_expert(path, name=name)
    assert draw(ours, **PICTURE).isfinite().all()
    plain = adapted(build(StableDiffusionXLPipeline, xl_components))
    with_adapters(plain, xl_lora_files, {"boot": 1.0})
    expected = draw(plain, **PICTURE)
    torch.testing.assert_close(draw(ours, active_experts=["boot"], **PICTURE), expected, **CLOSE)

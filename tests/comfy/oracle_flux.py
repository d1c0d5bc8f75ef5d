"""What diffusers computes with tiny transformers, for ComfyUI to be compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tiny.flux import filled
from torch import Tensor, nn

from mole_diffusion import Expert, MoLEConfig, inject, load_expert, save_gates
from mole_diffusion.core.auto import Auto
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.networks import map_network

BLOCKS: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
TEXT = 7
#: While the layout forms, and behind it.
AUTO_TIMES = (1.0, 0.95, 0.5)
#: Of the latent: height and width differ.
SIZE = (8, 12)


def write_flux(folder: Path) -> None:
    """For each network a folder with its weights, three experts, gates, inputs and answers."""
    torch.manual_seed(0)
    networks: dict[str, Any] = {
        "flux": FluxTransformer2DModel(**BLOCKS, pooled_projection_dim=24, guidance_embeds=True),
        # ComfyUI's Chroma has as many modulations as the real one, so as many blocks.
        "chroma": ChromaTransformer2DModel(
            **{**BLOCKS, "num_layers": 19, "num_single_layers": 38},
            approximator_num_channels=64,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        "flux2": Flux2Transformer2DModel(**{**BLOCKS, "in_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}),
        # ComfyUI's has heads of 64, and as many as blocks.
        "sd3": SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=128,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "qwen_image": QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        # ComfyUI's modulations have 256 inputs, as the real ones.
        "z_image": ZImageTransformer2DModel(
            dim=288,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=32,
            axes_dims=[16, 16, 16],
            axes_lens=[256, 32, 32],
        ),
        # ComfyUI's has widths of its own: 128 in every feed-forward, two blocks of each kind for texts.
        "krea2": Krea2Transformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=128,
            timestep_embed_dim=32,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=128,
            axes_dims_rope=(4, 6, 6),
        ),
        "anima": CosmosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        ),
    }
    for name, network in networks.items():
        home = folder / name
        home.mkdir(parents=True)
        filled(network)
        save_file(network.state_dict(), home / "weights.safetensors")
        (home / "config.json").write_text(json.dumps(dict(network.config)))
        _write_answers(network, home)


@torch.no_grad()
def _write_answers(network: Any, home: Path) -> None:
    experts = [_write_expert(network, home / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    mixture = inject(network, experts, MoLEConfig())
    draws = torch.Generator().manual_seed(7)
    for value in mixture.parameters():
        value.add_(torch.randn(value.shape, generator=draws) * 0.3)
    save_gates(home / "gates.safetensors", {"transformer": mixture})
    left = torch.zeros(SIZE)
    left[:, :6] = 1
    tensors = _inputs(network)
    answers = {"gated": _run(network, tensors)}
    _write_gradients(mixture, network, tensors, home)
    mixture.activate(["a", "c"], expert_scales={"c": 0.5}, region_masks={"a": left})
    answers["regions"] = _run(network, tensors)
    mixture.activate(["b"])
    answers["alone"] = _run(network, tensors)
    auto = Auto({})
    auto.remember(tensors["text"], tensors["words"])
    mixture.activate(auto=auto)
    answers["times"] = torch.tensor(AUTO_TIMES)
    for step, time in enumerate(AUTO_TIMES):
        answers[f"auto_{step}"] = _run(network, {**tensors, "timesteps": torch.tensor([time, time])})
    mixture.eject()
    answers["base"] = _run(network, tensors)
    save_file(
        {name: value.contiguous() for name, value in {**tensors, **answers}.items()},
        home / "answers.safetensors",
    )


def _write_gradients(mixture: Mixture, network: Any, tensors: dict[str, Tensor], home: Path) -> None:
    """What a loss says to the gates, under the names that they have in a file."""
    network.requires_grad_(False)
    with torch.enable_grad():
        _run(network, tensors).square().mean().backward()
    save_file(
        {name: value.grad for name, value in mixture.gates.named_parameters() if value.grad is not None},
        home / "gradients.safetensors",
    )


def _write_expert(network: nn.Module, path: Path, seed: int) -> Expert:
    """A LoRA of every matrix that gates reach."""
    draws, rank = torch.Generator().manual_seed(seed), 2 + seed
    tensors = {}
    for site in map_network(network).sites:
        weight = network.get_submodule(site.path).weight
        if weight.dim() > 2 or site.name.endswith("norm1_context.linear"):
            continue  # Stability AI's name for it does not say in which order its halves stand
        out, fan_in = weight.shape
        tensors[f"transformer.{site.name}.lora_A.weight"] = torch.randn(rank, fan_in, generator=draws) * 0.2
        tensors[f"transformer.{site.name}.lora_B.weight"] = torch.randn(out, rank, generator=draws) * 0.2
    save_file(tensors, path)
    return load_expert(path)


def _inputs(network: Any) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(3)
    tensors = {
        "latents": torch.randn(2, 16, *SIZE, generator=draws),
        "timesteps": torch.tensor([0.5, 0.25]),
        # ComfyUI pads those of FLUX.2.
        "text": torch.randn(2, 512 if _is_flux2(network) else TEXT, 32, generator=draws),
    }
    # Whose words the texts are made of; the second names two of the experts.
    tensors["words"] = torch.zeros(*tensors["text"].shape[:2], 3)
    for row, token, expert in ((0, 1, 0), (0, 2, 0), (0, 4, 1), (0, 6, 2), (1, 2, 0), (1, 5, 1)):
        tensors["words"][row, token, expert] = 1
    if network.config.get("guidance_embeds"):
        tensors["guidance"] = torch.full((2,), 3.5)
    if isinstance(network, (FluxTransformer2DModel, SD3Transformer2DModel)):
        tensors["pooled"] = torch.randn(2, 24, generator=draws)
    return tensors


def _run(network: Any, tensors: dict[str, Tensor]) -> Tensor:
    if isinstance(network, ZImageTransformer2DModel):
        pictures = list(tensors["latents"].unsqueeze(2))
        # ComfyUI turns time and sign itself.
        found = network(pictures, 1 - tensors["timesteps"], list(tensors["text"])).sample
        return -torch.stack(found).squeeze(2)
    if _is_flux2(network):
        return _run_flux2(network, tensors)
    if isinstance(network, SD3Transformer2DModel):
        found = network(
            tensors["latents"],
            encoder_hidden_states=tensors["text"],
            pooled_projections=tensors["pooled"],
            timestep=tensors["timesteps"] * 1000,
        )
        return found.sample
    if isinstance(network, CosmosTransformer3DModel):
        return _run_anima(network, tensors)
    height, width = SIZE
    ids = FluxPipeline._prepare_latent_image_ids(
        2, height // 2, width // 2, torch.device("cpu"), torch.float32
    )
    told: dict[str, Any] = {"img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}
    if "pooled" in tensors:
        told |= {"pooled_projections": tensors["pooled"], "guidance": tensors["guidance"]}
    if isinstance(network, QwenImageTransformer2DModel):
        told = {"img_shapes": [[(1, height // 2, width // 2)]] * 2}
    text = tensors["text"]
    if isinstance(network, Krea2Transformer2DModel):
        told = {"position_ids": torch.cat([torch.zeros(TEXT, 3), ids])}
        text = text.unflatten(2, (network.config["num_text_layers"], -1))
    found = network(
        hidden_states=FluxPipeline._pack_latents(tensors["latents"], 2, 16, height, width),
        encoder_hidden_states=text,
        timestep=tensors["timesteps"],
        **told,
    ).sample
    unpacked: Tensor = FluxPipeline._unpack_latents(found, height * 8, width * 8, 8)
    return unpacked


def _run_anima(network: Any, tensors: dict[str, Tensor]) -> Tensor:
    found: Tensor = network(
        hidden_states=tensors["latents"].unsqueeze(2),
        timestep=tensors["timesteps"],
        encoder_hidden_states=tensors["text"],
        padding_mask=torch.zeros(1, 1, *SIZE),
    ).sample
    return found.squeeze(2)


def _is_flux2(network: nn.Module) -> bool:
    return isinstance(network, Flux2Transformer2DModel)


def _run_flux2(network: Any, tensors: dict[str, Tensor]) -> Tensor:
    latents = tensors["latents"]
    places = Flux2Pipeline._prepare_latent_ids(latents)
    found: Tensor = network(
        hidden_states=Flux2Pipeline._pack_latents(latents),
        encoder_hidden_states=tensors["text"],
        timestep=tensors["timesteps"],
        guidance=tensors["guidance"],
        img_ids=places,
        txt_ids=Flux2Pipeline._prepare_text_ids(tensors["text"]),
    ).sample
    return found.transpose(1, 2).reshape(latents.shape)

"""A network of Stable Diffusion 1.5's shape with random weights, experts for it, and diffusers' answers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from mole_diffusion import MoLEConfig, inject, load_expert, save_gates
from mole_diffusion.core.keys import factor_keys
from mole_diffusion.core.networks import map_network

#: Experts of the comparison; the last one is loaded by ComfyUI's own loader in the example workflow.
NAMES = ("dog", "cat", "style")


def write_sd15(folder: Path) -> None:
    """Write `unet.safetensors`, LoRA files, `answers.safetensors`, gates for three experts and for two."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    # Rounded to eight bits, so that the file is a quarter as large and exact.
    for value in unet.parameters():
        value.data = value.data.to(torch.float8_e4m3fn).float()
    for seed, name in enumerate(NAMES):
        save_file(_lora(unet, seed), folder / f"{name}.safetensors")
    experts = [load_expert(folder / f"{name}.safetensors") for name in NAMES]
    mixture = inject(unet, experts, MoLEConfig())
    draws = torch.Generator().manual_seed(5)
    inputs = {
        "latents": torch.randn(2, 4, 8, 8, generator=draws),
        "timesteps": torch.tensor([801, 333]),
        "text": torch.randn(2, 77, 768, generator=draws),
    }
    with torch.no_grad():
        for gate in mixture.parameters():
            gate.add_(torch.randn(gate.shape, generator=draws) * 0.3)
        noise = unet(inputs["latents"], inputs["timesteps"], encoder_hidden_states=inputs["text"]).sample
        save_gates(folder / "gates.safetensors", {"unet": mixture})
        mixture.disable()
        base = unet(inputs["latents"], inputs["timesteps"], encoder_hidden_states=inputs["text"]).sample
    mixture.eject()
    pair = inject(unet, experts[:2], MoLEConfig())
    save_gates(folder / "dog+cat.safetensors", {"unet": pair})
    pair.eject()
    save_file({**inputs, "noise": noise, "base_noise": base}, folder / "answers.safetensors")
    weights = {name: value.to(torch.float8_e4m3fn) for name, value in unet.state_dict().items()}
    save_file(weights, folder / "unet.safetensors")


def _lora(unet: UNet2DConditionModel, seed: int) -> dict[str, torch.Tensor]:
    """Random factors of rank 4 for all attention matrices, as kohya writes them."""
    draws = torch.Generator().manual_seed(100 + seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in map_network(unet).sites:
        if ".attn" not in site.name:
            continue
        module = unet.get_submodule(site.path)
        shapes = {"down": (4, module.in_features), "up": (module.out_features, 4)}
        keys = factor_keys("unet", site.name, "kohya")
        for role, shape in shapes.items():
            tensors[keys[role]] = torch.randn(shape, generator=draws) * 0.05
        tensors[keys["alpha"]] = torch.tensor(4.0)
    return tensors

"""What diffusers computes with the starter, for ComfyUI to be compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from refusals import write_refusals
from safetensors.torch import save_file

from mole_diffusion import StableDiffusionMoLEPipeline, TrainingConfig
from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.style_balance import InBalance
from mole_diffusion.pictures.training.trainer import GateTrainer
from mole_diffusion.starter.location import starter_dir, starter_experts

PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"
STYLED = "a vekka monster on the beach in zaphel style"
#: A training that ends in seconds and moves the gates away from uniform.
QUICK = TrainingConfig(
    iterations=10,
    gate_lr=0.1,
    drawn_pictures=1,
    sampling_steps=2,
    pool_size=8,
    collage_batch=4,
    # Said here: a pipeline of the starter would take its own, which a MODEL of ComfyUI does not know.
    guidance=2.0,
    guidance_rescale=0.7,
    progress=False,
)


def write_starter(folder: Path) -> None:
    """Train gates for three experts of the starter, shortly, and write what that gives.

    `training.json` (settings), `losses.json`, `gates.safetensors`, and `starter.safetensors` with inputs of
    the networks and what they make of them.
    """
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=["boot", "monster", "clock"])
    result = pipe.train_gates(PROMPT, config=QUICK)
    pipe.save_gates(folder / "gates.safetensors")
    (folder / "training.json").write_text(QUICK.to_json())
    (folder / "losses.json").write_text(json.dumps([row["loss"] for row in result.history]))
    with torch.no_grad():
        tensors = _answers(pipe)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "starter.safetensors")
    _write_static(pipe, folder)
    _write_styled(folder)
    known = starter_experts()
    write_refusals(pipe, {name: known[name].path for name in pipe.experts}, folder)


def _write_static(pipe: Any, folder: Path) -> None:
    """`static.safetensors`, the mixture as one plain LoRA, and the picture that diffusers draws with it."""
    pipe.export_lora(folder / "static.safetensors", "kohya", prompts=PROMPT, steps=4, guidance_scale=5.0)
    plain = StableDiffusionPipeline.from_pretrained(
        starter_dir(), safety_checker=None, torch_dtype=torch.float32
    )
    pictures = {"base_picture": _draw(plain)}
    plain.load_lora_weights(folder / "static.safetensors")
    save_file({**pictures, "picture": _draw(plain)}, folder / "static_picture.safetensors")


def _write_styled(folder: Path) -> None:
    """A subject in a style, drawn by a training's workbench and by calls, also with gates.

    `styled_gates.safetensors` and `styled.safetensors`.
    """
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=["monster", "sketch"])
    bench = GateTrainer(pipe, STYLED, config=QUICK).objective.bench
    pictures = {
        name: bench.draw([STYLED] * 2, torch.Generator().manual_seed(4), mixture=mixture).contiguous()
        for name, mixture in (("auto", AutoMixture()), ("la", "la"))
    }
    pictures["picture"] = _draw(pipe, STYLED, mixture="auto")
    pictures["unbalanced"] = _draw(pipe, STYLED, mixture=AutoMixture(AutoSettings(balance=0.0)))
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (one for mixture in pipe.mixtures.values() for one in mixture.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draws) * (parameter.dim() > 1))
    pipe.save_gates(folder / "styled_gates.safetensors")
    pictures["gated"] = _draw(pipe, STYLED)
    pictures["gated_unbalanced"] = _draw(pipe, STYLED, mixture=InBalance("gates", 0.0))
    save_file(pictures, folder / "styled.safetensors")


def _draw(pipe: Any, prompt: str = PROMPT, **mixed: Any) -> torch.Tensor:
    """A picture of the noise that ComfyUI makes of seed 1."""
    channels = pipe.unet.config.in_channels
    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    # ComfyUI begins at a little more than pure noise, so that its sigma is finite.
    pipe.scheduler.alphas_cumprod[-1] = 4.8973451890853435e-08
    # ComfyUI's sampler does not rescale guidance.
    chosen = {**mixed, "num_inference_steps": 10, "guidance_scale": 5.0, "guidance_rescale": 0.0}
    drawn = pipe(prompt, latents=noise, **chosen, output_type="pt")
    images: torch.Tensor = drawn.images.contiguous()
    return images


def _answers(pipe: Any) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    latents = torch.randn(2, pipe.unet.config.in_channels, 16, 16, generator=draws)
    timesteps = torch.tensor([801, 333])
    left = torch.zeros(128, 128)
    left[:, :64] = 1
    tensors = {"latents": latents, "timesteps": timesteps}
    with pipe.composing(mixture="none"):
        tensors["base_text2"] = _text(pipe, ["", PROMPT])
        tensors["base_text"] = tensors["base_text2"][1:]
        tensors["base_noise"] = _noise(pipe, tensors, tensors["base_text2"])
        scale = pipe.vae.config.scaling_factor
        tensors["clean"] = latents[:1] * 0.7
        pixels = pipe.vae.decode(tensors["clean"] / scale).sample
        tensors["pixels"] = (pixels / 2 + 0.5).clamp(0, 1)
        tensors["encoded"] = pipe.vae.encode(tensors["pixels"] * 2 - 1).latents * scale
    with pipe.composing():
        tensors["text"] = _text(pipe, ["", PROMPT])
        tensors["noise"] = _noise(pipe, tensors, tensors["text"])
    with pipe.composing(
        active_experts=["boot", "clock"],
        expert_scales={"clock": 0.5},
        region_masks={"boot": left},
        latent_size=(16, 16),
    ):
        tensors["masked_noise"] = _noise(pipe, tensors, tensors["text"])
    tensors["picture"] = _draw(pipe)
    tensors["shared_picture"] = _draw(pipe, mixture="auto")
    pipe.unload_shared_gates()
    tensors["auto_picture"] = _draw(pipe, mixture="auto")
    tensors["auto_masked_picture"] = _draw(pipe, mixture="auto", active_experts=["boot", "clock"])
    return tensors


def _text(pipe: Any, texts: list[str]) -> torch.Tensor:
    encoded: torch.Tensor = pipe.encode_prompt(texts, pipe.device, 1, False)[0]
    return encoded


def _noise(pipe: Any, tensors: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = pipe.unet(
        tensors["latents"], tensors["timesteps"], encoder_hidden_states=text
    ).sample
    return found

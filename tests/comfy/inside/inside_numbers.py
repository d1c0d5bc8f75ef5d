"""The same numbers as diffusers, for the same latents, timesteps and texts."""

from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import latent_preview
import numpy as np
import pytest
import torch
from conftest import part
from safetensors.torch import load_file

from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter import starter_experts
from mole_diffusion.starter.location import STARTER, shared_gates_of
from tools import draw

TOLERANCE = 1e-4
PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"


def run_unet(model: Any, tensors: dict[str, Any]) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model])
    return model.model.diffusion_model(tensors["latents"], tensors["timesteps"], context=tensors["text"])


def test_texts_and_pictures_of_the_bare_starter_are_those_of_diffusers(
    starter: tuple[Any, Any, Any], oracle: Path
) -> None:
    model, clip, vae = starter
    tensors = load_file(oracle / "starter.safetensors")
    text, _ = clip.encode_from_tokens(clip.tokenize(PROMPT), True)
    assert text.shape == tensors["base_text"].shape
    assert (text - tensors["base_text"]).abs().max() < TOLERANCE
    assert (
        run_unet(model, {**tensors, "text": tensors["base_text2"]}) - tensors["base_noise"]
    ).abs().max() < TOLERANCE
    pixels = vae.decode(tensors["clean"] / model.model.latent_format.scale_factor).movedim(-1, 1)
    assert (pixels - tensors["pixels"]).abs().max() < TOLERANCE
    latents = vae.encode(tensors["pixels"].movedim(1, -1)) * model.model.latent_format.scale_factor
    assert (latents - tensors["encoded"]).abs().max() < 1e-3


def test_three_experts_with_trained_gates_are_those_of_diffusers(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    model, clip, _ = starter
    tensors = load_file(oracle / "starter.safetensors")
    gates = part("experts").GatesFile(oracle / "gates.safetensors")
    mixed, mixed_clip = part("apply").apply_experts(model, clip, experts, gates)
    text, _ = mixed_clip.encode_from_tokens(mixed_clip.tokenize(PROMPT), True)
    assert (text - tensors["text"][1:]).abs().max() < TOLERANCE
    assert (text - tensors["base_text"]).abs().max() > 1e-2
    noise = run_unet(mixed, tensors)
    assert (noise - tensors["noise"]).abs().max() < TOLERANCE
    assert (noise - tensors["base_noise"]).abs().max() > 1e-2
    assert (
        run_unet(model, {**tensors, "text": tensors["base_text2"]}) - tensors["base_noise"]
    ).abs().max() < TOLERANCE


def test_masks_regions_and_strengths_are_those_of_diffusers(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    model, clip, _ = starter
    tensors = load_file(oracle / "starter.safetensors")
    gates = part("experts").GatesFile(oracle / "gates.safetensors")
    left = torch.zeros(128, 128)
    left[:, :64] = 1
    chosen = experts.masked(["boot", "clock"], {"clock": 0.5}).in_regions({"boot": left})
    mixed, _ = part("apply").apply_experts(model, clip, chosen, gates)
    assert (run_unet(mixed, tensors) - tensors["masked_noise"]).abs().max() < TOLERANCE


def test_sampling_draws_the_picture_that_diffusers_draws(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    """Euler over the same timesteps is DDIM: prediction type, noise schedule and scales are the same."""
    model, clip, vae = starter
    tensors = load_file(oracle / "starter.safetensors")
    gates = part("experts").GatesFile(oracle / "gates.safetensors")
    mixed, mixed_clip = part("apply").apply_experts(model, clip, experts, gates)
    picture = vae.decode(draw(mixed, mixed_clip, PROMPT, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - tensors["picture"]).abs().max() < 1e-3


def test_without_gates_it_draws_what_auto_draws_in_diffusers(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    model, clip, vae = starter
    tensors = load_file(oracle / "starter.safetensors")
    mixed = part("apply").apply_experts(model, clip, experts, None, "auto")
    # A second picture is found its own places, and nothing of a clip's own stays on what it was cloned from.
    pictures = [vae.decode(draw(*mixed, PROMPT, seed=1, steps=10)).movedim(-1, 1) for _ in range(2)]
    for picture in pictures:
        assert (picture - tensors["auto_picture"]).abs().max() < 1e-3
    assert (pictures[0] - tensors["picture"]).abs().max() > 1e-2
    masked = part("apply").apply_experts(model, clip, experts.masked(["boot", "clock"], {}), None, "auto")
    picture = vae.decode(draw(*masked, PROMPT, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - tensors["auto_masked_picture"]).abs().max() < 1e-3
    assert (picture - pictures[0]).abs().max() > 1e-2
    draw(model, clip, PROMPT, steps=1)
    assert "encode_token_weights" not in vars(clip.cond_stage_model)
    assert not clip.cond_stage_model.clip_l._forward_pre_hooks


@pytest.mark.parametrize(
    ("file", "drawn", "unbalanced"),
    [(None, "picture", "unbalanced"), ("styled_gates.safetensors", "gated", "gated_unbalanced")],
)
def test_a_subject_and_a_style_are_kept_in_balance_as_in_diffusers(
    starter: tuple[Any, Any, Any], oracle: Path, file: str | None, drawn: str, unbalanced: str
) -> None:
    model, clip, vae = starter
    tensors, known = load_file(oracle / "styled.safetensors"), starter_experts()
    pair = tuple(load_expert(known[name].path, name=name) for name in ("monster", "sketch"))
    gates = None if file is None else part("experts").GatesFile(oracle / file)
    mixed = part("apply").apply_experts(model, clip, part("experts").ExpertSet(pair), gates, "auto")
    text = "a vekka monster on the beach in zaphel style"
    picture = vae.decode(draw(*mixed, text, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - tensors[drawn]).abs().max() < 1e-3
    assert (picture - tensors[unbalanced]).abs().max() > 1e-2


def test_with_shared_gates_it_draws_what_auto_draws_with_them_in_diffusers(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    model, clip, vae = starter
    tensors = load_file(oracle / "starter.safetensors")
    gates = part("experts").GatesFile(shared_gates_of(STARTER))
    mixed = part("apply").apply_experts(model, clip, experts, gates)
    picture = vae.decode(draw(*mixed, PROMPT, seed=1, steps=10)).movedim(-1, 1)
    assert (picture - tensors["shared_picture"]).abs().max() < 1e-3
    assert (picture - tensors["auto_picture"]).abs().max() > 1e-2


def test_the_picture_is_seen_while_it_is_sampled(starter: tuple[Any, Any, Any]) -> None:
    """ComfyUI's preview of the latents of a picture is the picture, an eighth as large."""
    model, _, vae = starter
    comfy.cli_args.args.preview_method = latent_preview.LatentPreviewMethod.Auto
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    picture = part("starter").starter_pictures("boot")[:1]
    latents = model.model.process_latent_in(vae.encode(picture))
    seen = torch.from_numpy(np.array(previewer.decode_latent_to_preview(latents)) / 255).flatten(0, 1)
    small = torch.nn.functional.avg_pool2d(picture.movedim(-1, 1), 8)[0].movedim(0, -1).flatten(0, 1)
    for channel in range(3):
        both = torch.stack([seen[:, channel], small[:, channel].double()])
        assert torch.corrcoef(both)[0, 1] > 0.9
    assert (seen - small).abs().mean() < 0.1

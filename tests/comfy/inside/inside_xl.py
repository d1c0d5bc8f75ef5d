"""SDXL: what the trainer sees is what ComfyUI's own sampler would see, with both text encoders."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from conftest import part
from tiny_loras import write_xl_lora
from tiny_models import xl

from mole_diffusion import MoLEConfig, TrainingConfig, read_gates_header
from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.experts import load_expert
from tools import encoded, hooks, sample

PROMPT = "a sks dog and a sks cat"


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return xl.load()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = part("experts").ExpertSet()
    for seed, name in enumerate(("dog", "cat")):
        path = write_xl_lora(tmp_path_factory.mktemp("xl"), name, seed)
        with torch.inference_mode(False):
            found = found.with_expert(load_expert(path))
    return found


def test_texts_and_predictions_are_those_of_the_sampler(model: Any, pair: Any) -> None:
    unet, clip, vae = model
    mixed, mixed_clip = part("apply").apply_experts(unet, clip, pair, None)
    with torch.inference_mode(False), torch.no_grad():
        copy = part("native").TrainingCopy(unet, clip, vae, pair, MoLEConfig.uniform())
        told = copy.denoiser.encode_texts([PROMPT, ""])
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        noise = copy.denoiser.predict(latents, torch.tensor([500.0, 500.0]), told)
    ((tokens, facts),), ((empty, _),) = encoded(mixed_clip, PROMPT)
    assert (told.tensors["context"] - torch.cat([tokens, empty])).abs().max() < 1e-5
    comfy.model_management.load_models_gpu([mixed])
    base = mixed.model
    added = base.encode_adm(pooled_output=facts["pooled_output"], height=64, width=64)
    assert (told.tensors["y"][:1] - added).abs().max() < 1e-5
    sigma = base.model_sampling.sigma(torch.tensor([500.0]))
    noisy = latents[:1] * (sigma**2 + 1) ** 0.5
    clean = base.apply_model(noisy, sigma, c_crossattn=tokens, y=added)
    assert ((noisy - clean) / sigma - noise[:1]).abs().max() < 1e-4
    comfy.model_management.unload_all_models()


def test_gates_of_all_three_networks_are_trained_and_applied(model: Any, pair: Any, tmp_path: Path) -> None:
    unet, clip, vae = model
    before = [value.clone() for value in unet.model.state_dict().values()]
    config = TrainingConfig(
        iterations=3, batch=2, drawn_pictures=1, sampling_steps=2, guidance=2.0, progress=False
    )
    lines: list[str] = []
    with torch.inference_mode(False), torch.enable_grad():
        copy = part("native").TrainingCopy(unet, clip, vae, pair, MoLEConfig())
        concepts = part("nodes_train").read_concepts(
            "dog = a sks dog | a dog\ncat = a sks cat | a cat", pair, {}
        )
        fresh = {k: v.clone() for m in copy.mixtures.values() for k, v in m.gates.state_dict().items()}
        part("nodes_train").train(copy, [PROMPT], concepts, config, tmp_path, lines.append)
    # A batch for each expert, and one of backgrounds.
    assert lines[1:4] == [
        "drawing pictures to learn from: 1 of 3 batches",
        "drawing pictures to learn from: 2 of 3 batches",
        "cutting pictures out and mixing them ...",
    ]
    header = read_gates_header(tmp_path / "gates.safetensors")
    assert set(header.parts) == {"unet", "text_encoder", "text_encoder_2"}
    for mixture in copy.mixtures.values():
        moved = [not torch.equal(value, fresh[name]) for name, value in mixture.gates.state_dict().items()]
        assert any(moved), mixture.part
    assert hooks(unet.model.diffusion_model) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, unet.model.state_dict().values(), strict=True))
    gates = part("experts").GatesFile(tmp_path / "gates.safetensors")
    drawn = []
    for chosen in (gates, None):
        mixed, mixed_clip = part("apply").apply_experts(unet, clip, pair, chosen)
        drawn.append(sample(mixed, encoded(mixed_clip, PROMPT), size=64, cfg=2.0))
    assert not torch.equal(*drawn)


def test_what_reads_more_than_texts_and_sizes_is_refused(model: Any, pair: Any) -> None:
    unet, clip, vae = model
    kind = type(unet.model)
    unet.model.__class__ = kind.__base__
    try:
        with pytest.raises(TrainingError, match=r"1\.x, 2\.x and XL here"):
            part("native").TrainingCopy(unet, clip, vae, pair, MoLEConfig())
    finally:
        unet.model.__class__ = kind


def test_the_vae_of_another_model_is_refused(model: Any, pair: Any, starter: Any) -> None:
    unet, clip, _ = model
    with torch.inference_mode(False):
        copy = part("native").TrainingCopy(unet, clip, starter[2], pair, MoLEConfig())
    with pytest.raises(TrainingError, match=r"VAE makes latents of 16 channels, this MODEL reads 4; connect"):
        copy.denoiser.check_trainable()

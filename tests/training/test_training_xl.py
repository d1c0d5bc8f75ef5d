"""Gates of SDXL: three networks, pooled text and picture sizes among the UNet's conditions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import losses_before_and_after, promises_kept
from tiny.sdxl import make_refiner_components, make_xl_components, write_xl_lora

from mole_diffusion import StableDiffusionXLMoLEImg2ImgPipeline, StableDiffusionXLMoLEPipeline
from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.denoisers.autoencoder import full_precision
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig

PROMPT = "a zorin boot and a vim cat"
PARTS = ["unet", "text_encoder", "text_encoder_2"]
Tiny = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def xl_components(components: dict[str, Any]) -> dict[str, Any]:
    return make_xl_components(components["tokenizer"])


@pytest.fixture(scope="module")
def xl_lora_files(tmp_path_factory: pytest.TempPathFactory, xl_components: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("xl_loras")
    return {
        name: write_xl_lora(folder / f"{name}.safetensors", xl_components, seed, rank)
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 3)], start=1)
    }


@pytest.fixture
def make_xl(xl_components: dict[str, Any], xl_lora_files: dict[str, Path], tiny_build: Any) -> Any:
    """`make_xl(cls)`: a pipeline with two experts."""

    def make(cls: Any = StableDiffusionXLMoLEPipeline) -> Any:
        pipe = tiny_build(cls, xl_components)
        for name, path in xl_lora_files.items():
            pipe.load_expert(path, name=name)
        return pipe

    return make


def test_collages_teach_the_gates(make_xl: Any, concepts: list[Concept], tiny: Tiny) -> None:
    config = tiny(iterations=20, collage_batch=4, redraw_every=100, alpha=0.0, gate_lr=3e-2)
    before, after = losses_before_and_after(make_xl(), PROMPT, concepts, config)
    assert after < before * 0.99


def test_clip_teaches_the_gates(make_xl: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny) -> None:
    """In one step, so that all of the way from the noise to the loss carries gradient."""
    settings = {"objective": "clip", "clip": clip_folder, "sampling_steps": 1}
    kept = promises_kept(make_xl(), PROMPT, concepts, tiny(**settings))
    assert any(abs(ratio - 1) < 0.25 for ratio in kept), kept
    config = tiny(**settings, iterations=20, alpha=0.0, gate_lr=1e-2)
    before, after = losses_before_and_after(make_xl(), PROMPT, concepts, config)
    assert after < before


@pytest.mark.parametrize("objective", ["collage", "clip"])
def test_every_gate_gets_gradient_and_nothing_else_does(
    make_xl: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny, objective: str
) -> None:
    pipe = make_xl()
    trainer = GateTrainer(
        pipe, PROMPT, concepts, tiny(objective=objective, clip=clip_folder, empty_prompts=0.0)
    )
    trainer.objective.prepare()
    for module in trainer.objective.networks:
        module.requires_grad_(False)
    for term in trainer.objective.losses(0):
        term.loss.backward()
    assert list(pipe.mixtures) == PARTS
    for part, mixture in pipe.mixtures.items():
        for name, gate in mixture.gates.named_parameters():
            # At uniform weights the temperature has no gradient, and SDXL does not read the last layer of
            # its first text encoder.
            if "temperature" not in name and not (part != "unet" and "layers__1" in name):
                assert gate.grad is not None, f"{part}.{name}"
                assert float(gate.grad.abs().sum()) > 0, f"{part}.{name}"
    assert all(p.grad is None for module in trainer.objective.networks for p in module.parameters())


def test_training_draws_what_the_pipeline_draws(make_xl: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """Same noise, same steps, same guidance: the conditions of training are those of the pipeline."""
    pipe = make_xl()
    bench = GateTrainer(pipe, PROMPT, concepts, tiny(guidance=3.0)).objective.bench
    found = bench.draw([PROMPT], torch.Generator().manual_seed(4))
    pipe.scheduler = bench.denoiser.scheduler
    noise = torch.randn(1, *bench.denoiser.latent_shape, generator=torch.Generator().manual_seed(4))
    steps = bench.settings.sampling_steps
    expected = pipe(
        PROMPT,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="pt",
        mixture="gates",
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)


def test_through_the_pipeline_and_its_picture_form(make_xl: Any, concepts: list[Concept], tiny: Tiny) -> None:
    pipe = StableDiffusionXLMoLEImg2ImgPipeline.from_pipe(make_xl())
    result = pipe.train_gates(PROMPT, concepts=concepts, config=tiny(iterations=1))
    assert len(result.history) == 1


def test_unets_that_want_more_are_refused(
    make_xl: Any, xl_components: dict[str, Any], concepts: list[Concept], tiny: Tiny
) -> None:
    pipe = make_xl()
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=48)
    with pytest.raises(
        TrainingError, match="added conditions are 48 wide, pooled text and picture sizes are 56"
    ):
        GateTrainer(pipe, PROMPT, concepts, tiny()).objective.bench.encode_texts(["a boot"])
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(TrainingError, match="it reads 9 channels, latents have 4"):
        GateTrainer(pipe, PROMPT, concepts, tiny())


def test_an_autoencoder_that_overflows_is_widened_and_restored(make_xl: Any) -> None:
    vae = make_xl().vae.half()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with full_precision(vae):
        assert vae.dtype == torch.float16  # this one does not ask for it
    vae.register_to_config(force_upcast=True)
    with full_precision(vae):
        assert vae.dtype == torch.float32
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float16


@pytest.fixture
def refiner(components: dict[str, Any], tmp_path: Path, tiny_build: Any) -> Any:
    """SDXL's refiner with two experts for its UNet and its one text encoder."""
    parts = make_refiner_components(components["tokenizer"])
    pipe = tiny_build(StableDiffusionXLMoLEImg2ImgPipeline, parts)
    for seed, name in enumerate(("boot", "cat"), start=1):
        pipe.load_expert(write_xl_lora(tmp_path / f"{name}.safetensors", parts, seed, 2), name=name)
    return pipe


def test_the_refiner_learns_from_pictures(refiner: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """It is told what its pipeline tells it, and sees as little noise as there is where it draws."""
    seen: list[dict[str, Any]] = []
    refiner.unet.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    picture = torch.rand(1, 3, 64, 64)
    settings = {"strength": 0.5, "num_inference_steps": 2, "guidance_scale": 5.0, "mixture": "none"}
    refiner("a zorin boot", image=picture, **settings)
    told = seen[0]["added_cond_kwargs"]
    denoiser = denoiser_of(refiner, (64, 64))
    with torch.no_grad(), refiner.composing(mixture="none"):
        ours = denoiser.encode_texts(["", "a zorin boot"]).tensors
    torch.testing.assert_close(ours["time_ids"], told["time_ids"])
    torch.testing.assert_close(ours["text_embeds"], told["text_embeds"])
    assert int(denoiser.random_times(200, torch.Generator().manual_seed(0)).max()) < 200
    config = tiny(iterations=20, collage_batch=4, alpha=0.0, gate_lr=3e-2, collage_background="sources")
    before, after = losses_before_and_after(refiner, PROMPT, concepts, config)
    assert after < before * 0.99
    assert set(refiner.mixtures) == {"unet", "text_encoder_2"}


def test_the_refiner_cannot_draw_what_it_learns_from(
    refiner: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    with pytest.raises(TrainingError, match="SDXL's refiner cannot draw from noise alone"):
        GateTrainer(refiner, PROMPT, concepts, tiny(collage_source="drawn")).train()

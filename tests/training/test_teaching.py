"""Collages whose target is what the experts alone say, for models of few steps."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import losses_before_and_after
from tiny.flux import FLUX_TARGETS, make_flux_components, write_transformer_lora

from mole_diffusion import ConfigError, FluxMoLEPipeline
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig
from mole_diffusion.pictures.training.denoising import NoisyBatch
from mole_diffusion.pictures.training.teaching import Teacher

PROMPT = "a zorin boot and a vim cat"
Tiny = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def make_schnell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes a FLUX.1 that reads no guidance, with two experts."""
    folder: Path = tmp_path_factory.mktemp("schnell")
    components = make_flux_components(folder / "tokenizer", guidance=False)
    files = {
        name: write_transformer_lora(
            folder / f"{name}.safetensors", components, seed, 1 + seed, FLUX_TARGETS, text=True
        )
        for seed, name in enumerate(("boot", "cat"), 1)
    }

    def built() -> Any:
        pipe = FluxMoLEPipeline(**copy.deepcopy(components))
        pipe.set_progress_bar_config(disable=True)
        for name, path in files.items():
            pipe.load_expert(path, name=name)
        return pipe

    return built


def predicted(bench: Any, batch: NoisyBatch, texts: list[str], **mixture: Any) -> torch.Tensor:
    with torch.no_grad(), bench.composing(**mixture):
        found: torch.Tensor = bench.predict(batch, texts)
    return found


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_target_is_what_each_expert_says_in_its_place(
    kind: str, pipe: Any, make_schnell: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    """Left the boot, in the middle the cat, right nobody; and a collage of the cat alone."""
    trained = pipe if kind == "unet" else make_schnell()
    config = tiny(resolution=None if kind == "unet" else 64, sampling_steps=3)
    trainer = GateTrainer(trained, PROMPT, concepts, config)
    bench = trainer.objective.bench
    teacher = Teacher(bench, trainer.concepts)
    channels, height, width = bench.denoiser.latent_shape
    draws = torch.Generator().manual_seed(0)
    batch = NoisyBatch.draw(bench.denoiser, torch.randn(2, channels, height, width), draws, teacher.times)
    assert set(batch.times.tolist()) <= set(bench.denoiser.schedule(3).tolist())
    captions, third = [PROMPT, "a vim cat"], width // 3
    covers = torch.zeros(2, 2, height, width)
    covers[0, 0, :, :third] = covers[0, 1, :, third : 2 * third] = covers[1, 0] = 1
    found = teacher.target(batch, captions, covers)
    boot, cat = (predicted(bench, batch, captions, active_experts=[name]) for name in ("boot", "cat"))
    base = predicted(bench, batch, ["a boot and a cat", "a cat"], mixture="none")
    assert (boot - cat).abs().max() > 1e-3
    same = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[0, :, :, :third], boot[0, :, :, :third], **same)
    torch.testing.assert_close(found[0, :, :, third : 2 * third], cat[0, :, :, third : 2 * third], **same)
    torch.testing.assert_close(found[0, :, :, 2 * third :], base[0, :, :, 2 * third :], **same)
    torch.testing.assert_close(found[1], cat[1], **same)


def test_styles_count_with_every_subject_and_alone_behind_them(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    style = Concept("cat", "in vim cat style", "", kind="style")
    trainer = GateTrainer(pipe, "a zorin boot in vim cat style", [concepts[0], style], tiny())
    bench, caption = trainer.objective.bench, trainer.prompts[0].text
    latents = torch.randn(1, *bench.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    batch = NoisyBatch.draw(bench.denoiser, latents, torch.Generator().manual_seed(0))
    covers = torch.zeros(1, 2, *latents.shape[-2:])
    covers[:, 0, :, :4] = 1
    found = Teacher(bench, trainer.concepts).target(batch, [caption], covers)
    both = predicted(bench, batch, [caption], mixture={"boot": 1.0, "cat": 1.0})
    behind = predicted(bench, batch, [caption], active_experts=["cat"])
    torch.testing.assert_close(found[..., :4], both[..., :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[..., 4:], behind[..., 4:], rtol=1e-4, atol=1e-5)


def test_gates_learn_what_the_experts_say(make_schnell: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """Every collage is one subject all over: the answer is that expert alone, which gates can say exactly."""
    settings = {"collage_target": "experts", "collage_objects": 1, "collage_layouts": ["strips"]}
    settings |= {"iterations": 24, "collage_batch": 4, "redraw_every": 100, "resolution": 32, "alpha": 0.0}
    pipe = make_schnell()
    before, after = losses_before_and_after(pipe, PROMPT, concepts, tiny(**settings, gate_lr=3e-2))
    assert after < 0.7 * before
    # Half precision of pictures and the velocity to them have nothing to do with it.
    assert TrainingConfig(collage_target="experts").facts() != TrainingConfig().facts()
    assert "collage_target" not in TrainingConfig().facts()
    with pytest.raises(ConfigError, match="collage_target is 'teacher'"):
        TrainingConfig(collage_target="teacher")

"""Training on ComfyUI's objects: the same gates as with diffusers, and a shared model that nobody touched."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import pytest
import torch
from conftest import part
from PIL import Image
from safetensors.torch import load_file

from mole_diffusion import TrainingConfig
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.core.experts import load_expert
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.training.trainer import GateTrainer
from mole_diffusion.starter import starter_experts
from tools import draw, hooks

PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"


@pytest.fixture(autouse=True)
def _no_interrupt() -> Iterator[None]:
    comfy.model_management.interrupt_current_processing(False)
    yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture(scope="session")
def settings(oracle: Path) -> TrainingConfig:
    return TrainingConfig.from_dict(json.loads((oracle / "training.json").read_text()))


def train(
    starter: Any,
    experts: Any,
    config: TrainingConfig,
    folder: Path,
    lines: list[str] | None = None,
    **references: Any,
) -> Any:
    module = part("nodes_train")
    with torch.inference_mode(False), torch.enable_grad():
        pipe = part("native").TrainingCopy(*starter, experts, part("nodes_train").MoLEConfig())
        concepts = module.read_concepts("", experts, references)
        say = (lines if lines is not None else []).append
        return module.train(pipe, [PROMPT], concepts, config, folder, say)


def state_of(starter: Any) -> list[torch.Tensor]:
    model, clip, vae = starter
    networks = (model.model, clip.cond_stage_model, vae.first_stage_model)
    return [value.clone() for network in networks for value in network.state_dict().values()]


@pytest.fixture(scope="module")
def whole(
    starter: Any, experts: Any, settings: TrainingConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, list[str]]:
    """A training from beginning to end: its result, its folder, and what it said."""
    before, lines = state_of(starter), []
    folder = tmp_path_factory.mktemp("whole")
    result = train(starter, experts, settings, folder, lines)
    # The shared model is bitwise as it was, and carries no hook.
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(starter), strict=True))
    assert hooks(starter[0].model) == 0
    return result, folder, lines


def test_gates_are_those_that_diffusers_trains(
    settings: TrainingConfig, oracle: Path, whole: tuple[Any, Path, list[str]]
) -> None:
    result, folder, lines = whole
    assert len(result.history) == settings.iterations
    ours, theirs = load_file(folder / "gates.safetensors"), load_file(oracle / "gates.safetensors")
    assert ours.keys() == theirs.keys()
    # Adam turns rounding into steps where a gradient is next to nothing, so the gates are nearly the same.
    # One gate may stray further than a network; a temperature is a single number, and no gate by itself.
    gates = {name.rpartition("/")[0] for name in theirs}
    for group, most in [
        *((f"{network}/", 0.2) for network in ("unet", "text_encoder")),
        *((f"{gate}/", 0.5) for gate in gates),
    ]:
        flat = [
            torch.cat([gate.flatten() for name, gate in file.items() if name.startswith(group)])
            for file in (ours, theirs)
        ]
        assert (flat[0] - flat[1]).norm() <= most * flat[1].norm() + 1e-3, group
    losses = json.loads((oracle / "losses.json").read_text())
    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=2e-2)
    assert any(line.startswith("iteration") for line in lines)
    names, weights = part("weights").weights_of_gates(part("experts").GatesFile(folder / "gates.safetensors"))
    assert names == ("boot", "monster", "clock")
    assert {len(row) for gates in weights.values() for row in gates.values()} == {3}


def test_a_subject_in_a_style_is_drawn_as_diffusers_draws_it_with_auto(
    starter: Any, settings: TrainingConfig, oracle: Path
) -> None:
    known, files, native = starter_experts(), part("experts"), part("native")
    names = ["monster", "sketch"]
    text = "a vekka monster on the beach in zaphel style"
    pair = files.ExpertSet(tuple(load_expert(known[name].path, name=name) for name in names))
    with torch.inference_mode(False):
        copy = native.TrainingCopy(*starter, pair, part("nodes_train").MoLEConfig())
        bench = GateTrainer(copy, text, config=settings, denoiser=copy.denoiser).objective.bench
        before = hooks(copy.denoiser.text_encoders)

        def far(mixture: Any, name: str) -> float:
            drawn = bench.draw([text] * 2, torch.Generator().manual_seed(4), mixture=mixture)
            return float((drawn - expected[name]).abs().mean())

        expected = load_file(oracle / "styled.safetensors")
        assert far(AutoMixture(), "auto") < 1e-3
        assert far("la", "auto") > 1e-2
        assert copy.denoiser.reader is None
        assert hooks(copy.denoiser.text_encoders) == before


def test_interrupt_keeps_what_there_is_and_the_same_training_goes_on(
    starter: Any,
    experts: Any,
    settings: TrainingConfig,
    whole: tuple[Any, Path, list[str]],
    tmp_path: Path,
) -> None:
    def stop(line: str) -> None:
        if line.startswith("iteration 4 "):
            comfy.model_management.interrupt_current_processing()

    class Lines(list[str]):
        def append(self, line: str) -> None:
            super().append(line)
            stop(line)

    stopped = train(starter, experts, settings, tmp_path / "parts", Lines())
    assert stopped.stopped
    assert len(stopped.history) == 4
    assert load_file(tmp_path / "parts" / "gates.safetensors")
    comfy.model_management.interrupt_current_processing(False)
    rest = train(starter, experts, settings, tmp_path / "parts")
    assert [row["loss"] for row in rest.history] == pytest.approx([row["loss"] for row in whole[0].history])


def test_interrupt_in_the_middle_of_an_iteration_keeps_the_gates(
    starter: Any, experts: Any, settings: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    processing_interrupted = comfy.model_management.processing_interrupted

    def asked_too_late() -> bool:
        if lines and lines[-1].startswith("iteration 2 "):
            comfy.model_management.interrupt_current_processing()
            return False
        return bool(processing_interrupted())

    monkeypatch.setattr(comfy.model_management, "processing_interrupted", asked_too_late)
    # The distance to the base is measured without gradient, inside the iteration.
    config = dataclasses.replace(settings, prior_weight=0.1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(starter, experts, config, tmp_path, lines)
    header = part("experts").GatesFile(tmp_path / "gates.safetensors").header
    assert header.metadata["iterations"] == "2"


def test_interrupt_while_pictures_are_drawn_stops_at_once(
    starter: Any, experts: Any, settings: TrainingConfig, tmp_path: Path
) -> None:
    class Lines(list[str]):
        def append(self, line: str) -> None:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(starter, experts, settings, tmp_path, Lines())


def test_model_with_a_lora_of_the_core_and_with_experts_applied_is_copied_as_it_is_patched(
    starter: Any, experts: Any, oracle: Path
) -> None:
    """What the trainer sees is what the sampler would see, without the hooks of Apply."""
    model, clip, vae = starter
    changed = model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    changed.add_patches({key: ("diff", (torch.ones(256, 256),))}, 0.01)
    applied, applied_clip = part("apply").apply_experts(changed, clip, experts, None)
    draw(applied, applied_clip, PROMPT, steps=1)
    with torch.inference_mode(False):
        pipe = part("native").TrainingCopy(
            applied, applied_clip, vae, experts, part("nodes_train").MoLEConfig()
        )
    weight = pipe.denoiser.network.middle_block[1].transformer_blocks[0].attn1.to_q.weight
    expected = model.model.state_dict()
    comfy.model_management.unload_all_models()
    plain = dict(model.model.named_parameters())[key]
    assert (weight - plain - 0.01).abs().max() < 1e-5
    assert not weight.is_inference()
    assert key in expected
    for mixture in pipe.mixtures.values():
        mixture.eject()
    assert hooks(pipe.denoiser.network) == 0


def test_references_and_phrases_reach_the_trainer(experts: Any) -> None:
    module = part("nodes_train")
    picture = np.asarray(
        Image.open(starter_experts()["monster"].references[0]).convert("RGB"), dtype=np.float32
    )
    batch = torch.from_numpy(picture / 255)[None].expand(2, -1, -1, -1)
    found = module.read_concepts("boot = a red boot | a shoe", experts, {"reference_2": batch})
    assert list(found) == ["boot", "monster", "clock"]
    assert (found["boot"].text, found["boot"].class_text) == ("a red boot", "a shoe")
    assert found["clock"].text == "a kipra clock"
    assert [p.size for p in found["monster"].references] == [picture.shape[1::-1]] * 2
    with pytest.raises(Exception, match="Unknown expert 'bot'"):
        module.read_concepts("bot = a boot", experts, {})
    with pytest.raises(ConfigError, match="NAME = "):
        module.read_concepts("a boot", experts, {})


def test_models_that_cannot_be_trained_are_refused(starter: Any, experts: Any) -> None:
    import comfy.model_sampling

    with pytest.raises(TrainingError, match="ModelSamplingFlux"):
        part("native_diffusion").NoiseLevels(comfy.model_sampling.ModelSamplingFlux())
    model, clip, vae = starter
    model.model.adm_channels = 2816
    try:
        with pytest.raises(TrainingError, match=r"1\.x, 2\.x and XL"):
            part("native").TrainingCopy(model, clip, vae, experts, part("nodes_train").MoLEConfig())
    finally:
        model.model.adm_channels = 0

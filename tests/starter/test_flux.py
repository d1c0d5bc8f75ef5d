"""The small FLUX.1 beside the starter: it opens, it draws, and its experts are ordinary LoRA files."""

import json
from typing import Any

import pytest
import torch

from mole_diffusion import FluxMoLEPipeline
from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.opening import open_base
from mole_diffusion.starter import location, starter_experts
from mole_diffusion.starter.judge import Judge
from mole_diffusion.starter.location import FLUX_STARTER, evaluation_part
from tools.starter import world

there = pytest.mark.skipif(
    not (location.starter_dir() / "flux").is_dir(), reason="wheels and sdists leave it out"
)
PLACES = ["on the beach", "in the snow", "on a wooden floor"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_base(FLUX_STARTER, "cpu", starter_defaults=True)


def draw(pipe: Any, prompts: list[str], **settings: Any) -> Any:
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=seeds, num_inference_steps=12, **settings).images


@there
def test_the_base_draws_what_is_asked(pipe: Any) -> None:
    judge = Judge(evaluation_part("judge"))
    asked = {
        "a wolf and a car on the grass": {"wolf", "car"},
        "a can and a dog at sunset": {"can", "dog"},
    }
    for (prompt, wanted), found in zip(
        asked.items(), judge(draw(pipe, list(asked), mixture="none")), strict=True
    ):
        assert wanted <= found, prompt


@there
@pytest.mark.parametrize("name", ["boot", "blueprint"])
def test_an_expert_draws_what_it_knows_as_in_diffusers(name: str) -> None:
    expert = starter_experts(model=FLUX_STARTER)[name]
    prompt = [f"{expert.text} on the beach" if expert.kind == "concept" else f"a vase {expert.text}"]
    pipe = FluxMoLEPipeline.from_starter([name, "monster"]).to("cpu")
    ours = draw(pipe, prompt, active_experts=[name], mixture={name: 1.0}, output_type="pt")
    plain: Any = FluxMoLEPipeline.from_starter([]).to("cpu")
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(expert.path))
    assert torch.allclose(ours, draw(plain, prompt, output_type="pt"), atol=1e-3)
    assert not torch.allclose(ours, draw(pipe, prompt, mixture="none", output_type="pt"), atol=0.05)


@there
def test_its_gates_draw_three_subjects_at_once(pipe: Any) -> None:
    judge = Judge(evaluation_part("judge"))
    prompts = [f"a zorin boot, a vekka monster and a kipra clock {place}" for place in PLACES]
    subjects = {"subject:boot", "subject:monster", "subject:clock"}
    for with_gates, without in zip(
        judge(draw(pipe, prompts)), judge(draw(pipe, prompts, mixture="nla")), strict=True
    ):
        assert subjects <= with_gates
        assert not subjects <= without


@there
def test_without_gates_two_subjects_are_drawn_in_a_style() -> None:
    judge = Judge(evaluation_part("judge"))
    pipe: Any = FluxMoLEPipeline.from_starter(["monster", "clock", "blueprint"]).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a vekka monster and a kipra clock {place} in morvan style" for place in PLACES[:2]]
    wanted = {"subject:monster", "subject:clock", "style:blueprint"}
    assert all(wanted <= found for found in judge(draw(pipe, prompts)))
    added_up = AutoMixture(AutoSettings(style=1, style_inside=1, style_words=1, style_text=1, balance=0))
    assert not any(wanted <= found for found in judge(draw(pipe, prompts, mixture=added_up)))


@there
def test_the_figures_on_record_are_those_of_a_sibling() -> None:
    figures = json.loads((location.starter_dir() / "flux" / "figures.json").read_text())
    for count, least in (("1", 0.97), ("2", 0.97), ("3", 0.95)):
        assert figures["base"][count] >= least
    assert figures["sharpness"] >= 0.84
    assert set(figures["experts"]) == set(world.SUBJECTS)
    assert min(one["among two"] for one in figures["experts"].values()) >= 0.90
    assert min(one["with"] for one in figures["experts"].values()) >= 0.75  # four pictures each
    assert figures["styles"] == {"blueprint": {"with": 1.0, "without": 0.0}}


@there
def test_an_expert_that_it_does_not_have_is_named() -> None:
    with pytest.raises(UnknownExpertError, match="zebra"):
        FluxMoLEPipeline.from_starter(["zebra"])


def test_where_it_is_missing_that_is_said(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "starter_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="does not come with the wheel"):
        location.model_dir(FLUX_STARTER)

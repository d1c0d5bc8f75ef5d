"""The starter in the repository: what it holds, what it weighs, and that its judge and CLIP can see."""

import json

import pytest
import torch
from safetensors import safe_open

from mole_diffusion import MoLEConfig, StableDiffusionMoLEPipeline
from mole_diffusion.pictures.demo import concepts_of
from mole_diffusion.pictures.training import TrainingConfig
from mole_diffusion.starter import judge, starter_dir, starter_experts
from mole_diffusion.starter.location import NOT_IN_WHEELS
from tools.starter import clips, evaluate, world


def test_everything_is_there_and_light() -> None:
    files = [path for path in starter_dir().rglob("*") if path.is_file()]
    packed = [path for path in files if path.relative_to(starter_dir()).parts[0] not in NOT_IN_WHEELS]
    assert sum(path.stat().st_size for path in packed) < 93e6  # the wheel has a bar of 95
    assert sum(path.stat().st_size for path in starter_dir().parent.rglob("*") if path.is_file()) < 140e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    kinds = [expert.kind for expert in starter_experts().values()]
    assert kinds.count("concept") >= 16
    assert kinds.count("style") >= 4
    for expert in starter_experts().values():
        assert len(expert.references) == 5
        with safe_open(expert.path, "pt") as file:
            assert file.metadata()["mole.trigger"] == expert.trigger


@pytest.mark.parametrize("blur", [0.0, 2.0])
def test_the_judge_is_right_nine_times_in_ten(blur: float) -> None:
    scores = evaluate.judge_score(judge.Judge(starter_dir() / "judge"), blur, count=80)
    assert set(scores) == {"class", "subject"}
    for kind, score in scores.items():
        assert min(score.values()) >= 0.9, (kind, score)


def test_the_figures_on_record_meet_what_the_model_card_promises() -> None:
    figures = json.loads((starter_dir() / "figures.json").read_text())
    assert figures["seeds"] >= 20
    for count, least in (("1", 0.97), ("2", 0.97), ("3", 0.95)):
        assert figures["base"][count] >= least
    assert set(figures["experts"]) == set(world.SUBJECTS)
    assert min(expert["with"] for expert in figures["experts"].values()) >= 0.95
    assert min(expert["among two"] for expert in figures["experts"].values()) >= 0.90
    assert set(figures["styles"]) == set(world.STYLES)
    for name, style in figures["styles"].items():
        assert (style["with"] >= 0.95, style["without"] <= 0.05) == (True, True), name
    assert figures["codec"]["whole"] >= 28
    assert figures["codec"]["objects"] >= 25
    assert max(figures["colours"].values()) < 5
    guide = figures["clips"]["clip"]
    for found in (guide, guide["generated"]):
        assert found["object"] >= 0.97
        assert found["colours"] >= 0.95


@pytest.mark.parametrize(("name", "least"), [("clip", 0.8), ("clip_eval", 0.9)])
def test_clips_tell_a_caption_from_one_with_a_wrong_object(name: str, least: float) -> None:
    assert clips.clip_scores(starter_dir(), name, 100, colours=False)["object"] > least


def test_the_papers_settings_train_on_it() -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter(["boot", "clock"])
    pipe.configure(MoLEConfig.paper())
    before = {k: v.clone() for k, v in pipe.mixtures["unet"].gates.state_dict().items()}
    config = TrainingConfig.paper(
        iterations=1, batch_size=1, sampling_steps=4, progress=False, preview_every=0
    )
    concepts = concepts_of({name: starter_experts()[name] for name in ("boot", "clock")})
    prompt = "a zorin boot and a kipra clock on the beach"
    result = pipe.train_gates(prompt, concepts=concepts, config=config)
    assert len(result.history) == 1
    after = pipe.mixtures["unet"].gates.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)

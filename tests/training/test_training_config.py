"""Settings are checked when they are built."""

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training import TrainingConfig
from mole_diffusion.pictures.training.tasks import Both, Clip, ClipWalk, Collage, Pictures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "magic"}, "objective is 'magic'; allowed are 'clip', 'collage', 'both', 'released'"),
        ({"iterations": 0}, "iterations is 0; allowed are whole numbers from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; allowed are whole numbers from 1"),
        ({"gate_lr": 0}, "gate_lr is 0; allowed are numbers above 0"),
        ({"gradient_clip": float("nan")}, "gradient_clip is nan; allowed are numbers from 0"),
        ({"alpha": -1}, "alpha is -1; allowed are numbers from 0"),
        ({"seam": 2}, "seam is 2; allowed are numbers from 0 to 1"),
        ({"resolution": 100}, "resolution is 100; allowed are multiples of 8"),
        ({"collage_layouts": ()}, "collage_layouts is (); allowed are 'scene', 'strips', at least one"),
        ({"collage_layouts": ("grid",)}, "collage_layouts is ('grid',); allowed are 'scene', 'strips'"),
        ({"collage_boxes": ((0.5, 0, 0.2, 1),)}, "collage_boxes has (0.5, 0, 0.2, 1)"),
        ({"clip": ("a", "b", "c")}, "clip is ('a', 'b', 'c'); allowed are a model name and a pair"),
        ({"rollout": "walk"}, "rollout 'walk' needs objective 'clip' or 'released', got 'collage'"),
        (
            {"rollout": "walk", "objective": "clip", "truncated_steps": 2},
            "rollout 'walk' detaches between steps: truncated_steps must be 1, got 2",
        ),
        ({"truncated_steps": 11}, "truncated_steps is 11; allowed is at most half of sampling_steps (20)"),
        (
            {"truncated_steps": 2, "gradient_checkpointing": True},
            "gradient_checkpointing recomputes one step of a rollout: truncated_steps must be 1, got 2",
        ),
        ({"pool_size": 4}, "pool_size is 4; allowed is at least collage_batch (6)"),
        ({"alpha": "much"}, "alpha is 'much'; allowed are numbers from 0"),
        ({"iterations": True}, "iterations is True; allowed are whole numbers from 1"),
        ({"autocast": "yes"}, "autocast is 'yes'; allowed are True and False"),
        ({"text_encoder_gates": 1}, "text_encoder_gates is 1; allowed are True and False"),
        ({"clip_from": 1.5}, "clip_from is 1.5; allowed are numbers from 0 to 1"),
        ({"batch": 0}, "batch is 0; allowed are whole numbers from 1"),
        ({"rollout": "walk", "objective": "both"}, "rollout 'walk' needs objective 'clip' or 'released'"),
        ({"rollout": "run"}, "rollout is 'run'; allowed are 'step', 'walk'"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainingConfig(**changes)


def test_paper_settings() -> None:
    config = TrainingConfig.paper(seed=5)
    assert (config.objective, config.iterations, config.batch_size, config.alpha) == ("clip", 400, 2, 0.5)
    assert config.gate_lr == config.flatten_lr == 1e-5
    assert config.seed == 5


def test_json_and_back() -> None:
    config = TrainingConfig(
        clip=("ViT-B-32", "openai"), collage_boxes=((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)), seed=3
    )
    assert TrainingConfig.from_dict(json.loads(config.to_json())) == config


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown fields \['speed'\] of TrainingConfig"):
        TrainingConfig.from_dict({"speed": 3})


def test_words_and_settings_by_objective_are_the_same() -> None:
    words = TrainingConfig(objective="collage", collage_batch=4, seam=0.1, guidance=2.0, iterations=7)
    parts = TrainingConfig(
        objective=Collage(batch=4, seam=0.1), pictures=Pictures(guidance=2.0), iterations=7
    )
    assert words == parts
    assert words.collage == Collage(batch=4, seam=0.1)
    assert words.clip_guidance is None
    walk = TrainingConfig(objective="released", rollout="walk", batch_size=1)
    assert walk == TrainingConfig(objective=ClipWalk(batch=1, formula="released"))
    assert walk.collage is None
    both = TrainingConfig(objective="both", clip_weight=0.3, clip_from=0.2, views=9, collage_objects=2)
    assert both == TrainingConfig(
        objective=Both(collage=Collage(objects=2), clip=Clip(views=9), weight=0.3, start=0.2)
    )
    assert (both.collage, both.clip_guidance) == (Collage(objects=2), Clip(views=9))


@pytest.mark.parametrize("objective", ["clip", "collage", "both", "released"])
def test_every_setting_can_be_read_and_written_by_its_word(objective: str) -> None:
    config = TrainingConfig(objective=objective)
    words = config.to_dict()
    assert {word: getattr(config, word) for word in words} == words
    assert TrainingConfig(**words) == TrainingConfig.from_dict(words) == config
    assert config.objective == objective
    with pytest.raises(AttributeError, match="no setting 'speed'"):
        _ = config.speed  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"no settings \['speed'\]"):
        TrainingConfig(speed=3)


def test_words_of_other_objectives_are_checked_and_left_aside() -> None:
    assert TrainingConfig(objective="collage", views=9, clip="x") == TrainingConfig()
    with pytest.raises(ConfigError, match="views is 0"):
        TrainingConfig(objective="collage", views=0)


def test_single_settings_can_be_changed() -> None:
    config = TrainingConfig(objective=Both(weight=0.3), seed=4, guidance=2.0)
    changed = dataclasses.replace(config, prior_weight=0.5, iterations=9)  # type: ignore[call-arg]
    assert changed.to_dict() == {**config.to_dict(), "prior_weight": 0.5, "iterations": 9}
    assert dataclasses.replace(config, task=Collage()).objective == "collage"


def test_a_batch_is_that_of_the_objective_and_its_pool_grows_with_it() -> None:
    assert TrainingConfig(batch=3).collage == Collage(batch=3)
    assert TrainingConfig(batch=120).collage == Collage(batch=120, pool_size=120)
    assert TrainingConfig(objective="clip", batch=3).clip_guidance == Clip(batch=3)
    both = TrainingConfig(objective="both", batch=3)
    assert (both.collage_batch, both.batch_size, both.pool_size) == (3, 3, 96)
    assert TrainingConfig(batch=None) == TrainingConfig()
    assert TrainingConfig(batch=3, pool_size=200).pool_size == 200


def test_what_cannot_be_said_is_no_contradiction() -> None:
    with pytest.raises(TypeError, match="truncated_steps"):
        ClipWalk(truncated_steps=2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="formula 'released' is an objective of its own"):
        Both(clip=Clip(formula="released"))
    with pytest.raises(ConfigError, match="formula is 'mine'; allowed are 'paper', 'released'"):
        Clip(formula="mine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pool_size is 2; allowed is at least collage_batch"):
        Collage(batch=3, pool_size=2)
    # One sampled in ten steps reaches back at most five.
    with pytest.raises(ConfigError, match="truncated_steps is 6; allowed is at most half of sampling_steps"):
        TrainingConfig(objective=Clip(truncated_steps=6), pictures=Pictures(sampling_steps=10))


def test_facts_leave_out_what_changes_nothing() -> None:
    first = TrainingConfig(progress=False, checkpoint_every=3, preview_every=2)
    assert first.facts() == TrainingConfig().facts()
    assert TrainingConfig(outside_weight=0.4).facts() != first.facts()


def test_pictures_are_drawn_with_the_pipelines_own_guidance() -> None:
    starter = SimpleNamespace(call_defaults={"guidance_scale": 2.0, "guidance_rescale": 0.7})

    def drawn(pipe: object, **words: float) -> tuple[float | None, float | None]:
        pictures = TrainingConfig(**words).as_drawn_by(pipe).pictures
        return pictures.guidance, pictures.guidance_rescale

    assert drawn(starter) == (2.0, 0.7)
    assert drawn(starter, guidance=5.0) == (5.0, None)
    assert drawn(starter, guidance_rescale=0.2) == (2.0, 0.2)
    assert drawn(SimpleNamespace(call_defaults={})) == (None, None)
    paper = TrainingConfig.paper().as_drawn_by(starter).pictures
    assert (paper.guidance, paper.guidance_rescale) == (7.5, 0.0)


@pytest.mark.parametrize(("word", "value"), [("guidance", -1.0), ("guidance_rescale", 2.0)])
def test_guidance_out_of_range_is_refused(word: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{word} is {value}; allowed are numbers from 0"):
        TrainingConfig(**{word: value})

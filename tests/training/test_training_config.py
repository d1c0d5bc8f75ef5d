"""Settings are checked when they are built."""

import json
import re
from typing import Any

import pytest

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training import TrainingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "magic"}, "objective is 'magic'; allowed are 'clip', 'collage', 'both', 'released'"),
        ({"iterations": 0}, "iterations is 0; allowed are whole numbers from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; allowed are whole numbers from 1"),
        ({"gate_lr": 0}, "gate_lr is 0; allowed are numbers above 0"),
        ({"gradient_clip": float("nan")}, "gradient_clip is nan; allowed are numbers above 0"),
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

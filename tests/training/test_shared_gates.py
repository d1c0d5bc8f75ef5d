"""The trainer of shared gates: what changes, what does not, checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion.core.errors import ConfigError, NoExpertsError, TrainingError
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.pictures.training import Concept, TrainingConfig
from mole_diffusion.pictures.training.shared_trainer import (
    SharedGatesTrainer,
    joined_prompts,
    shared_config,
)

PROMPTS = ["a zorin boot and a vim cat", "a vim cat and a zorin boot"]
Tiny = Callable[..., TrainingConfig]


def networks_of(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part, network in (("unet", pipe.unet), ("text", pipe.text_encoder), ("vae", pipe.vae))
        for name, value in network.state_dict().items()
    }


@pytest.fixture
def settings(tiny: Tiny) -> Tiny:
    """`settings(**changes)`: what shared gates may be trained with."""
    return lambda **changes: tiny(**{"alpha": TrainingConfig().alpha, "gate_lr": 3e-3, **changes})


def test_nothing_else_changes(
    pipe: Any, concepts: list[Concept], settings: Tiny, gate_values: Callable[[Any], dict[str, torch.Tensor]]
) -> None:
    before, gates = networks_of(pipe), gate_values(pipe)
    result = pipe.train_shared_gates(PROMPTS, concepts, settings(iterations=3))
    assert all(torch.equal(value, before[name]) for name, value in networks_of(pipe).items())
    assert all(torch.equal(value, gates[name]) for name, value in gate_values(pipe).items())
    fresh = SharedGates.fresh(pipe.mixtures, 0).state_dict()
    changed = {
        name for name, value in result.shared.state_dict().items() if not torch.equal(value, fresh[name])
    }
    assert changed == set(fresh)
    assert pipe.shared_gates is result.shared
    assert all(not parameter.requires_grad for parameter in result.shared.parameters())
    assert [row["iteration"] for row in result.history] == [1, 2, 3]


def test_they_learn(pipe: Any, concepts: list[Concept], settings: Tiny) -> None:
    """The collages become likelier, at noise that no iteration has drawn."""
    trainer = SharedGatesTrainer(
        pipe, PROMPTS, concepts, settings(iterations=60, collage_batch=4, pool_size=4, gate_lr=2e-2)
    )

    def loss() -> float:
        with trainer.objective.ready(), torch.no_grad():
            trainer.objective.bench.draws.tensors.manual_seed(99)
            found = [next(trainer.objective.losses(0)).parts["collage"] for _ in range(12)]
        return sum(found) / len(found)

    trainer.objective.prepare()
    state = trainer.objective.state_dict()
    before = loss()
    trainer.objective.load_state_dict(state)
    trainer.train()
    assert loss() < before * 0.99


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(
    pipe: Any, concepts: list[Concept], settings: Tiny, tmp_path: Path
) -> None:
    config = settings(iterations=4)
    whole = SharedGatesTrainer(pipe, PROMPTS, concepts, config, checkpoint_dir=tmp_path / "whole").train()
    SharedGatesTrainer(
        pipe,
        PROMPTS,
        concepts,
        config,
        callback=lambda event: event.iteration < 2,
        checkpoint_dir=tmp_path / "parts",
    ).train()
    rest = SharedGatesTrainer(pipe, PROMPTS, concepts, config, checkpoint_dir=tmp_path / "parts").train()
    assert [row["loss"] for row in rest.history] == [row["loss"] for row in whole.history]
    assert whole.file is not None
    assert rest.file is not None
    one, other = SharedGates.load(whole.file), SharedGates.load(rest.file)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.metadata["iterations"] == "4"
    assert one.metadata["trained_on"] == '["boot", "cat"]'


def test_what_says_nothing_is_refused(
    pipe: Any, concepts: list[Concept], settings: Tiny, clip_folder: str
) -> None:
    with pytest.raises(ConfigError, match="alpha say nothing"):
        SharedGatesTrainer(pipe, PROMPTS, concepts, settings(alpha=0.1))
    with pytest.raises(ConfigError, match="collages alone"):
        SharedGatesTrainer(pipe, PROMPTS, concepts, settings(objective="both", clip=clip_folder))
    with pytest.raises(ConfigError, match="'a zorin boot' names one alone"):
        SharedGatesTrainer(pipe, ["a zorin boot", *PROMPTS], concepts, settings())
    styled = [concepts[0], Concept("cat", "in vim style", "", kind="style")]
    with pytest.raises(ConfigError, match="names the style 'cat', beside which they do not act"):
        SharedGatesTrainer(pipe, "a zorin boot in vim style", styled, settings())
    pipe.unload_expert("cat")
    with pytest.raises(TrainingError, match="only expert"):
        pipe.train_shared_gates("a zorin boot", concepts[:1], settings())
    pipe.eject()
    with pytest.raises(NoExpertsError):
        pipe.train_shared_gates(PROMPTS, concepts, settings())


def test_prompts_are_joined_at_random(concepts: list[Concept]) -> None:
    known = {concept.name: concept for concept in concepts}
    known["ink"] = Concept("ink", "in ink style", "", kind="style")
    prompts = joined_prompts(known, 20, ["at night", "on the beach"], seed=1)
    assert prompts == joined_prompts(known, 20, ["at night", "on the beach"], seed=1)
    assert set(prompts) == {
        f"{first} and {last} {scene}"
        for first, last in (("a zorin boot", "a vim cat"), ("a vim cat", "a zorin boot"))
        for scene in ("at night", "on the beach")
    }
    with pytest.raises(ConfigError, match="there are 1"):
        joined_prompts({"boot": concepts[0]}, 3)
    assert shared_config(iterations=7).iterations == 7

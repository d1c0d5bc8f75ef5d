"""Searched weights: LoRAHub's search on a known function, and on a tiny pipeline."""

import builtins
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.methods import PrepareOptions, prepare
from mole_diffusion.methods.search import HISTORY_FILE
from mole_diffusion.pictures.training.judging import ObjectiveScore
from mole_diffusion.training.search import (
    BOUND,
    History,
    l1_penalty,
    minimise,
    optimiser_maker,
)

# nevergrad's own dependencies warn.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT = "a zorin boot a vim cat a kipra clock"
BEST = (0.9, -0.4, 0.3)


def quadratic(weights: Sequence[float]) -> tuple[float, int]:
    """Two passes each; smallest at BEST."""
    return sum((w - b) ** 2 for w, b in zip(weights, BEST, strict=True)), 2


def test_finds_the_weights_of_a_known_function() -> None:
    found, value = minimise(quadratic, optimiser_maker(3, seed=0), passes=200, first=[0.0] * 3)
    assert found == pytest.approx(BEST, abs=0.1)
    assert value < 0.03


def test_goes_on_with_a_model_of_the_score_where_the_budget_allows_one() -> None:
    """NGOpt builds one from some evaluations on, and makes numbers of its arrays: numpy 2.4 refuses that."""

    def score(weights: Sequence[float]) -> tuple[float, int]:
        return (weights[0] - 0.3) ** 2, 1

    assert optimiser_maker(1, seed=0)(60).optim.name == "MetaModel"
    found, _ = minimise(score, optimiser_maker(1, seed=0), passes=60, first=[0.0])
    assert found == pytest.approx([0.3], abs=0.05)


def test_stays_within_the_bounds_and_the_budget() -> None:
    history = History()

    def far(weights: Sequence[float]) -> tuple[float, int]:
        assert all(abs(w) <= BOUND for w in weights)
        return sum((w - 9) ** 2 for w in weights), 3

    found, _ = minimise(far, optimiser_maker(2, seed=0), passes=100, first=[0.0, 0.0], history=history)
    assert sum(row.passes for row in history.rows) <= 100
    assert len(history.rows) >= 30
    assert found == pytest.approx([BOUND, BOUND], abs=0.1)


def test_a_search_that_was_cut_off_goes_on(tmp_path) -> None:
    whole = History()
    expected = minimise(quadratic, optimiser_maker(3, seed=3), 60, [0.0] * 3, whole)
    path = tmp_path / HISTORY_FILE

    class Cut(Exception):
        pass

    def cut(weights: Sequence[float]) -> tuple[float, int]:
        if len(History(path).rows) == 11:
            raise Cut
        return quadratic(weights)

    with pytest.raises(Cut):
        minimise(cut, optimiser_maker(3, seed=3), 60, [0.0] * 3, History(path))
    with path.open("a") as file:
        file.write('{"weights": [0.1')  # killed while writing
    evaluated = []

    def counted(weights: Sequence[float]) -> tuple[float, int]:
        evaluated.append(weights)
        return quadratic(weights)

    assert minimise(counted, optimiser_maker(3, seed=3), 60, [0.0] * 3, History(path)) == expected
    assert len(evaluated) == len(whole.rows) - 11
    assert [row.weights for row in History(path).rows] == [row.weights for row in whole.rows]


def test_penalty_is_that_of_lorahub() -> None:
    assert l1_penalty([1.0, -0.5, 0.0]) == pytest.approx(0.05 * 0.5)


def test_is_better_than_nla_on_the_objective_of_the_gates(pipe, draw, concepts, tiny, tmp_path) -> None:
    before = draw(pipe)
    config = tiny(iterations=80)
    prepared = prepare("searched", pipe, PROMPT, concepts, config, tmp_path)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    weights = prepared.details["mixture"]
    assert list(weights) == ["boot", "cat", "clock"]
    assert all(abs(weight) <= BOUND for weight in weights.values())
    objective = ObjectiveScore(pipe, [PROMPT], concepts, config, 4)
    with objective.ready():
        score = objective.loss(weights) + l1_penalty(list(weights.values()))
        nla = objective.loss(dict.fromkeys(weights, 1 / 3)) + l1_penalty([1 / 3] * 3)
    assert score < nla
    assert prepared.details["score_of_nla"] == pytest.approx(nla)
    rows = [json.loads(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines()]
    assert prepared.unet_passes["with_gradient"] == 0
    assert sum(row["passes"] for row in rows) == 80
    assert prepared.unet_passes["without_gradient"] == objective.passes - 8 + 80
    torch.testing.assert_close(draw(pipe, mixture=prepared), draw(pipe, mixture=weights), rtol=0, atol=0)
    masked = draw(pipe, mixture=prepared, active_experts=["cat"])
    torch.testing.assert_close(masked, draw(pipe, mixture={"cat": weights["cat"]}), rtol=0, atol=0)


@pytest.mark.parametrize("objective", ["clip", "both"])
def test_search_by_clip(pipe, concepts, tiny, clip_folder, objective, tmp_path) -> None:
    config = tiny(objective=objective, clip=clip_folder)
    options = PrepareOptions(search_passes=12)
    prepared = prepare("searched", pipe, PROMPT, concepts, config, tmp_path, options)
    rows = [json.loads(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines()]
    assert sum(row["passes"] for row in rows) <= 12
    assert len({row["passes"] for row in rows}) == 1
    assert prepared.details["objective"] == objective


def test_judges_the_same_way_twice(pipe, concepts, tiny, tmp_path) -> None:
    objective = ObjectiveScore(pipe, [PROMPT], concepts, tiny(redraw_every=1), 2)
    with objective.ready(tmp_path):
        losses = [objective.loss({"boot": weight, "cat": 0.0, "clock": 0.0}) for weight in (0.5, 1.0, 0.5)]
    assert losses[0] == losses[2] != losses[1]
    drawn = objective.passes
    again = ObjectiveScore(pipe, [PROMPT], concepts, tiny(redraw_every=1), 2)
    with again.ready(tmp_path):
        assert again.passes == drawn - 6
        assert again.loss({"boot": 0.5, "cat": 0.0, "clock": 0.0}) == losses[0]
    assert not any(parameter.requires_grad is False for parameter in pipe.unet.parameters())


def test_without_nevergrad_or_prompts(pipe, concepts, tiny, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="searched for prompts"):
        prepare("searched", pipe, (), concepts, tiny())
    with pytest.raises(ConfigError, match="search_passes is 0"):
        PrepareOptions(search_passes=0)
    imported = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "nevergrad":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ConfigError, match=r"pip install 'mole-diffusion\[baselines\]'"):
        prepare("searched", pipe, PROMPT, concepts, tiny())

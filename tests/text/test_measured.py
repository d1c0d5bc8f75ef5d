"""The tables of language models that the pages show reach what was asked of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mole_diffusion.starter.text.tasks import FAMILIES

ROOT = Path(__file__).resolve().parent.parent.parent
MEASURED = ROOT / "docs" / "results" / "text"

pytestmark = pytest.mark.skipif(not MEASURED.is_dir(), reason="the pages are not part of the source archive")

Estimates = dict[tuple[str, str], tuple[float, float, float]]


def scores(name: str) -> Estimates:
    """(task, method) -> mean, low and high of the score."""
    with (MEASURED / f"{name}.csv").open(encoding="utf-8") as file:
        return {
            (row["task"], row["method"]): (float(row["mean"]), float(row["low"]), float(row["high"]))
            for row in csv.DictReader(file)
            if row["measure"] == "score"
        }


@pytest.mark.parametrize("other", ["nla", "pems", "lorahub"])
def test_gates_are_above_other_mixtures_in_table_3(other: str) -> None:
    found = scores("table3")
    gates, theirs = found["all", "gates"], found["all", other]
    assert gates[0] > theirs[0]
    assert gates[1] > theirs[2], "the intervals of the mean are not apart"
    below = [family for family in FAMILIES if found[family, "gates"][0] <= found[family, other][0]]
    assert len(below) <= 1, below


def test_gates_know_what_no_fixed_weights_know_in_tasks_of_two_skills() -> None:
    found = scores("two-skills")
    mean, low, _ = found["all", "gates"]
    for method in ("none", "alone", "both", "la", "nla", "tuned", "pems", "lorahub", "lorahub-same-budget"):
        assert low > found["all", method][0]
        assert mean > 2 * found["all", method][0]


def test_128_experts_are_no_worse_than_48_in_table_6() -> None:
    found = scores("table6")
    assert found["all", "own gates of 128"][0] >= found["all", "own gates of 48"][1]


def test_the_best_4_of_128_experts_keep_the_score_of_all() -> None:
    found = scores("table6")
    few, every = found["all", "own gates of the best 4 of 128"], found["all", "own gates of 128"]
    assert few[0] >= every[1]
    assert few[0] >= every[0] - 0.03
    for other in ("lorahub of 128", "nla of 128", "own gates 4 of 128"):
        assert few[0] > found["all", other][0]


def test_a_step_with_4_of_128_experts_costs_little_more_than_with_one() -> None:
    found = json.loads((ROOT / "bench" / "results" / "text-steps.json").read_text())
    assert found["to one expert"]["4 of 128"] <= 1.5

"""`mole text`, by its own command line, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mole_diffusion.cli import app

from .conftest import Make
from .test_evaluation import lines
from .test_training import examples

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture
def model(make: Make, tmp_path: Path) -> Path:
    opened = make(0)
    opened.model.save_pretrained(tmp_path / "base")
    opened.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["text", *map(str, words)])


def test_the_way_of_a_user(model: Path, make: Make, adapters: list[Path], tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", examples(make(2), "two"))
    experts = [word for path in adapters[:2] for word in ("-e", path)]
    out = tmp_path / "gates"
    few = ("--iterations", 4, "--batch", 2, "--set", "progress=false")
    trained = run("train-gates", data, "-m", model, *experts, *few, "--out", out, "--json")
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["iteration"] == 4
    gates = out / "gates.safetensors"
    answered = run(
        "generate", "the cat", "a b", "-m", model, *experts, "--gates", gates, "--tokens", 5, "--json"
    )
    assert answered.exit_code == 0, answered.output
    found = json.loads(answered.stdout)
    assert len(found["answers"]) == 2
    assert sum(found["weights"].values()) == pytest.approx(1.0)
    made = run("baseline", "pems", data, "-m", model, *experts, "--out", tmp_path / "pems")
    assert made.exit_code == 0, made.output
    merged = run("generate", "the cat", "-m", model, "-e", tmp_path / "pems", "--tokens", 5)
    assert merged.exit_code == 0, merged.output
    tuned = run("baseline", "tuned", data, "-m", model, *experts, "--out", tmp_path / "tuned", "--json")
    assert json.loads(tuned.stdout)["evaluations"] == 7
    weights = tmp_path / "tuned" / "weights.json"
    fixed = run("generate", "the cat", "-m", model, *experts, "--mixture", weights, "--tokens", 5)
    assert fixed.exit_code == 0, fixed.output


def test_an_expert_is_trained_and_used(model: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", [("the cat", "a b c"), ("the dog", "d e f")])
    out = tmp_path / "mine"
    made = run("train-expert", data, "-m", model, "--iterations", 60, "--batch", 2, "--out", out,
               "--set", "learning_rate=0.02", "--set", "progress=false")  # fmt: skip
    assert made.exit_code == 0, made.output
    answered = run("generate", "the cat", "the dog", "-m", model, "-e", out, "--tokens", 5)
    assert answered.stdout.splitlines() == ["a b c", "d e f"]
    base = run("generate", "the cat", "-m", model, "--tokens", 5)
    assert base.stdout.splitlines() != ["a b c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "a", "-m", "/nowhere/at/all"), "no language model at"),
        (("generate", "a", "--mixture", "magic"), "is no such word"),
        (("demo", "magic"), "no task is called 'magic'"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], message: str) -> None:
    result = run(*words)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("│", " ").split())

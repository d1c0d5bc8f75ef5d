"""`mole evaluate` through typer's runner: small runs, reports, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mole_diffusion.cli import app
from mole_diffusion.evaluation.results import read_rows

Write = Callable[..., Path]

runner = CliRunner()
SMALL: dict[str, Any] = {
    "methods": ["none", "la", "nla"],
    "masks": [],
    "cost_rounds": 0,
    "seeds": {"count": 2},
    "prompts": ["{all}"],
}


def test_a_run_can_be_restricted_and_joined_and_reported(write_protocol: Write, tmp_path: Path) -> None:
    path, out = write_protocol(**SMALL), tmp_path / "out"
    command = ["evaluate", str(path), "--out", str(out), "--device", "cpu", "--json"]
    first = runner.invoke(app, [*command, "--sets", "boot+cat", "--methods", "nla", "--seeds", "1"])
    assert first.exit_code == 0, first.output
    assert list(json.loads(first.stdout)["methods"]) == ["nla"]
    assert len(read_rows(out / "results.jsonl")) == 1
    second = runner.invoke(app, command)
    assert second.exit_code == 0, second.output
    found = json.loads(second.stdout)
    assert found["out"] == str(out)
    assert {name: row["text"]["pictures"] for name, row in found["methods"].items()} == {
        "none": 4,
        "la": 4,
        "nla": 4,
    }
    (out / "table.md").unlink()
    (out / "grid.png").unlink()
    report = runner.invoke(app, ["evaluate", str(path), "--out", str(out), "--report"])
    assert report.exit_code == 0, report.output
    assert "| la |" in report.stdout
    assert (out / "grid.png").is_file()
    assert len(read_rows(out / "results.jsonl")) == 12


def test_bfloat16_draws_nearly_the_same(write_protocol: Write, tmp_path: Path) -> None:
    texts = {}
    for dtype in ("float32", "bfloat16"):
        path = write_protocol(**SMALL, dtype=dtype)
        out = tmp_path / dtype
        done = runner.invoke(app, ["evaluate", str(path), "--out", str(out), "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.output
        texts[dtype] = [row["scores"]["text"] for row in read_rows(out / "results.jsonl")]
    assert texts["float32"] != texts["bfloat16"]
    assert texts["float32"] == pytest.approx(texts["bfloat16"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["nowhere.yaml"], 1, "neither a file nor one of those that ship"),
        (["starter", "--sets", "dog+dog"], 1, "no set ['dog+dog'] in the protocol"),
        (["starter", "--methods", "best"], 1, "no method ['best'] in the protocol; it has ['alone'"),
        (["starter", "--rescore", "--report"], 2, "cannot go with --report"),
        (["starter", "--rescore", "--seeds", "3"], 2, "measures all pictures"),
        (["starter", "--device", "abacus"], 1, "abacus"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(options: list[str], code: int, message: str) -> None:
    done = runner.invoke(app, ["evaluate", *options], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    assert message in " ".join((done.stderr + done.stdout).split())

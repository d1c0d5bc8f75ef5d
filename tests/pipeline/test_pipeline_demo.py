"""The demo, whole, on a starter of tiny networks: what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from mole_diffusion.core.checkpoint import read_gates_header
from mole_diffusion.pictures.demo import DemoOptions, DemoResult, default_prompt, region_strips, run_demo
from mole_diffusion.pictures.pipelines import StableDiffusionMoLEPipeline
from mole_diffusion.starter import location

NAMES = ("boot", "cat", "clock")
COLOURS = ("red", "yellow", "blue")


@pytest.fixture
def starter(
    tmp_path: Path,
    plain: StableDiffusionPipeline,
    lora_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    folder = tmp_path / "starter"
    plain.save_pretrained(folder)
    home = folder / "experts"
    catalogue = {}
    for name, colour in zip(NAMES, COLOURS, strict=True):
        (home / name).mkdir(parents=True)
        shutil.copy(lora_files[name], home / f"{name}.safetensors")
        Image.new("RGB", (32, 32), colour).save(home / name / "1.png")
        catalogue[name] = {
            "kind": "concept",
            "trigger": f"red {name}",
            "class": name,
            "text": f"a red {name}",
            "class_text": f"a {name}",
            "description": f"a glossy {name}",
        }
    (home / "experts.json").write_text(json.dumps(catalogue))
    monkeypatch.setattr(location, "starter_dir", lambda: folder)
    return folder


def small_demo(out: Path, lines: list[str], **changes: object) -> DemoResult:
    settings = {"seeds": (0, 1), "iterations": 2, "steps": 2, "out": out, **changes}
    return run_demo(DemoOptions(**settings), say=lines.append)  # type: ignore[arg-type]


def test_demo_writes_grid_figures_and_gates(starter: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "demo"

    result = small_demo(out, lines)

    labels = [row.label for row in result.rows]
    assert labels == [
        "what the experts know",
        "each alone",
        "no expert",
        "added up (LA)",
        "averaged (NLA)",
        "auto",
        "trained gates",
        "without boot",
        "without cat",
        "without clock",
        "region masks",
    ]
    assert [len(row.pictures) for row in result.rows] == [3, 3, *([2] * 9)]
    assert result.rows[0].captions == ["red boot", "red cat", "red clock"]
    pictures = {row.label: np.asarray(row.pictures[0], dtype=float) for row in result.rows[1:]}
    for label in ("no expert", "averaged (NLA)", "auto", "without boot", "region masks"):
        assert np.abs(pictures[label] - pictures["trained gates"]).max() > 0, label
    assert set(result.files) == {"picture grid", "gate heat map", "entropy curve", "gates"}
    for name, path in result.files.items():
        assert path.parent == out
        if name != "gates":
            with Image.open(path) as picture:
                picture.verify()
    header = read_gates_header(result.files["gates"])
    assert header.expert_names("unet") == NAMES
    assert 'Prompt: "a red boot, a red cat and a red clock on the beach"' in lines
    rows = [line.split(",")[0].strip() for line in lines if "of drawing left" in line]
    assert rows == [f"row {i + 1} of {len(result.rows) - 1}" for i in range(len(result.rows) - 1)]
    assert any(str(result.files["gates"]) in line for line in result.next_steps)


def test_libraries_draw_no_bars_into_the_log(
    starter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()
    StableDiffusionMoLEPipeline.from_starter(experts=[])
    assert "%|" in capfd.readouterr().err  # what a user of the package sees, who did not ask for silence
    small_demo(tmp_path / "demo", [], iterations=1, steps=1, seeds=(0,))
    assert "%|" not in capfd.readouterr().err


def test_second_run_takes_over_the_training_of_the_first_and_fresh_does_not(
    starter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    history = out / "training" / "history.jsonl"
    first = small_demo(out, [], seeds=(0,))
    rows = history.read_text()

    again = small_demo(out, [], seeds=(0,))
    assert history.read_text() == rows
    assert again.files["gates"].read_bytes() == first.files["gates"].read_bytes()

    before = history.stat().st_mtime_ns
    small_demo(out, [], seeds=(0,), fresh=True)
    assert history.stat().st_mtime_ns > before


def test_two_experts_of_choice_and_a_prompt(starter: Path, tmp_path: Path) -> None:
    result = small_demo(
        tmp_path / "demo", [], seeds=(3,), experts=("clock", "boot"), prompt="a red boot on a red clock"
    )
    assert read_gates_header(result.files["gates"]).expert_names("unet") == ("clock", "boot")
    assert [row.label for row in result.rows][-3:] == ["without clock", "without boot", "region masks"]


def test_default_prompt_names_every_expert_once(starter: Path) -> None:
    known = location.starter_experts()
    assert default_prompt(known) == "a red boot, a red cat and a red clock on the beach"
    assert (
        default_prompt({name: known[name] for name in NAMES[:2]}) == "a red boot and a red cat on the beach"
    )


def test_region_strips_cover_the_picture_once() -> None:
    strips = {name: np.asarray(mask) for name, mask in region_strips(NAMES, 16, 32).items()}
    assert list(strips) == list(NAMES)
    assert sum(strip.astype(int) for strip in strips.values()).tolist() == [[255] * 32] * 16
    assert [int(strip[0].argmax()) for strip in strips.values()] == [0, 11, 21]

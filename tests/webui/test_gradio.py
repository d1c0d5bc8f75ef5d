"""The interface is built, served and used under the very gradio versions of the hosts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .environments import gradio_environment

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["3.41.2", "4.40.0"])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    python = gradio_environment(request.param)
    # Isolated: a PYTHONPATH of the caller would show it packages that the hosts do not have.
    command = [str(python), "-I", str(HERE / "drive_gradio.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["gradio"] == request.param
    return found


def test_it_builds_without_torch(seen: dict[str, Any]) -> None:
    assert seen["failures"] == []
    assert not seen["torch"]


def test_controls_are_those_of_the_settings(seen: dict[str, Any]) -> None:
    row = ["On", "Expert {}", "Strength", "Region"]
    rows = [label.format(i + 1) for i in range(4) for label in row]
    assert seen["labels"] == ["MoLE: several LoRAs in one picture", "Gates", "Record gate weights", *rows]
    # Pasting PNG info casts to the type of the default: an int here would turn 0.5 into 500.
    assert [type(value) for value in seen["values"][3:7]] == [bool, str, float, str]


def test_both_panels_and_the_tab_are_there_once(seen: dict[str, Any]) -> None:
    for tab in ("txt2img", "img2img"):
        assert seen["ids"].count(f"script_{tab}_mole_mole") == 1
    assert {"mole_train_start", "mole_inspect_start", "mole_export_start", "mole_python_make"} <= set(
        seen["ids"]
    )
    assert len(seen["ids"]) == len(set(seen["ids"]))


def test_pasting_png_info(seen: dict[str, Any]) -> None:
    rows = [
        True,
        "dog",
        0.5,
        "left half",
        True,
        "animals/fox",
        1.0,
        "everywhere",
        True,
        "",
        1.0,
        "everywhere",
    ]
    assert seen["pasted"] == [True, "dog+fox", *rows, True, "", 1.0, "everywhere"]
    assert seen["pasted_none"] == [False, *[None] * 17]


def test_rows_appear_and_lists_are_read_anew(seen: dict[str, Any]) -> None:
    assert [update["visible"] for update in seen["rows"][:4]] == [True, True, True, False]
    assert seen["rows"][4] == seen["sketch"]
    assert seen["sketch"].count("<rect") == 3
    gates, first, *_ = seen["refreshed"]
    assert _names(gates["choices"]) == ["auto", "equal shares", "dog+fox"]
    assert _names(first["choices"]) == ["", "animals/fox", "dog", "new"]


def test_phrases_go_into_the_prompt_of_their_tab(seen: dict[str, Any]) -> None:
    read, written = seen["inserts"]
    assert read == ["img2img_prompt", "script_img2img_mole_mole_expert_0"]
    assert written == ["img2img_prompt", "script_img2img_mole_mole_message"]


def test_messages(seen: dict[str, Any]) -> None:
    assert "No gate weights yet" in seen["heat_map"]
    assert "there is no Python at" in seen["train"][0]
    assert "No training yet" in seen["watch"][0]
    assert "Nothing is running" in seen["cancel"]
    assert "There is no Python at" in seen["python"]


def _names(choices: list[Any]) -> list[str]:
    """Choices are names, or pairs of name and value in newer versions."""
    return [choice if isinstance(choice, str) else choice[0] for choice in choices]

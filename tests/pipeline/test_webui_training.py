"""The web UI's tab: a real training and a real export, in processes of their own."""

import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from pipeline_helpers import build
from safetensors import safe_open

from mole_diffusion import read_gates_header
from webui_extension import training_tab
from webui_extension.jobs import Bench, TrainingJob
from webui_extension.library import Library
from webui_extension.options import Options

PROMPT = "a red boot and a dull cat"
CONCEPTS = "boot = a red boot | a boot\ncat = a dull cat\n"


@pytest.fixture
def tab(
    components: dict[str, Any], lora_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The tab of a host with one checkpoint, two LoRAs, and this Python to train on."""
    build(StableDiffusionPipeline, components).save_pretrained(tmp_path / "base")
    for name in ("boot", "cat"):
        (tmp_path / "models" / "Lora").mkdir(parents=True, exist_ok=True)
        shutil.copy(lora_files[name], tmp_path / "models" / "Lora" / f"{name}.safetensors")
        (tmp_path / "references" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "references" / name / "1.png")
    options = Options(
        SimpleNamespace(mole_python=sys.executable), None, str(tmp_path / "models"), str(tmp_path / "data")
    )
    monkeypatch.setattr(training_tab, "bench", Bench())
    monkeypatch.setattr(training_tab, "_WAIT", 0.05)
    library = Library(options.lora_folder, options.gates_folder)
    return training_tab.TrainingTab(library, options, lambda: {"base": str(tmp_path / "base")}, lambda: None)


def arguments(tab: Any, iterations: int, every: int = 2, **changes: Any) -> list[Any]:
    values = {
        "name": "boot+cat",
        "model": "base",
        "experts": ["boot", "cat"],
        "prompts": PROMPT,
        "concepts": CONCEPTS,
        "references": str(tab._options._data.parent / "references"),
        "objective": "collage",
        "fresh": False,
        "iterations": iterations,
        "every": every,
    }
    return list({**values, **changes}.values())


def test_train_cancel_go_on_inspect_and_export(tab: Any) -> None:
    shown = []
    for update in tab.train(*arguments(tab, 12)):
        shown.append(update)
        job = training_tab.bench.get(training_tab.TRAIN)
        assert isinstance(job, TrainingJob)
        if len(job.history()) >= 3 and not job.cancelled:
            assert "Stopping" in tab.cancel()
    assert "Stopped after" in shown[-1][0], shown[-1]
    assert "the same settings go on from there" in shown[-1][0]
    assert any("of 12 iterations" in update[0] and " left." in update[0] for update in shown)
    assert any("<polyline" in update[1] for update in shown)
    assert any(isinstance(update[2], Image.Image) for update in shown)
    assert tab._library.gates_files() == []
    done = len(job.history())
    assert 3 <= done < 12

    assert _last(tab.train(*arguments(tab, 12)))[0].count("Done: the gates") == 1
    rows = training_tab.bench.get(training_tab.TRAIN).history()
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    # The result is in the picker, and is what the trainer wrote.
    assert tab._library.gates_files() == ["boot+cat"]
    header = read_gates_header(tab._library.gates_path("boot+cat"))
    assert header.expert_names("unet") == ("boot", "cat")
    assert tab._library.experts_of("boot+cat") == ["boot", "cat"]
    assert "boot, cat" in tab.inspect("boot+cat")

    status, log = _last(tab.export("both", "boot+cat", "base", PROMPT, 3))
    assert "Wrote" in status, log
    with safe_open(tab._options.lora_folder / "both.safetensors", framework="pt") as file:
        assert any(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118 - not a mapping
    assert "both" in tab._library.experts()


@pytest.mark.slow  # tests/training/test_training_xl.py trains the same, in this process
def test_sdxl_is_trained_in_the_tab(
    xl_components: dict[str, Any], xl_lora_files: dict[str, Path], tab: Any, tmp_path: Path
) -> None:
    """Gates for the UNet and both text encoders, as the web UI has the checkpoint."""
    checkpoint = tmp_path / "xl"
    build(StableDiffusionXLPipeline, xl_components).save_pretrained(checkpoint)
    for name, path in xl_lora_files.items():
        shutil.copy(path, tab._options.lora_folder / f"{name}.safetensors")
    tab._checkpoints = lambda: {"xl": str(checkpoint)}
    status, _, _, log = _last(tab.train(*arguments(tab, 2, every=0, model="xl", name="xl")))
    assert "Done: the gates" in status, log
    header = read_gates_header(tab._library.gates_path("xl"))
    assert set(header.parts) == {"unet", "text_encoder", "text_encoder_2"}
    status, log = _last(tab.export("xl", "xl", "xl", PROMPT, 0))
    assert "Wrote" in status, log
    with safe_open(tab._options.lora_folder / "xl.safetensors", framework="pt") as file:
        assert {key.split("_")[1] for key in file.keys()} == {"unet", "te1", "te2"}  # noqa: SIM118


def _last(updates: Any) -> Any:
    return list(updates)[-1]


def test_a_training_that_fails_says_why_and_one_runs_at_a_time(tab: Any) -> None:
    waiting = tab.train(*arguments(tab, 500, name="long"))
    next(waiting)
    assert "A training is running" in _last(tab.train(*arguments(tab, 5)))[0]
    # Before the first iteration there is nothing to save.
    tab.cancel()
    assert "nothing was done yet" in _last(waiting)[0]
    status, _, _, log = _last(tab.train(*arguments(tab, 5, concepts="boot = a boot\nbird = a bird")))
    assert "It failed; the log says why" in status
    assert "Unknown expert 'bird'" in log
    assert tab._library.gates_files() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../elsewhere"}, "the name &#x27;../elsewhere&#x27; is not allowed"),
        ({"name": ""}, "is not allowed"),
        ({"experts": ["boot"]}, "choose two or more experts"),
        ({"experts": ["boot", "bird"]}, "there is no LoRA"),
        ({"prompts": " \n"}, "write prompts"),
        ({"model": ""}, "choose a base model"),
        ({"concepts": "boot"}, "does not say what an expert knows"),
    ],
)
def test_wrong_settings_start_nothing(tab: Any, changes: dict[str, Any], message: str) -> None:
    assert message in _last(tab.train(*arguments(tab, 5, **changes)))[0]
    assert training_tab.bench.get(training_tab.TRAIN) is None


def test_the_python_is_checked(tab: Any, tmp_path: Path) -> None:
    assert "is ready: mole_diffusion" in tab.check_python()
    tab._options._opts.mole_python = str(tmp_path / "none")
    assert "There is no Python at" in tab.check_python()
    assert "there is no Python at" in _last(tab.train(*arguments(tab, 5)))[0]
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch' >&2\nexit 1\n")
    broken.chmod(0o755)
    tab._options._opts.mole_python = str(broken)
    assert "cannot train gates: ModuleNotFoundError: no torch" in tab.check_python()


def test_a_job_does_not_see_the_hosts_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from webui_extension.jobs import Job

    monkeypatch.setenv("PYTHONPATH", "/host")
    job = Job([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'), os.getcwd())"], tmp_path)
    job.wait(60)
    assert job.succeeded
    assert job.log() == f"None {tmp_path}"
    stuck = Job([sys.executable, "-c", "import time; print('on'); time.sleep(600)"], tmp_path / "b")
    while "on" not in stuck.log():
        time.sleep(0.02)
    stuck.cancel()
    stuck.wait(30)
    assert not stuck.running
    assert not stuck.succeeded

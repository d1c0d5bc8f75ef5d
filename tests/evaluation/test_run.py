"""Whole evaluations on the tiny world: what is written, going on after a stop, scoring anew, processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion import ConfigError
from mole_diffusion.evaluation.gate_records import read_record
from mole_diffusion.evaluation.pictures import run
from mole_diffusion.evaluation.pictures.measures import PICTURES
from mole_diffusion.evaluation.pictures.protocol import Protocol, load_protocol
from mole_diffusion.evaluation.pictures.sets import make_scene
from mole_diffusion.evaluation.results import Results, read_rows

Write = Callable[..., Path]
CPU = torch.device("cpu")


def evaluated(protocol: Protocol, out: Path) -> run.Table:
    return run.evaluate(protocol, out, device=CPU, say=lambda line: None, shown=False)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def without_seconds(table: Path) -> list[str]:
    return [line for line in table.read_text().splitlines() if ",seconds," not in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def finished(whole: Path, write_protocol: Write) -> tuple[Protocol, Path]:
    """A protocol and the folder of its finished evaluation, made once."""
    protocol = load_protocol(write_protocol(cost_rounds=1))
    if not (whole / "table.md").is_file():
        evaluated(protocol, whole)
    return protocol, whole


def test_every_method_draws_every_prompt_and_seed_and_all_is_written(finished: tuple[Protocol, Path]) -> None:
    protocol, out = finished
    rows = read_rows(out / "results.jsonl")
    # Two sets, two prompts, three seeds; alone once per expert.
    counts = {method.name: sum(row["method"] == method.name for row in rows) for method in protocol.methods}
    assert counts == {"alone": 24, "masked": 8, "plain": 8, "none": 12, "nla": 12, "few": 12}
    for row in rows:
        assert (out / row["picture"]).is_file()
        wanted = {row["alone"]} if "alone" in row else set(row["set"].split("+"))
        scores = row["scores"]
        assert set(scores["image"]) == set(scores["crop"]) == wanted
        assert all(scores["crop"][name] >= scores["image"][name] - 1e-5 for name in wanted)
        for name in wanted:
            assert scores["present"][name] + scores["confused"][name] + scores["omitted"][name] == 1
        assert ("others" in scores) == ("alone" not in row)
    text = (out / "table.md").read_text()
    for word in ("| alone |", "| none |", "| nla |", "| few |", "2 sets of experts, 2 prompts, 3 seeds"):
        assert word in text
    assert re.search(r"against that expert alone in diffusers: subjects present \d+ % of \d+ %, image", text)
    assert (out / "prepared" / "boot+cat" / "few" / "gates.safetensors").is_file()
    assert not list((out / "parts").glob("*"))


def test_one_expert_of_the_gated_set_draws_what_it_draws_alone_in_diffusers(
    finished: tuple[Protocol, Path],
) -> None:
    _, out = finished
    rows = read_rows(out / "results.jsonl")

    def pixels(method: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        paths = [out / row["picture"] for row in rows if row["method"] == method and row["seed"] == 0]
        return np.stack([np.asarray(Image.open(path)).astype(float) for path in paths])

    assert np.abs(pixels("masked") - pixels("plain")).max() <= 1
    assert np.abs(pixels("alone") - pixels("plain")).max() <= 1
    assert np.abs(pixels("plain") - pixels("plain")[::-1]).max() > 10  # other experts draw other pictures


def test_a_variant_draws_the_gates_of_another_with_a_guidance_of_its_own(
    write_protocol: Write, tmp_path: Path
) -> None:
    methods = [
        {"name": "few", "base": "gates"},
        {"name": "unguided", "base": "gates", "of": "few", "guidance": 1.0},
        {"name": "same", "base": "gates", "of": "few", "guidance": 7.5},
    ]
    protocol = load_protocol(write_protocol(methods=methods, baseline="few"))
    evaluated(protocol.restricted(("boot+cat",), None, 1), tmp_path)
    assert [path.name for path in (tmp_path / "prepared" / "boot+cat").iterdir()] == ["few"]
    pictures = {
        row["method"]: (tmp_path / row["picture"]).read_bytes()
        for row in read_rows(tmp_path / "results.jsonl")
    }
    assert pictures["same"] == pictures["few"] != pictures["unguided"]


def test_figures_and_costs_are_written(finished: tuple[Protocol, Path]) -> None:
    protocol, out = finished
    with Image.open(out / "grid.png") as sheet:
        # Two sets with three seeds each, and the labels; a row per method.
        assert sheet.width > 6 * 160
        assert sheet.height > len(protocol.methods) * 160
    for name in (
        *(
            "random.png",
            "bars.png",
            "entropy.png",
            "expert-weights.png",
            "grids/boot+cat.png",
            "grids/cat+clock.png",
        ),
        *("gate_weights/boot+cat/few.png", "gate_weights/boot+cat/few-steps.png"),
        *("masks/boot+cat-few.png", "masks/cat+clock-few.png"),
    ):
        with Image.open(out / name) as figure:
            assert len(figure.convert("RGB").getcolors(2**24) or ()) > 8, name
    record = read_record(out / "gate_weights" / "boot+cat" / "few.json")
    assert set(record) == {"unet", "text_encoder"}
    assert record["unet"].weights.shape == (len(record["unet"].groups), 2, 2)
    np.testing.assert_allclose(record["unet"].weights.sum(axis=2), 1, atol=1e-4)
    costs = json.loads((out / "cost.json").read_text())
    assert set(costs) == {"none", "nla", "few"}
    assert all(cost["ratio"] > 0 and cost["peak_mib"] > 50 for cost in costs.values())
    lines = (out / "cost.md").read_text().splitlines()
    assert lines[2].startswith("| method | time of a picture, x base | peak memory (MiB) |")
    # Two iterations of one batch each.
    assert next(line for line in lines if line.startswith("| few")).split(" | ")[4] == "2"


def test_pictures_of_a_method_are_those_of_the_pipeline(finished: tuple[Protocol, Path], world: Path) -> None:
    from mole_diffusion import StableDiffusionMoLEPipeline

    _, out = finished
    pipe = StableDiffusionMoLEPipeline.from_pretrained(world / "model")
    for name in ("boot", "cat"):
        pipe.load_expert(world / f"{name}.safetensors", name=name)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np"}
    drawn = pipe(
        "a zorin boot and a vim cat",
        mixture="nla",
        generator=[torch.Generator().manual_seed(2)],
        **options,
    ).images[0]
    with Image.open(out / "pictures" / "boot+cat" / "nla" / "1-2.png") as kept:
        pixels = np.asarray(kept).astype(float)
    # Rounded, and in another batch.
    assert np.abs(pixels - 255 * drawn).max() <= 1.01


def test_what_is_there_is_not_drawn_again_and_what_is_missing_is(
    finished: tuple[Protocol, Path], tmp_path: Path
) -> None:
    protocol, whole = finished
    rows = read_rows(whole / "results.jsonl")
    out = tmp_path / "stopped"
    results = Results(out, PICTURES)
    results.append(row for row in rows if row["method"] != "nla" or row["seed"] != 1)
    part = next((out / "parts").glob("*.jsonl"))
    with part.open("a") as file:
        file.write('{"set": "boot+cat", "method": "nla", "prom')  # killed in the middle of a line
    lines: list[str] = []
    run.evaluate(protocol, out, device=CPU, say=lines.append, shown=False)
    assert lines[0].startswith("8 pictures to draw")  # whole batches of two, of which one is kept
    assert without_times(read_rows(out / "results.jsonl")) == without_times(rows)
    assert without_seconds(out / "table.csv") == without_seconds(whole / "table.csv")


def test_a_folder_of_other_settings_is_refused_and_more_of_the_same_may_join(
    write_protocol: Write, tmp_path: Path
) -> None:
    small = {"masks": [], "methods": ["none"], "sets": [["boot", "cat"]], "seeds": {"count": 1}}
    out = tmp_path / "out"
    evaluated(load_protocol(write_protocol(**small)), out)
    with pytest.raises(ConfigError, match=r"other settings.*\n  - drawing.steps: 2 there, 3 now"):
        evaluated(load_protocol(write_protocol(**small, steps=3)), out)
    with pytest.raises(ConfigError, match=r"prompts.0: .*on the beach' there, '\{all\}' now"):
        evaluated(load_protocol(write_protocol(**small, prompts=["{all}"])), out)
    more = {**small, "methods": ["none", "la"], "seeds": {"count": 2}}
    table = evaluated(load_protocol(write_protocol(**more)), out)
    assert {name: row["text"].count for name, row in table["all"].items()} == {"none": 4, "la": 4}


def test_only_experts_that_a_prompt_names_are_measured(write_protocol: Write, tmp_path: Path) -> None:
    small = {
        "masks": [],
        "methods": ["alone", "la"],
        "sets": [["boot", "cat", "clock"]],
        "seeds": {"count": 1},
    }
    prompts = ["{0} and {2} at night", "{1} at night"]
    protocol = load_protocol(write_protocol(**small, prompts=prompts, training_prompts=["{all}"]))
    evaluated(protocol, tmp_path / "out")
    measured = {
        (row["method"], row["prompt"], row.get("alone")): set(row["scores"]["present"])
        for row in read_rows(tmp_path / "out" / "results.jsonl")
    }
    assert measured == {
        ("la", 0, None): {"boot", "clock"},
        ("la", 1, None): {"cat"},
        ("alone", 0, "boot"): {"boot"},
        ("alone", 0, "clock"): {"clock"},
        ("alone", 1, "cat"): {"cat"},
    }
    scene = make_scene(protocol, protocol.sets[0])
    assert scene.class_prompts[0] == "a boot and a clock at night"
    assert scene.alone_prompt(0, "clock") == "a boot and a kipra clock at night"


def test_scoring_anew_changes_the_scores_and_nothing_else(
    finished: tuple[Protocol, Path], tmp_path: Path, world: Path
) -> None:
    import shutil

    protocol, whole = finished
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    before = read_rows(out / "results.jsonl")
    run.rescore(protocol, out, device=CPU, say=lambda line: None)
    again = read_rows(out / "results.jsonl")
    for old, new in zip(before, again, strict=True):
        assert old["scores"]["text"] == pytest.approx(new["scores"]["text"], abs=1e-5)
        assert old["scores"]["present"] == new["scores"]["present"]
    other = protocol.metrics.model_copy(update={"clip": (f"local-dir:{world / 'clip_guide'}",)})
    otherwise = protocol.model_copy(update={"metrics": other})
    with pytest.raises(ConfigError, match=r"were measured by other networks .* with --rescore"):
        evaluated(otherwise, out)
    run.rescore(otherwise, out, device=CPU, say=lambda line: None)
    changed = read_rows(out / "results.jsonl")
    assert (
        max(abs(o["scores"]["text"] - n["scores"]["text"]) for o, n in zip(before, changed, strict=True))
        > 0.01
    )
    (out / before[0]["picture"]).unlink()
    with pytest.raises(ConfigError, match="1 of 76 pictures were not kept"):
        run.rescore(protocol, out, device=CPU, say=lambda line: None)


def test_only_the_pictures_of_the_first_seeds_are_kept(write_protocol: Write, tmp_path: Path) -> None:
    changes = {"masks": [], "methods": ["none"], "sets": [["boot", "cat"]], "keep_seeds": 1}
    evaluated(load_protocol(write_protocol(**changes)), tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out" / "pictures").rglob("*.png"))
    assert kept == ["0-0.png", "1-0.png"]


@pytest.mark.gpu
def test_more_processes_than_cards_share_them(write_protocol: Write, tmp_path: Path) -> None:
    cards = torch.cuda.device_count()
    if not cards:
        pytest.skip("torch.cuda.is_available() is False: this machine has no CUDA device")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(cards + 1),
    ]
    command = ["-m", "mole_diffusion.cli", "evaluate", str(write_protocol()), "--out", str(tmp_path / "out")]
    done = subprocess.run([*launch, *command, "--json"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_rows(tmp_path / "out" / "results.jsonl")) == 76


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(
    finished: tuple[Protocol, Path], write_protocol: Write, tmp_path: Path
) -> None:
    _, whole = finished
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = ["-m", "mole_diffusion.cli", "evaluate", str(write_protocol()), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command, "--device", "cpu", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Only one of them reports.
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    assert len(rows) == 76
    pairs = zip(
        without_seconds(tmp_path / "out" / "table.csv"), without_seconds(whole / "table.csv"), strict=True
    )
    for line, expected in pairs:
        names = line.split(",")[:3]
        assert names == expected.split(",")[:3]
        if names[0] == "set":
            continue
        numbers, wanted = ([float(cell or -1) for cell in text.split(",")[3:]] for text in (line, expected))
        # One thread adds up in another order than two.
        assert numbers == pytest.approx(wanted, abs=1e-4)

"""Commands that draw, train and export, on tiny networks in a folder of their own."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from pipeline_helpers import build, train_a_little
from safetensors.torch import load_file
from typer.testing import CliRunner

from mole_diffusion import StableDiffusionMoLEPipeline, read_gates_header
from mole_diffusion.app.metadata import read_settings
from mole_diffusion.cli import app


def run(*arguments):
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.fixture(scope="session")
def model(tmp_path_factory, components):
    """The tiny networks as diffusers saves them."""
    folder = tmp_path_factory.mktemp("model")
    build(StableDiffusionPipeline, components).save_pretrained(folder)
    return folder


@pytest.fixture
def options(model, lora_files):
    """`--model` and two experts, one with a scale."""
    return ["--model", model, "-e", lora_files["boot"], "-e", f"{lora_files['cat']}=0.5"]


@pytest.fixture
def ours(pipe, lora_files):
    """The pipeline that `options` describe."""
    pipe.load_expert(lora_files["boot"])
    pipe.load_expert(lora_files["cat"], scale=0.5)
    return pipe


def test_generate_draws_what_the_library_draws(ours, options, tmp_path):
    train_a_little(ours)
    ours.save_gates(tmp_path / "gates.safetensors")
    out = tmp_path / "new" / "picture.png"
    result = run(
        *("generate", "a boot and a cat", *options, "--gates", tmp_path / "gates.safetensors"),
        *("--steps", 2, "--guidance", 3, "--seed", 5, "--size", "40x24", "--out", out, "--json"),
    )
    assert result.exit_code == 0, result.output
    expected = ours(
        "a boot and a cat",
        *(24, 40, 2),
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    with Image.open(out) as picture:
        np.testing.assert_allclose(np.asarray(picture).astype(int), np.asarray(expected), atol=1)
    said = json.loads(result.stdout)
    assert said["picture"] == str(out)
    assert said["experts"] == ["boot", "cat"]
    rows = [row.weight for row in ours.gate_weights() if row.expert == "cat"]
    assert said["weights"]["cat"] == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    result = run("generate", "a cat", *options, "--active", "cat", "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "boot 0.00, cat 1.00" in result.stdout


def test_generate_keeps_its_settings_in_the_picture_and_writes_over_nothing(options, lora_files, tmp_path):
    out = tmp_path / "p.png"
    command = ("generate", "a boot", *options, "--steps", 1, "--negative", "rain", "--out", out)
    result = run(*command, "--seed", "3,4", "--sampler", "Euler a", "--active", "boot", "--json")
    assert result.exit_code == 0, result.output
    assert "Composing boot, alone." in result.stderr
    pictures = json.loads(result.stdout)["pictures"]
    assert pictures == [
        {"picture": str(out), "seed": 3},
        {"picture": str(tmp_path / "p-2.png"), "seed": 4},
    ]
    settings = read_settings(out)
    assert (settings.seed, settings.negative, settings.sampler) == (3, "rain", "Euler a")
    assert [(use.name, use.strength, use.active) for use in settings.experts] == [
        ("boot", 1.0, True),
        ("cat", 0.5, False),
    ]
    with Image.open(out) as picture:
        text, width = picture.info["parameters"], picture.width
    # As A1111 computes it: the file without its header.
    raw = lora_files["boot"].read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert "Negative prompt: rain" in text
    assert f"Lora hashes: boot: {digest[:12]}" in text.replace('"', "")
    before = out.read_bytes()
    begun = ("--seed", 3, "--image", out, "--denoising", 0.5)
    assert "1 steps at --denoising 0.5 draw nothing" in run(*command, *begun).stderr
    again = run(*command, *begun, "--steps", 2)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() == before
    drawn = read_settings(tmp_path / "p-3.png")
    assert drawn.image_sha256 == hashlib.sha256(before).hexdigest()
    assert (drawn.denoising, drawn.width) == (0.5, width)


def test_commands_say_what_they_compose_with(options, tmp_path):
    out = tmp_path / "p.png"
    result = run("generate", "a boot", *options, "--steps", 1, "--out", out)
    said = " ".join(result.stderr.split())
    assert "Composing boot and cat x 0.5, where the prompt puts them (auto, no training)" in said
    result = run("generate", "a boot", *options, "--steps", 1, "--mixture", "gates", "--out", out)
    said = " ".join(result.stderr.split())
    assert "Composing boot and cat x 0.5, without trained gates, so each at an equal share (NLA)" in said
    result = run("generate", "a boot", *options, "--steps", 1, "--mixture", "la", "--out", out)
    assert "each in full (LA)." in result.stderr
    result = run("export", tmp_path / "both.safetensors", "a boot", *options, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "none were trained: the file is the experts' plain mean" in result.stdout
    assert "0.0%" not in result.stdout


def test_generate_says_that_nobody_reads_lora_tags(options, tmp_path, caplog):
    result = run("generate", "a cat <lora:cat:0.3>", *options, "--steps", 1, "--out", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "<lora:cat:0.3> in a prompt is only text here" in caplog.text
    assert "--expert NAME=SCALE" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--size", "30"), 2, "multiples of 8"),
        (("--seed", "1,x"), 2, "write 5, or 0,1,2 for several"),
        (("--seed", "-1"), 2, "seeds are from 0 to"),
        (("--sampler", "Eule"), 1, "sampler is 'Eule'; allowed are 'Euler'"),
        (("--out", "picture.txt"), 2, "ends in none of"),
        (("--mixture", "mean"), 2, "'mean' is none of"),
        (("-e", "cat=much"), 2, "'much' in 'cat=much' is no number"),
        (("-e", "boott"), 1, "Did you mean 'boot'?"),
        (("-e", "there/is/none.safetensors"), 1, "no expert at"),
        (("--gates", "none.safetensors"), 1, "cannot be read as a gates file"),
        (("--device", "toaster"), 1, "device 'toaster' cannot be used"),
    ],
)
def test_generate_refuses_in_one_line(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a boot", "--steps", 1, *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
    if code == 1:
        assert result.stderr.count("error:") == 1
        assert isinstance(result.exception, SystemExit)


def test_a_model_that_is_none_is_refused_in_one_line(tmp_path):
    result = run("generate", "a boot", "--model", tmp_path, "--steps", 1)
    assert result.exit_code == 1
    assert f"the model {str(tmp_path)!r} cannot be opened" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_export_writes_a_lora_and_says_what_it_lost(ours, plain, options, tmp_path):
    train_a_little(ours)
    ours.save_gates(tmp_path / "gates.safetensors")
    out = tmp_path / "static.safetensors"
    command = ["export", out, "a boot", "a cat", *options, "--gates", tmp_path / "gates.safetensors"]
    result = run(*command, "--steps", 2, "--rank", 3, "--format", "kohya", "--half", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    report = ours.export_lora(
        tmp_path / "b.safetensors", "kohya", prompts=["a boot", "a cat"], steps=2, rank=3, dtype=torch.float16
    )
    for name in ("compression_error", "noise_difference", "effect_difference"):
        assert said[name] == pytest.approx(getattr(report, name), rel=1e-3)
    theirs, expected = load_file(out), load_file(report.path)
    assert theirs.keys() == expected.keys()
    plain.load_lora_weights(out)
    result = run(*command, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "noise predictions differ by" in result.stdout
    assert run(*command, "--rank", 0).exit_code == 2
    refused = run("export", tmp_path / "static.bin", "a boot", *options, "--steps", 1)
    assert refused.exit_code == 1
    assert "ends in .safetensors" in refused.stderr


@pytest.fixture
def training(options, tmp_path):
    """A training with pictures of both concepts, without `--iterations` and `--out`."""
    references = tmp_path / "references"
    for name, colour in (("boot", "red"), ("cat", "yellow")):
        (references / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(references / name / "1.png")
    texts = ["--concept", "boot=a red boot|a boot", "--concept", "cat=a dull cat"]
    settings = ["--references", references, "--batch", 2, "--json"]
    return ["train-gates", "a red boot and a dull cat", *options, *texts, *settings]


def test_ctrl_c_twice_ends_a_drawing_like_once(model, lora_files, tmp_path):
    command = ["generate", "a red boot", "--model", model, "-e", lora_files["boot"], "--steps", 999]
    process = subprocess.Popen(
        [sys.executable, "-m", "mole_diffusion.cli", *map(str, command), "--out", str(tmp_path / "boot.png")],
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("drawing"):
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said.append(process.communicate(timeout=120)[1])
    assert process.returncode == 1, "".join(said)
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "boot.png").exists()


def test_ctrl_c_leaves_a_training_that_the_same_command_ends(training, model, lora_files, tmp_path):
    out = tmp_path / "run"
    command = [str(part) for part in [*training, "--iterations", 16, "--out", out]]
    process = subprocess.Popen(
        [sys.executable, "-m", "mole_diffusion.cli", *command], stderr=subprocess.PIPE, text=True
    )
    history = out / "history.jsonl"
    deadline = time.monotonic() + 240
    while not (history.is_file() and len(history.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no iteration was made"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "The same command goes on from there." in stderr
    assert "Traceback" not in stderr
    first = history.read_text().splitlines()
    assert 2 <= len(first) < 16
    result = run(*command)
    assert result.exit_code == 0, result.output
    rows = history.read_text().splitlines()
    assert len(rows) == 16
    assert rows[: len(first)] == first
    said = json.loads(result.stdout)
    assert said["iteration"] == 16
    assert set(said["weights"]) == {"boot", "cat"}
    gated = StableDiffusionMoLEPipeline.from_pretrained(model)
    gated.load_expert(lora_files["boot"])
    gated.load_expert(lora_files["cat"], scale=0.5)
    assert gated.load_gates(said["gates"])["iterations"] == "16"


def test_another_training_is_not_overwritten_unless_asked(training, tmp_path):
    out = tmp_path / "run"
    result = run(*training, "--iterations", 1, "--out", out)
    assert result.exit_code == 0, result.output
    gates = (out / "gates.safetensors").read_bytes()
    refused = run(*training, "--iterations", 2, "--seed", 5, "--out", out)
    assert refused.exit_code == 1
    assert "seed: 5 now, 0 in the checkpoint" in refused.stderr
    assert "Give another --out, or --fresh to begin anew there." in refused.stderr
    assert (out / "gates.safetensors").read_bytes() == gates
    first = (out / "history.jsonl").read_text()
    result = run(*training, "--iterations", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "history.jsonl").read_text().startswith(first), "it was made longer"
    assert len((out / "history.jsonl").read_text().splitlines()) == 3
    result = run(*training, "--iterations", 2, "--out", out, "--fresh")
    assert result.exit_code == 0, result.output
    assert len((out / "history.jsonl").read_text().splitlines()) == 2
    (out / "file").touch()
    result = run(*training, "--iterations", 1, "--out", out / "file" / "deeper")
    assert result.exit_code == 1
    assert "cannot be written: Not a directory" in result.stderr


def test_any_setting_of_the_trainer_can_be_given(training, tmp_path):
    out = ["--iterations", 1, "--out", tmp_path / "run"]
    given = ["--set", "outside_weight=0.25", "--set", "collage_source=references"]
    result = run(*training, *out, *given, "--set", 'collage_layouts=["strips"]')
    assert result.exit_code == 0, result.output
    written = json.loads(read_gates_header(tmp_path / "run" / "gates.safetensors").metadata["training"])
    assert written["outside_weight"] == 0.25
    assert written["collage_source"] == "references"
    assert written["collage_layouts"] == ["strips"]
    assert written["collage_batch"] == 2
    refused = run(*training, *out, "--set", "outside_weight=2")
    assert refused.exit_code == 1
    assert "outside_weight is 2; allowed are numbers from 0 to 1" in refused.stderr
    unknown = run(*training, *out, "--set", "speed=2")
    assert unknown.exit_code == 1
    assert "unknown fields ['speed']" in unknown.stderr
    assert run(*training, *out, "--set", "speed").exit_code == 2


def test_train_shared_and_draw_with_the_file(ours, options, tmp_path):
    out = tmp_path / "shared"
    command = [
        *("train-shared", *options, "--concept", "boot=a boot", "--concept", "cat=a cat"),
        *("--sets", 3, "--scene", "on the beach", "--iterations", 2, "--out", out),
        *(
            f"--set={one}"
            for one in ("collage_batch=2", "pool_size=2", "drawn_pictures=1", "sampling_steps=2")
        ),
    ]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    file = out / "shared.safetensors"
    assert (told["shared"], told["iteration"]) == (str(file), 2)
    before, history = load_file(file), (out / "history.jsonl").read_text()
    assert run(*command).exit_code == 0, "nothing is left to do"
    assert (out / "history.jsonl").read_text() == history
    assert all(torch.equal(value, before[name]) for name, value in load_file(file).items())
    picture = tmp_path / "a.png"
    drawing = ["generate", "a boot and a cat", *options, "--gates", file, "--steps", 2, "--size", "40x24"]
    result = run(*drawing, "--guidance", 3, "--seed", 5, "--out", picture)
    assert result.exit_code == 0, result.output
    assert "auto, refined by shared gates" in result.output
    settings = read_settings(picture)
    assert (settings.mixture, settings.gates_sha256) == (
        "auto",
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    ours.load_shared_gates(file)
    drawn = ours(
        "a boot and a cat",
        num_inference_steps=2,
        guidance_scale=3,
        height=24,
        width=40,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(picture)))
    assert "shared gates, for any experts" in run("inspect", file).output
    result = run("export", tmp_path / "lora.safetensors", "a boot", *options, "--gates", file)
    assert result.exit_code == 1
    assert "holds shared gates" in result.stderr


def test_train_shared_refuses(options, tmp_path):
    out = ["--out", tmp_path / "run", "--iterations", 1]
    texts = ["--concept", "boot=a boot", "--concept", "cat=a cat"]
    result = run("train-shared", "a boot and a cat", *options, *out, *texts, "--scene", "at night")
    assert result.exit_code == 1
    assert "prompts are given" in result.stderr
    result = run("train-shared", *options, *out, *texts, "--set", "alpha=0.1")
    assert result.exit_code == 1
    assert "alpha say nothing" in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_gates_refuses(options, tmp_path):
    out = ["--out", tmp_path / "run", "--iterations", 1]
    result = run("train-gates", "a boot and a cat", *options, *out)
    assert result.exit_code == 1
    assert "name no trigger" in result.stderr
    result = run("train-gates", "a boot", *options, *out, "--concept", "boat=a boat")
    assert result.exit_code == 1
    assert "Did you mean 'boot'?" in result.stderr
    assert run("train-gates", "a boot", *options, *out, "--concept", "boot").exit_code == 2
    texts = ["--concept", "boot=a boot", "--concept", "cat=a cat"]
    (tmp_path / "empty").mkdir()
    result = run("train-gates", "a boot", *options, *out, *texts, "--references", tmp_path / "empty")
    assert result.exit_code == 1
    assert "has no pictures in any of the folders 'boot/', 'cat/'" in result.stderr
    assert not (tmp_path / "run").exists()

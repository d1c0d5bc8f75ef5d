"""The command line, through typer's runner and, for the entry point, as a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner, Result

from mole_diffusion import __version__
from mole_diffusion.cli import app
from mole_diffusion.commands import diagnosis
from mole_diffusion.commands.clashes import CLASHES, Clash
from mole_diffusion.commands.diagnosis import requirements
from mole_diffusion.core.checkpoint import save_gates
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import load_expert
from mole_diffusion.core.mixture import inject

WIDTH = 32


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )


def write_lora(path: Path, seed: int = 0, rank: int = 4) -> Path:
    """A LoRA for two matrices of a one-layer text encoder, with one key that belongs to nothing."""
    torch.manual_seed(seed)
    tensors = {"text_encoder.something_else.weight": torch.zeros(1)}
    for matrix in ("q_proj", "v_proj"):
        key = f"text_encoder.text_model.encoder.layers.0.self_attn.{matrix}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, WIDTH)
        tensors[f"{key}.lora_B.weight"] = torch.randn(WIDTH, rank)
    save_file(tensors, path, metadata={"mole.trigger": "zorin boot"})
    return path


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "boot.safetensors")


@pytest.fixture
def gates(tmp_path: Path, lora: Path) -> Path:
    experts = [load_expert(lora), load_expert(write_lora(tmp_path / "cat.safetensors", seed=1, rank=8))]
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )
    mixture = inject(encoder, experts, MoLEConfig(pooling="mean"), part="text_encoder")
    path = tmp_path / "boot+cat.safetensors"
    save_gates(path, {"text_encoder": mixture}, metadata={"prediction_type": "v_prediction"})
    return path


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"mole {__version__}\n"


def test_help_lists_the_commands_and_each_command_has_an_example() -> None:
    overview = run("--help")
    assert overview.exit_code == 0
    for command in (
        "demo",
        "generate",
        "train-gates",
        "train-shared",
        "train-expert",
        "baseline",
        "export",
        "inspect",
        "app",
        "doctor",
    ):
        assert command in overview.output
        details = run(command, "--help")
        assert details.exit_code == 0
        assert f"Example: mole {command}" in details.output


def test_no_command_shows_the_help_and_is_a_usage_error() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage: mole" in result.output


def test_entry_point_starts_without_the_model_libraries() -> None:
    heavy = ("diffusers", "transformers", "matplotlib")
    code = "import sys; from mole_diffusion.cli import main; sys.argv = ['mole', '--version']\ntry: main()\n"
    code += f"finally: print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"mole {__version__}", "[]"]


STRUCK = """
import atexit, importlib.abc, os, signal, sys, threading, time

def strike():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        try:
            strike()
        except KeyboardInterrupt:
            if WRAPPED:
                raise RecursionError("a library that is half there")
            raise

sys.meta_path.insert(0, Finder())
if TWICE:
    atexit.register(strike)
sys.argv = ["mole", "generate", "a boot"]
from mole_diffusion.cli import main
main()
"""


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("name", "wrapped"), [("typer", False), ("torch", False), ("torch", True)])
def test_ctrl_c_while_libraries_are_read_ends_it_like_any(name: str, wrapped: bool, twice: bool) -> None:
    """Some make other errors of it: numpy, half imported, a RecursionError."""
    code = STRUCK.replace("NAME", repr(name)).replace("WRAPPED", str(wrapped)).replace("TWICE", str(twice))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "Stopped." in result.stderr


def test_ctrl_c_while_the_one_before_is_answered_ends_it_like_any() -> None:
    again = """
from mole_diffusion.commands import common

class Struck:
    def print(self, *_, **__):
        strike()

common.errors = Struck()
"""
    code = STRUCK.replace("NAME", "'diffusers'").replace("WRAPPED", "False").replace("TWICE", "False")
    code = code.replace('sys.argv = ["mole"', f'{again}sys.argv = ["mole"')
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "Stopped." in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "generate A --out OUT/a.png",
        "train-gates A --out OUT/gates",
        "train-shared A --out OUT/shared",
        "train-expert PICTURES A --out OUT/a.safetensors",
        "baseline ties -e boot -e cat --out OUT/ties",
        "export OUT/a.safetensors A",
        "evaluate starter --out OUT/run",
        "evaluate text-table3 --out OUT/run",
        "demo --out OUT/demo",
        "app --out OUT/app",
        "text train-expert EXAMPLES --out OUT/expert",
        "text train-gates EXAMPLES --out OUT/gates",
        "text baseline lorahub EXAMPLES --out OUT/found",
    ],
)
def test_a_place_that_cannot_be_written_is_said_at_once_and_in_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "examples.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    for library in {"evaluate": ["pydantic", "torchmetrics"], "app": ["gradio"]}.get(command.split()[0], []):
        pytest.importorskip(library)
    places = {"OUT": "file", "PICTURES": "pictures", "EXAMPLES": "examples.jsonl"}
    for name, place in places.items():
        command = command.replace(name, str(tmp_path / place))
    result = run(*command.split())
    assert result.exit_code == 1, result.output
    assert "cannot be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_thread_that_computes_does_not_change_how_it_ends() -> None:
    """Python takes threads apart where they are, and torch takes that for a crash."""
    code = """
import sys, threading, torch
begun = threading.Event()
def work():
    numbers = torch.rand(64, 64, requires_grad=True)
    while True:
        (numbers @ numbers).sum().backward()
        begun.set()
threading.Thread(target=work, name="mole-worker", daemon=True).start()
begun.wait()
sys.argv = ["mole", "generate"]
from mole_diffusion.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Missing argument" in result.stderr


def test_inspect_a_lora(lora: Path) -> None:
    result = run("inspect", lora)
    assert result.exit_code == 0, result.output
    assert "zorin boot" in result.output
    assert "text_encoder: 2 matrices, 2 of rank 4" in result.output
    assert "text_encoder.something_else.weight" in result.output


def test_inspect_a_lora_as_json(lora: Path) -> None:
    result = run("inspect", lora, "--json")
    assert result.exit_code == 0, result.output
    description = json.loads(result.stdout)
    assert description["kind"] == "expert"
    assert description["name"] == "boot"
    assert description["triggers"] == ["zorin boot"]
    assert description["networks"]["text_encoder"]["encoder.layers.0.self_attn.q_proj"] == {
        "rank": 4,
        "alpha": 4.0,
    }
    assert list(description["ignored"]) == ["text_encoder.something_else.weight"]
    assert description["sha256"] == load_expert(lora).sha256


def test_inspect_gates(gates: Path) -> None:
    result = run("inspect", gates)
    assert result.exit_code == 0, result.output
    for text in ("gates", "boot", "cat", "v_prediction", "pooling"):
        assert text in result.output


def test_inspect_gates_as_json(gates: Path) -> None:
    result = run("inspect", gates, "--json")
    assert result.exit_code == 0, result.output
    description = json.loads(result.stdout)
    assert description["kind"] == "gates"
    assert [expert["name"] for expert in description["experts"]] == ["boot", "cat"]
    assert list(description["parts"]) == ["text_encoder"]
    assert description["parts"]["text_encoder"]["config"] == MoLEConfig(pooling="mean").to_dict()
    assert [expert["ranks"] for expert in description["experts"]] == [
        {"text_encoder": [4]},
        {"text_encoder": [8]},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.safetensors", None, "There is no file"),
        ("text.safetensors", b"not a model", "cannot be read as safetensors"),
    ],
)
def test_inspect_refuses_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


MODULE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
PAIR = {f"{MODULE}.lora_down.weight": torch.ones(2, 8), f"{MODULE}.lora_up.weight": torch.ones(8, 2)}
NAN = torch.tensor(float("nan"))
DEEP = "[" * 100_000
# Tensors, header, and what is wrong with them.
DAMAGED: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
    "integers": (
        PAIR | {f"{MODULE}.lora_up.weight": torch.ones(8, 2, dtype=torch.int8)},
        {},
        "is of type int8",
    ),
    "alpha": (PAIR | {f"{MODULE}.alpha": NAN}, {}, "is nan; an alpha is a finite number"),
    "embedding": (PAIR | {"bundle_emb.zor.clip_l": NAN.view(1, 1)}, {}, "values that are not finite (nan)"),
    "factor": (
        PAIR | {f"{MODULE}.lora_up.weight": NAN.expand(8, 2).clone()},
        {},
        "values that are not finite",
    ),
    "entry": (PAIR, {"lora_alpha": "many\nlines"}, r"lora_alpha='many\nlines' is not a finite number"),
    "settings": (PAIR, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata cannot be read"),
    "nested settings": (PAIR, {"lora_adapter_metadata": DEEP}, "lora_adapter_metadata cannot be read"),
    "pissa": (PAIR, {"lora_adapter_metadata": '{"init_lora_weights": "pissa"}'}, "'pissa' is not read"),
    "gates": ({}, {"format": "mole-gates", "format_version": "2", "parts": "{"}, "is damaged"),
    "nested gates": ({}, {"format": "mole-gates", "format_version": "2", "parts": DEEP}, "is damaged"),
    "other gates": (
        {},
        {"format": "mole-gates", "format_version": "2", "parts": '{"unet": 3}'},
        "is damaged",
    ),
    "version of gates": ({}, {"format": "mole-gates", "format_version": "\u00b2"}, "format_version"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_inspect_says_what_is_wrong_in_one_line(kind: str, tmp_path: Path) -> None:
    tensors, header, message = DAMAGED[kind]
    save_file(tensors, tmp_path / "bad.safetensors", metadata=header)
    result = run("inspect", tmp_path / "bad.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit), result.exception
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("header", [DEEP, "9" * 10_000, '{"x": 1}', '"'])
def test_inspect_of_a_file_without_a_header(header: str, tmp_path: Path) -> None:
    raw = header.encode()
    (tmp_path / "bad.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    result = run("inspect", tmp_path / "bad.safetensors")
    assert result.exit_code == 1
    assert "cannot be read as safetensors: its header" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_inspect_a_peft_folder(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in PAIR.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "modules_to_save": ["classifier"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for path in (folder, folder / "adapter_model.safetensors"):
        result = run("inspect", path)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("dog\n")
        assert re.search(r"alpha +adapter_config.json", result.stdout)
        assert "modules_to_save=['classifier']: whole modules of the base are no differences" in result.stdout
    data = json.loads(run("inspect", folder, "--json").stdout)
    assert data["alphas"] == {"adapter_config.json": 1}
    assert data["networks"]["text_encoder"]["encoder.layers.0.mlp.fc1"]["alpha"] == 6.0
    (folder / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    result = run("inspect", folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "adapter_config.json: peft_type='ADALORA' is not read" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "is no expert" in result.stderr


def test_inspect_prints_nothing_that_steers_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x1b[2Jzorin\nboot\u202e"
    tags = json.dumps({"10": {evil: 3}})
    path = tmp_path / "dog.safetensors"
    save_file(PAIR | {f"{evil}.x": torch.ones(1)}, path, metadata={evil: evil, "ss_tag_frequency": tags})
    result = run("inspect", path)
    assert result.exit_code == 0, result.output
    assert "zorin" in result.stdout
    assert not set(result.output) & {"\x1b", "\x07", "\u202e"}
    assert json.loads(run("inspect", path, "--json").stdout)["triggers"] == [evil]


def test_inspect_refuses_tensors_that_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert "none of its 1 keys can be used" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--seeds", "one"), 2, "'one' is not a list of whole numbers"),
        (("--experts", ","), 2, "names nothing"),
        (("--iterations", "0"), 2, "'--iterations'"),
        (("--experts", "boot"), 1, "the demo mixes two or more"),
        (("--experts", "boot,boot"), 1, "names one twice"),
    ],
)
def test_demo_refuses(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("demo", "--out", tmp_path / "demo", *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "demo").exists()


def test_demo_suggests_the_nearest_expert(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "demo", "--experts", "boott,clock")
    assert result.exit_code == 1
    assert "Unknown expert 'boott'" in result.stderr
    assert "Did you mean 'boot'?" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_doctor_says_what_is_there_and_how_to_get_the_rest() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["system"]["mole_diffusion"] == __version__
    assert found["devices"][0].startswith("cpu: ")
    packages = {package["name"]: package for package in found["packages"]}
    assert packages["torch"]["version"].split("+")[0] == torch.__version__.split("+")[0]
    assert packages["gradio"]["install"] == 'pip install "gradio>=6.31"'
    assert "boot" in found["starter"]["experts"]
    assert found["problems"] == []
    spoken = run("doctor")
    assert spoken.exit_code == 0
    for package in packages.values():
        assert (package["version"] or package["install"]) in spoken.output


def test_doctor_fails_without_the_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mole_diffusion.commands.diagnosis.starter_dir", lambda: tmp_path)
    result = run("doctor")
    assert result.exit_code == 1
    assert f"the starter in {tmp_path} lacks model_index.json" in result.stderr


def test_doctor_knows_the_requirements_of_the_project() -> None:
    packages = {p.name: p for p in diagnosis.diagnose().packages}
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    plain = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert plain is not None
    # Names as packages spell them: "open_clip_torch" is "open-clip-torch" in metadata.
    required = {f'pip install "{text.replace("_", "-")}"' for text in re.findall(r'"([^"]+)"', plain[1])}
    assert {package.install for package in packages.values() if package.required} == required
    optional = {name for name, package in packages.items() if not package.required}
    assert {"gradio", "pydantic", "nevergrad", "xformers"} <= optional
    assert not {"pytest", "ruff", "resvg-py", "mole-diffusion"} & set(packages)
    assert packages["pydantic"].purpose == "evaluation (mole evaluate)"


def test_doctor_says_what_does_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "CLASHES", [Clash(("torch>=2", "numpy>=1"), "no pictures", "wait", True)])
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: torch>=2 with numpy>=1: no pictures; wait" in result.stderr
    monkeypatch.setattr(diagnosis, "CLASHES", [Clash(("torch>=2", "numpy>=1"), "no pictures", "wait")])
    result = run("doctor")
    assert result.exit_code == 0
    assert "note: torch>=2 with numpy>=1: no pictures; wait" in result.stderr
    monkeypatch.setattr(diagnosis, "CLASHES", [Clash(("torch>=2", "numpy>=999"), "no pictures", "wait")])
    assert json.loads(run("doctor", "--json").stdout)["notes"] == []


def test_clashes_are_found_by_version() -> None:
    installed = {"transformers": "5.24.0", "peft": "0.21.2"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    (found,) = diagnosis.clashes(version)
    assert found.together == ("transformers>=5.24", "peft<0.22")
    assert "pip install" in str(found)
    installed["transformers"] = "5.23.0"
    assert diagnosis.clashes(version) == []
    installed.update(transformers="5.25.0", peft="0.22.0")
    assert diagnosis.clashes(version) == []
    installed["peft"] = "0.21.3"
    assert len(diagnosis.clashes(version)) == 1
    del installed["peft"]
    assert diagnosis.clashes(version) == []
    installed.update(nevergrad="1.0.12", numpy="2.3.5")
    assert diagnosis.clashes(version) == []
    installed["numpy"] = "2.4.0"
    (found,) = diagnosis.clashes(version)
    assert 'pip install "numpy<2.4"' in str(found)


def test_every_clash_is_within_what_the_project_allows() -> None:
    """What pip refuses to install beside the project needs no words."""
    wanted_by_all = [*requirements("baselines"), *requirements()]
    allowed = {r.name: min(Version(s.version) for s in r.specifier) for r in wanted_by_all}
    for clash in CLASHES:
        for wanted in map(Requirement, clash.together):
            (bound,) = wanted.specifier
            assert bound.operator == ">=" or Version(bound.version) > allowed[wanted.name], clash


def test_doctor_says_which_versions_are_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=999", "no-such-library>=1", "gradio>=999; extra == 'app'"]
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: wanted)
    result = run("doctor")
    assert result.exit_code == 1
    assert 'problem: no-such-library is missing: pip install "no-such-library>=1"' in result.stderr
    assert f"note: torch {metadata.version('torch')} is not a version" in result.stderr
    assert 'pip install "torch>=999"' in result.stderr
    monkeypatch.setattr(diagnosis.metadata, "requires", lambda name: ["no-such-library>=1; extra == 'app'"])
    refused = run("app")
    assert refused.exit_code == 1
    assert 'the app needs no-such-library: pip install "no-such-library>=1"' in refused.stderr


@pytest.mark.parametrize(
    ("options", "trained", "said"),
    [
        ((), True, "the same command goes on with the training where it stopped"),
        (("--fresh",), True, "the same command without --fresh goes on with the training"),
        ((), False, "the same command begins again"),
    ],
)
def test_a_stopped_demo_says_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], trained: bool, said: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        if trained:
            (tmp_path / "training").mkdir()
            (tmp_path / "training" / "state.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("mole_diffusion.pictures.demo.run_demo", stop)
    result = run("demo", "--out", tmp_path, *options)
    assert result.exit_code == 1
    assert f"Stopped; {said}" in " ".join(result.stderr.split())

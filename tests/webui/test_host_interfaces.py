"""What the host offers besides drawing: plot axes, API routes, settings, installing, where files lie."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny.networks import lora_state, make_clip

from mole_diffusion import MoLEConfig, inject, save_gates
from webui_extension import environment
from webui_extension.heatmap import gate_map, loss_curve, region_map
from webui_extension.library import Library
from webui_extension.options import Options
from webui_extension.settings import SettingsError

from .conftest import EXTENSION, ROOT, World, make_world

TWO = {"experts": {"dog": 1.0, "cat": 1.0}, "gates": "both"}


class AxisOption:
    def __init__(self, label: str, type: Any, apply: Any, choices: Any = None) -> None:
        self.label, self.type, self.apply, self.choices = label, type, apply, choices


@pytest.fixture
def axes(world: World) -> dict[str, AxisOption]:
    """The plot's axes by label, after the host has built its pages twice."""
    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    script = type("XYZ", (), {"__module__": "xyz_grid.py"})
    world.host.scripts.scripts_data.insert(0, SimpleNamespace(script_class=script, module=plot))
    for _ in range(2):
        world.host.script_callbacks.call("before_ui")
    assert not world.host.script_callbacks.failures
    labels = [axis.label for axis in plot.axis_options]
    assert labels == ["Seed", "[MoLE] Active experts", "[MoLE] Gates file", "[MoLE] Strength"]
    world.host.scripts.scripts_data.pop(0)
    return {axis.label: axis for axis in plot.axis_options}


def plotted(
    world: World, axis: AxisOption, value: str, settings: Any = TWO
) -> tuple[torch.Tensor, dict[str, Any]]:
    """One cell of a plot: the picture and its PNG info."""
    p = world.processing([settings])
    axis.apply(p, axis.type(value), [value])
    processed = world.host.processing.process_images(p)
    assert not world.host.script_callbacks.failures
    return processed.images[0], processed.infotexts[0]


@pytest.mark.parametrize(
    ("label", "value", "same"),
    [
        ("[MoLE] Active experts", "dog", {"experts": [{"name": "dog"}, {"name": "cat", "active": False}]}),
        ("[MoLE] Active experts", "dog + cat", {}),
        ("[MoLE] Active experts", "all", {}),
        ("[MoLE] Gates file", "pooled", {"gates": "pooled"}),
        ("[MoLE] Gates file", "equal shares", {"gates": "uniform"}),
        ("[MoLE] Gates file", "auto", {"gates": "auto"}),
        ("[MoLE] Strength", "0.5", {"experts": {"dog": 0.5, "cat": 0.5}}),
        ("[MoLE] Strength", "cat=0.5", {"experts": {"dog": 1.0, "cat": 0.5}}),
    ],
)
def test_axes_of_the_plot(world: World, axes: dict[str, Any], label: str, value: str, same: Any) -> None:
    before = world.picture()
    picture, info = plotted(world, axes[label], value)
    expected = world.draw({**TWO, **same})
    assert torch.equal(picture, expected.images[0])
    assert info == expected.infotexts[0]
    # Without the panel an axis does nothing.
    assert torch.equal(plotted(world, axes[label], value, {"enabled": False})[0], before)
    assert world.is_clean()


def test_a_wrong_value_on_an_axis_is_shown(world: World, axes: dict[str, Any]) -> None:
    for label, value in (
        ("[MoLE] Active experts", "bird"),
        ("[MoLE] Strength", "much"),
        ("[MoLE] Gates file", "x"),
    ):
        with pytest.raises(RuntimeError, match="MoLE: "):
            plotted(world, axes[label], value)
    assert axes["[MoLE] Gates file"].choices() == ["auto", "equal shares", "both", "pooled"]


def test_png_info_tells_what_was_drawn(world: World) -> None:
    info = world.draw({"experts": {"dog": 0.5, "cat": 1.0}, "gates": "both"}).infotexts[0]
    assert info["MoLE experts"] == "dog: 0.5 | cat: 1"
    assert info["MoLE gates"] == "both"
    library = world.session.library
    hashes = [library.load(name).sha256[:12] for name in ("dog", "cat")]
    assert info["MoLE hashes"] == f"dog: {hashes[0]} | cat: {hashes[1]}"
    assert world.draw().infotexts[0] == {}


def test_api_routes(world: World) -> None:
    routes: dict[str, Any] = {}

    class App:
        def get(self, path: str) -> Any:
            return lambda function: routes.setdefault(path, function)

    world.host.script_callbacks.call("app_started", None, App())
    assert not world.host.script_callbacks.failures
    assert routes["/mole/v1/experts"]() == {"experts": ["animals/fox", "cat", "dog"]}
    assert routes["/mole/v1/gates"]() == {"gates": ["auto", "equal shares", "both", "pooled"]}
    assert routes["/mole/v1/last-run"]() == {"experts": [], "weights": {}, "forwards": {}}
    world.draw(TWO)
    run = routes["/mole/v1/last-run"]()
    assert run["experts"] == ["dog", "cat"]
    assert run["forwards"] == {"unet": 3, "text_encoder": 2}


def test_the_model_is_not_loaded_while_the_page_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts load the checkpoint when somebody asks for `shared.sd_model`."""
    world = make_world("a1111", tmp_path, monkeypatch)
    world.host.sd_models.checkpoints_list["a"] = SimpleNamespace(title="a [1]", filename="/a")
    world.host.sd_models.checkpoints_list["b"] = SimpleNamespace(title="b [2]", filename="/b")
    world.host.shared.opts.data["sd_model_checkpoint"] = "b [2]"
    monkeypatch.delattr(world.host.shared, "sd_model")
    assert list(world.script._checkpoints().items()) == [("b [2]", "/b"), ("a [1]", "/a")]
    world.host.script_callbacks.call("model_loaded", world.models["base"])
    assert not world.host.script_callbacks.failures


def test_unloading_the_script_takes_everything_off(world: World) -> None:
    p = world.processing([TWO])
    p.scripts.run("process", p)
    p.scripts.run("process_batch", p)
    assert not world.is_clean()
    world.host.script_callbacks.call("script_unloaded")
    assert not world.host.script_callbacks.failures
    assert world.is_clean()


def test_the_folder_is_on_the_path_only_while_scripts_are_loaded(world: World) -> None:
    assert str(EXTENSION) not in sys.path
    assert sys.modules["mole_webui"].__file__ == str(EXTENSION / "__init__.py")
    world.picture(TWO)  # imports more of the package now


def test_the_whole_repository_is_an_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed from its URL: hosts look only at the top of a clone."""
    world = make_world("a1111", tmp_path, monkeypatch)
    world.host.scripts.scripts_data.clear()
    world.host.script_callbacks.clear()
    world.host.scripts.load_script(str(ROOT / "scripts" / "mole.py"))
    (entry,) = world.host.scripts.scripts_data
    assert entry.script_class().title() == "MoLE"
    before = world.picture()
    assert not torch.equal(world.picture(TWO), before)
    assert sorted(path.name for path in (ROOT / "scripts").glob("*.py")) == ["mole.py"]
    assert 'url("webui_extension/style.css")' in (ROOT / "style.css").read_text()
    assert (ROOT / "metadata.ini").read_text() == (EXTENSION / "metadata.ini").read_text()
    config = configparser.ConfigParser()
    config.read(EXTENSION / "metadata.ini")
    assert config["Extension"]["Name"] == "mole_diffusion"


@pytest.fixture(scope="module")
def fresh_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python environment with pip, to be copied: pip takes longer to put in than all else."""
    folder = tmp_path_factory.mktemp("environment") / "host"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


@pytest.mark.parametrize("start", ["webui_extension/install.py", "install.py"])
def test_install_adds_the_core_and_nothing_else(
    start: str, tmp_path: Path, fresh_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip in a fresh environment, on a small repository of the same shape."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the core would be found there
    clone = tmp_path / "clone"
    (clone / "mole_diffusion").mkdir(parents=True)
    (clone / "mole_diffusion" / "__init__.py").write_text("__version__ = '1'\n")
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (clone / "pyproject.toml").write_text(project)
    (clone / "backend.py").write_text(_BACKEND)
    (clone / "webui_extension").mkdir()
    for name in ("install.py", "webui_extension/install.py"):
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(fresh_environment, tmp_path / "host", symlinks=True)
    python = tmp_path / "host" / "bin" / "python"
    before = _packages(python)
    first = _install(python, clone / start)
    assert "Installing the core of MoLE" in first
    assert _packages(python) - before == {"mole-diffusion"}
    assert before <= _packages(python)
    # The next start of the web UI finds it there, also after an update of the clone.
    (clone / "mole_diffusion" / "__init__.py").write_text("__version__ = '2'\n")
    assert _install(python, clone / start) == ""
    found = subprocess.run(
        [str(python), "-c", "import mole_diffusion; print(mole_diffusion.__version__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert found.stdout.strip() == "2"


_BACKEND = """
import zipfile
from pathlib import Path

def get_requires_for_build_editable(config_settings=None):
    return []

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "mole_diffusion-1-py3-none-any.whl"
    info = "mole_diffusion-1.dist-info"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("mole_diffusion.pth", str(Path(__file__).parent))
        about = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", about)
        about = "Metadata-Version: 2.1\\nName: mole-diffusion\\nVersion: 1\\nRequires-Dist: no-such\\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


def _install(python: Path, script: Path) -> str:
    done = subprocess.run(
        [str(python), str(script)], capture_output=True, text=True, cwd=script.parent.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _packages(python: Path) -> set[str]:
    command = [str(python), "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {line.partition("==")[0] for line in lines}


def test_a_copied_folder_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(EXTENSION / "install.py", tmp_path / "install.py")
    spec = importlib.util.spec_from_file_location("copied_install", tmp_path / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(FileNotFoundError, match=r"has no pyproject\.toml: install the whole"):
        module.install()


def test_the_training_environment_is_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real venv and a real pip; with `--dry-run --no-deps` in place of gigabytes."""
    environment.make(
        tmp_path / "env", ROOT, ["--no-deps", "--no-build-isolation", "--dry-run", "--quiet", "--help"]
    )
    assert (tmp_path / "env" / "bin" / "python").is_file()
    said = capfd.readouterr().out
    assert "Making" in said
    assert "Done" in said
    assert "cannot train gates" in environment.describe(tmp_path / "env" / "bin" / "python")


def test_host_imports_stay_in_the_script() -> None:
    for path in EXTENSION.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
        assert ("modules" in names) == (path == EXTENSION / "scripts" / "mole.py"), path


def test_options_have_defaults_and_limits(tmp_path: Path) -> None:
    options = Options(SimpleNamespace(), SimpleNamespace(lora_dir=None), str(tmp_path / "m"), str(tmp_path))
    assert options.rows == 4
    assert options.lora_folder == tmp_path / "m" / "Lora"
    assert options.python.parent.parent == tmp_path / "mole-environment"
    options = Options(SimpleNamespace(mole_rows=99.0, mole_pip_options="--index-url 'x y'"), None, "m", "d")
    assert options.rows == 12
    assert options.pip_options == ["--index-url", "x y"]


def test_files_that_png_info_cannot_name_are_not_offered(tmp_path: Path) -> None:
    for name in ("dog", "a|b", "sub/cat.v2", ".hidden"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    library = Library(tmp_path, tmp_path / "none")
    assert library.experts() == ["dog", "sub/cat.v2"]
    assert library.gates() == ["auto", "equal shares"]
    for name in ("../dog", "bird", "/etc/passwd"):
        with pytest.raises(SettingsError, match="there is no LoRA"):
            library.expert_path(name)


def test_folders_of_peft_have_their_names_and_strength(tmp_path: Path) -> None:
    encoder = make_clip()
    for seed, name in enumerate(("dog", "tom")):
        state = lora_state(encoder, 2, seed, ("q_proj",))
        (tmp_path / name).mkdir()
        save_file(
            {f"base_model.model.{key}": value for key, value in state.items()},
            tmp_path / name / "adapter_model.safetensors",
        )
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    library = Library(tmp_path, tmp_path / "gates")
    files = ["dog/adapter_model", "tom/adapter_model"]
    assert library.experts() == files
    experts = [library.load(file) for file in files]
    assert [expert.name for expert in experts] == ["dog", "tom"]
    assert {factors.scaling for factors in experts[0].factors["text_encoder"].values()} == {3.0}
    mixture = inject(encoder, experts, MoLEConfig(pooling="mean"))
    save_gates(tmp_path / "gates" / "both.safetensors", {"text_encoder": mixture})
    assert library.experts_of("both") == files
    assert library.load(files[1]) is experts[1]
    # Another strength is another expert, though the tensors are the same.
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 20}))
    assert {factors.scaling for factors in library.load(files[1]).factors["text_encoder"].values()} == {10.0}
    with pytest.raises(
        SettingsError, match=r"were trained for the LoRA 'tom'.*another file of this name is in"
    ):
        library.experts_of("both")


def test_drawings() -> None:
    html = gate_map({"unet": {"down <0>": [0.25, 0.75], "mid": [0.5, 0.5]}}, ["dog", "a <b>"])
    assert html.count("<rect") == 4
    assert "a &lt;b&gt; in down &lt;0&gt;: 0.750" in html
    assert "<b>" not in html
    assert "No gate weights yet" in gate_map({}, [])
    assert region_map({"dog": None}) == ""
    assert region_map({"dog": (0, 0, 0.5, 1)}).count("<rect") == 2
    assert loss_curve([1.0]) == ""
    assert "0.500 to 1.000" in loss_curve([1.0, 0.5])

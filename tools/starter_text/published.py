"""Names of what the build writes, and the way back from a starter that was published."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from mole_diffusion.starter.text.tasks import EXPERTS

BASE, ADAPTERS, REPORT = "base.safetensors", "experts.safetensors", "report.json"
#: Name of the report beside a starter.
PUBLISHED = "build.json"


def take_up(starter: Path, out: Path) -> None:
    """Write into the build's folder what made a starter, where it is not there yet.

    Args:
        starter: folder that `publish.py` wrote.
        out: the build's folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / BASE).is_file():
        save_file(load_file(starter / "model.safetensors"), out / BASE)
    if not (out / ADAPTERS).is_file():
        tensors = {}
        for name in EXPERTS:
            own = load_file(starter / "experts" / name / "adapter_model.safetensors")
            tensors |= {f"{name}.{key.removeprefix('base_model.model.')}": one for key, one in own.items()}
        save_file(tensors, out / ADAPTERS)
    if not (out / REPORT).is_file():
        shutil.copyfile(starter / PUBLISHED, out / REPORT)

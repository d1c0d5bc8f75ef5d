"""What experts cost in ComfyUI.

PYTHONPATH=tests python tests/comfy/cost.py    # writes bench/results/comfy.md
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from typing import Annotated, Any

import typer
from comfy_environment import install
from comfy_server import ROOT

INSIDE = ROOT / "tests" / "comfy" / "inside"


def as_markdown(result: dict[str, Any], rounds: int, steps: int) -> str:
    """The table, with the command that made it."""
    lines = ["| drawing | seconds | x bare |", "|---|---|---|"]
    lines += [
        f"| {name} | {seconds:.2f} | {result['ratios'][name]:.2f} |"
        for name, seconds in result["seconds"].items()
    ]
    lines += [
        "",
        f"The starter, {steps} steps at 128 pixels, ComfyUI {result['comfyui']} on a CPU with"
        f" {result['threads']} threads; medians of {rounds} rounds, alternating; ratios within a round."
        " Made by `PYTHONPATH=tests python tests/comfy/cost.py`.",
    ]
    return "\n".join(lines) + "\n"


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 15, steps: Annotated[int, typer.Option(min=1)] = 20
) -> None:
    """Measure in ComfyUI's own environment."""
    comfyui = install()
    with tempfile.TemporaryDirectory() as base:
        done = subprocess.run(
            [str(comfyui.python), "cost.py", str(rounds), str(steps)],
            cwd=INSIDE,
            env={
                **comfyui.environment(),
                "MOLE_COMFY_SOURCE": str(comfyui.source),
                "MOLE_COMFY_BASE": base,
                "MOLE_COMFY_ORACLE": base,
            },
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    result = json.loads(done.stdout.splitlines()[-1])
    table = as_markdown(result, rounds, steps)
    (ROOT / "bench" / "results" / "comfy.md").write_text(table)
    print(table)


if __name__ == "__main__":
    typer.run(main)

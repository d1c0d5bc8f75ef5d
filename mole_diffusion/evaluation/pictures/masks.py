"""The same seeds with experts masked (paper, Fig. 8)."""

from __future__ import annotations

from pathlib import Path

from mole_diffusion.core.files import replacing
from mole_diffusion.evaluation.pictures.protocol import Variant
from mole_diffusion.evaluation.pictures.stage import Stage
from mole_diffusion.pictures.grid import GridRow, picture_grid

FOLDER = "masks"


def write_masks(stage: Stage, method: Variant, seeds: range, out: Path) -> Path:
    """`masks/SET-METHOD.png`: all experts, each one masked, each one alone; drawn only where it is not there.

    Args:
        stage: of the set.
        method: a method with gates.
        seeds: one column each; the first prompt.
        out: folder of the evaluation.
    """
    path = out / FOLDER / f"{stage.scene.name}-{method.name}.png"
    if path.is_file():
        return path
    names = list(stage.scene.concepts)
    chosen: list[tuple[str, list[str]]] = [("all experts", names)]
    if len(names) > 2:
        chosen += [(f"without {name}", [other for other in names if other != name]) for name in names]
    chosen += [(f"only {name}", [name]) for name in names]
    rows = [GridRow(label, stage.draw(method, 0, seeds, active=active).pictures) for label, active in chosen]
    captions = [f"seed {seed}" for seed in seeds]
    rows[0] = GridRow(rows[0].label, rows[0].pictures, stage.scene.prompts[0], captions)
    with replacing(path) as temporary:
        picture_grid(rows, title=f"{stage.scene.name}, {method.name}", cell=160).save(temporary, format="png")
    return path

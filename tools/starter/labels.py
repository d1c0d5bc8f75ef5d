"""How far the judge and the scoring CLIP agree with a person about generated pictures.

    mole evaluate starter --methods alone,none,la,nla,auto,gates --seeds 5 --out RUN
    python -m tools.starter.labels RUN

writes docs/results/starter/labels.md and docs/images/labels.webp. The labels are in labels.json there: a
hundred pictures of that run, chosen at random, looked at without their method or the judge's word. Per
expert, in the order of the set: 1 the subject is there and whole, h it is there but damaged (a face or a part
smeared), 0 it is not there, or another thing of its class is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from mole_diffusion.evaluation.results import RESULTS, read_rows, write_text

ROOT = Path(__file__).resolve().parent.parent.parent
LABELS = ROOT / "docs" / "results" / "starter" / "labels.json"
TABLE, SHEET = LABELS.with_suffix(".md"), ROOT / "docs" / "images" / "labels.webp"
METHODS = ("la", "auto", "gates", "nla")
WHOLE, ABSENT = "1", "0"
_ROW = 10
_HEADINGS = (
    *("method", "subjects looked at", "there, by eye", "whole, by eye"),
    *("there, by the judge", "the same said", "CLIP: area under the curve"),
)


def compare(labels: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: per method what the person and the judge saw, and how often they say the same.

    Args:
        labels: picture -> a letter per expert.
        rows: of the run.
    """
    scores = {row["picture"]: row for row in rows}
    seen = [
        (row["method"], letter, row["scores"]["present"][name], row["scores"]["crop"][name])
        for picture, letters in labels.items()
        for row in [scores[picture]]
        for name, letter in zip(row["set"].split("+"), letters, strict=True)
    ]
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    for method in (*METHODS, "all"):
        chosen = [entry for entry in seen if method in (entry[0], "all")]
        if not chosen:
            continue
        there = [letter != ABSENT for _, letter, _, _ in chosen]
        judged = [bool(present) for _, _, present, _ in chosen]
        same = [eye == judge for eye, judge in zip(there, judged, strict=True)]
        cells = [there, [letter == WHOLE for _, letter, _, _ in chosen], judged, same]
        area = _area([crop for *_, crop in chosen], there)
        shares = " | ".join(f"{sum(cell) / len(cell):.0%}".replace("%", " %") for cell in cells)
        lines.append(f"| {method} | {len(chosen)} | {shares} | {area} |")
    return "\n".join(lines) + "\n"


def _area(similarities: Sequence[float], there: Sequence[bool]) -> str:
    """Of the best crop's similarity with the reference pictures; nothing where all or none are there."""
    if len(set(there)) < 2:
        return ""
    return f"{float(binary_auroc(torch.tensor(similarities), torch.tensor(there).long())):.2f}"


def sheet(folder: Path, pictures: Sequence[str]) -> Image.Image:
    """All pictures, in the order of the labels, ten in a row."""
    opened = [Image.open(folder / picture).convert("RGB") for picture in pictures]
    width, height = opened[0].size
    whole = Image.new("RGB", (_ROW * width, -(-len(opened) // _ROW) * height))
    for index, picture in enumerate(opened):
        whole.paste(picture, (index % _ROW * width, index // _ROW * height))
    return whole


def main() -> None:
    """Compare with the run that the command line names."""
    folder = Path(sys.argv[1])
    labels: dict[str, str] = json.loads(LABELS.read_text())
    write_text(TABLE, compare(labels, read_rows(folder / RESULTS)))
    sheet(folder, list(labels)).save(SHEET, quality=80)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()

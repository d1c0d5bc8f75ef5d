"""What is measured of pictures, and how their rows are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_diffusion.evaluation.pictures.metrics import CONFUSED, OMITTED, PRESENT, STYLED
from mole_diffusion.evaluation.schema import Heading, Schema, plain_measures

#: Whether all subjects that a picture names are there.
JOINT = "joint"


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """The measures of a picture as numbers: means over its concepts, and "joint" (all subjects there)."""
    found = plain_measures(row)
    if PRESENT in found and not row.get("alone"):
        found[JOINT] = float(found[PRESENT] == 1.0)
    return found


#: Pictures of one set and prompt are alike; those of single experts count as one.
PICTURES = Schema(
    items="pictures",
    verb="draw",
    key=("set", "method", "prompt", "seed", "alone"),
    pair=("set", "prompt", "seed"),
    n_unit=2,
    headings={
        PRESENT: Heading("subjects present", is_share=True),
        JOINT: Heading("all present", is_share=True),
        STYLED: Heading("in the style", is_share=True),
        CONFUSED: Heading("confused", is_share=True, less_is_better=True),
        OMITTED: Heading("omitted", is_share=True, less_is_better=True),
        "text": Heading("text"),
        "described": Heading("described"),
        "image": Heading("image"),
        "crop": Heading("best crop"),
        "text_2": Heading("text (2nd CLIP)"),
        "described_2": Heading("described (2nd CLIP)"),
        "image_2": Heading("image (2nd CLIP)"),
        "dino": Heading("DINO"),
        "dino_crop": Heading("DINO, best crop"),
    },
    wins=(PRESENT, "text", "described", "image"),
    measures=measures,
)

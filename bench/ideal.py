"""What the scoring CLIP gives perfect scenes: how high the measures of an evaluation can go.

    python bench/ideal.py           # writes docs/results/starter/ideal.md

The starter's world paints the subjects themselves, and the plain things of the same classes that its base was
trained on, on the backgrounds of `starter.yaml`. Nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mole_diffusion.evaluation.pictures.measures import PICTURES, measures
from mole_diffusion.evaluation.pictures.protocol import load_protocol
from mole_diffusion.evaluation.pictures.run import score
from mole_diffusion.evaluation.pictures.scorers import make_scorers
from mole_diffusion.evaluation.pictures.sets import make_scene
from mole_diffusion.evaluation.results import write_text
from tools.starter.world import FLAT_STYLES, SUBJECT_STYLE, Thing, draw_scene

ROOT = Path(__file__).resolve().parent.parent
#: Backgrounds of the prompts of `starter.yaml`, in their order.
BACKGROUNDS = ("beach", "snow", "night", "floor", "sunset")
SEEDS = 4
MEASURES = ("text", "described", "image", "crop")
KINDS: dict[str, Sequence[str]] = {
    "the subjects": (SUBJECT_STYLE,),
    "things of their classes": FLAT_STYLES,
}


def painted(kinds: Sequence[str], background: str, styles: Sequence[str]) -> list[Image.Image]:
    """Scenes of these things in the world, every style with every seed."""
    scenes = [
        draw_scene([Thing(kind, style) for kind in kinds], background, np.random.default_rng(seed))
        for style in styles
        for seed in range(SEEDS)
    ]
    return [Image.fromarray(scene.pixels) for scene in scenes]


def main() -> None:
    """Score the scenes of all sets and write the table."""
    protocol = load_protocol("starter")
    scorers = make_scorers(protocol.metrics.model_copy(update={"judge": None}), torch.device("cpu"))
    lines = [
        "| painted | " + " | ".join(PICTURES.headings[measure].title for measure in MEASURES) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for label, styles in KINDS.items():
        rows = []
        for chosen in protocol.sets:
            scene = make_scene(protocol, chosen)
            for prompt, background in enumerate(BACKGROUNDS):
                pictures = painted(chosen.experts, background, styles)
                found = score(scorers, pictures, scene, prompt, None)
                rows += [measures({"scores": scores, "seconds": 0.0}) for scores in found]
        cells = [f"{np.mean([row[measure] for row in rows]):.3f}" for measure in MEASURES]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    write_text(ROOT / "docs/results/starter/ideal.md", "\n".join(["# Perfect scenes", "", *lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""A tiny model in a folder with three expert files, pictures of what they know, and tiny CLIPs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from tiny.sd import TRIGGERS, drawing, make_clip, make_components, write_lora


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `NAME.safetensors` and `NAME/*.png` per expert, `clip_guide/` and `clip_score/`."""
    folder = tmp_path_factory.mktemp("world")
    components = make_components(folder / "tokenizer", TRIGGERS.values())
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder / "model")
    for seed, name in enumerate(TRIGGERS, start=1):
        write_lora(folder / f"{name}.safetensors", components, seed, rank=2)
        (folder / name).mkdir()
        for x in (4, 10):
            drawing(name, x, size=32).save(folder / name / f"{x}.png")
    make_clip(folder / "clip_guide", 3)
    make_clip(folder / "clip_score", 4)
    return folder


@pytest.fixture
def protocol_values(world: Path) -> Callable[..., dict[str, Any]]:
    """`protocol_values(**changes)`: a small protocol on the tiny world, as a YAML file holds it."""

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": str(world / "model"),
            "experts": {
                name: {
                    "file": str(world / f"{name}.safetensors"),
                    "text": f"a {trigger} {name}",
                    "class_text": f"a {name}",
                    "references": str(world / name),
                }
                for name, trigger in TRIGGERS.items()
            },
            "sets": [["boot", "cat"], ["cat", "clock"]],
            "prompts": ["{all} on the beach", "{0} and {1}"],
            "seeds": {"count": 3},
            "methods": [
                "alone",
                {"name": "masked", "of": "few", "seeds": 1},
                {"name": "plain", "seeds": 1},
                "none",
                "nla",
                {"name": "few", "base": "gates"},
            ],
            "masks": ["few"],
            "cost_rounds": 0,
            "training": {
                "iterations": 2,
                "collage_batch": 1,
                "pool_size": 2,
                "drawn_pictures": 1,
                "sampling_steps": 2,
            },
            "steps": 2,
            "batch": 2,
            "metrics": {"clip": [f"local-dir:{world / 'clip_score'}"]},
        }
        return {**values, **changes}

    return make


@pytest.fixture
def write_protocol(tmp_path: Path, protocol_values: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`write_protocol(**changes)`: the YAML file of such a protocol."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "protocol.yaml"
        path.write_text(yaml.safe_dump(protocol_values(**changes)))
        return path

    return write

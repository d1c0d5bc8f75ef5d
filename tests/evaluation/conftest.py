"""A tiny model in a folder with three expert files, pictures of what they know, and tiny CLIPs."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save_model

COLOURS = {"boot": (220, 30, 40), "cat": (250, 200, 40), "clock": (40, 160, 60)}
TRIGGERS = {"boot": "zor", "cat": "vim", "clock": "kip"}


def _tiny_pipeline() -> ModuleType:
    """The builders of the pipeline's tests: the same real classes, the same tiny sizes."""
    path = Path(__file__).parents[1] / "pipeline" / "conftest.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location("tiny_pipeline_of_evaluation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.WORDS.extend(TRIGGERS.values())
    return module


TINY = _tiny_pipeline()


def drawing(name: str, x: int, size: int = 32) -> Image.Image:
    """One filled shape on grey, half as wide as the picture, whose left side is at `x`."""
    picture = Image.new("RGB", (size, size), (150, 150, 150))
    box = (x, size // 4, x + size // 2, 3 * size // 4)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if name == "cat" else pen.rectangle)(box, fill=COLOURS[name])
    return picture


def make_clip(folder: Path, seed: int) -> str:
    """A tiny CLIP of random weights in open_clip's own format, and the name by which open_clip loads it."""
    folder.mkdir(parents=True)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    means = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": means}))
    torch.manual_seed(seed)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(network, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `NAME.safetensors` and `NAME/*.png` per expert, `clip_guide/` and `clip_score/`."""
    folder = tmp_path_factory.mktemp("world")
    components = TINY.make_components(folder / "tokenizer")
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(folder / "model")
    for seed, name in enumerate(TRIGGERS, start=1):
        TINY.write_lora(folder / f"{name}.safetensors", components, seed, rank=2)
        (folder / name).mkdir()
        for x in (4, 10):
            drawing(name, x).save(folder / name / f"{x}.png")
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
            "cost_rounds": 1,
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

"""A tiny pipeline with three experts, one without a text encoder part, and pictures of what they know."""

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
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import save_model

from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.training import Concept, TrainingConfig

COLOURS = {"boot": (220, 30, 40), "cat": (250, 200, 40), "clock": (40, 160, 60)}
TRIGGERS = {"boot": "zor", "cat": "vim", "clock": "kip"}
PROMPT = "a zor boot a vim cat a kip clock"


def _tiny_pipeline() -> ModuleType:
    """The builders of the pipeline's tests: the same real classes, the same tiny sizes."""
    path = Path(__file__).parents[1] / "pipeline" / "conftest.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location("tiny_pipeline_of_baselines", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.WORDS.extend(TRIGGERS.values())
    return module


TINY = _tiny_pipeline()


def drawing(name: str, x: int, background: tuple[int, int, int], size: int = 64) -> Image.Image:
    """One filled shape, `size` / 2 wide, whose left side is at `x`."""
    picture = Image.new("RGB", (size, size), background)
    box = (x, size // 4, x + size // 2, 3 * size // 4)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if name == "cat" else pen.rectangle)(box, fill=COLOURS[name])
    return picture


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; the pipelines copy them."""
    return TINY.make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of one rank; the clock has no text encoder part."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: TINY.write_lora(folder / f"{name}.safetensors", components, seed, 3, text=name != "clock")
        for seed, name in enumerate(TRIGGERS, start=1)
    }


@pytest.fixture(scope="session")
def other_rank(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """An expert of another rank than the three."""
    return TINY.write_lora(tmp_path_factory.mktemp("other") / "other.safetensors", components, 9, 2)


@pytest.fixture
def plain(components: dict[str, Any]) -> StableDiffusionPipeline:
    """The diffusers pipeline: the oracle."""
    return TINY.build(StableDiffusionPipeline, components)


@pytest.fixture
def empty(components: dict[str, Any]) -> StableDiffusionMoLEPipeline:
    """Our pipeline without experts."""
    return TINY.build(StableDiffusionMoLEPipeline, components)


@pytest.fixture
def pipe(empty: StableDiffusionMoLEPipeline, lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """Our pipeline with the three experts and fresh gates."""
    for name, path in lora_files.items():
        empty.load_expert(path, name=name)
    return empty


@pytest.fixture
def concepts() -> dict[str, Concept]:
    """What the three know, with three reference pictures each."""
    skies = [(150, 190, 230), (230, 230, 230), (120, 200, 120)]
    return {
        name: Concept(
            name,
            f"a {word} {name}",
            f"a {name}",
            [drawing(name, 8 + 8 * i, sky) for i, sky in enumerate(skies)],
        )
        for name, word in TRIGGERS.items()
    }


@pytest.fixture
def tiny() -> Callable[..., TrainingConfig]:
    """`tiny(**changes)`: settings for tests: few steps, small pools, no bar."""

    def build(**changes: Any) -> TrainingConfig:
        settings: dict[str, Any] = {
            "iterations": 3,
            "collage_batch": 2,
            "pool_size": 4,
            "redraw_every": 2,
            "drawn_pictures": 2,
            "sampling_steps": 3,
            "views": 2,
            "crops": 4,
            "collage_background": "sources",
            "progress": False,
        }
        return TrainingConfig(**{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP of random weights in open_clip's own format."""
    folder = tmp_path_factory.mktemp("clip")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    means = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": means}))
    torch.manual_seed(3)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(network, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, ...)`: a picture (B, H, W, 3) from a fixed seed, in four steps."""

    def _draw(pipe: Any, **kwargs: Any) -> torch.Tensor:
        settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
        settings.setdefault("generator", torch.Generator().manual_seed(7))
        pictures: torch.Tensor = pipe(settings.pop("prompt", PROMPT), **settings).images
        return pictures

    return _draw

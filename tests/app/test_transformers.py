"""A transformer as the app's base: pictures, maps and facts, and what cannot be is said."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.denoising import FAMILIES
from tiny.flux import write_transformer_lora

from mole_diffusion.app.composing import ComposeRequest, compose
from mole_diffusion.app.library import add_file
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.tabs.models import BASES


@pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen-image", "z-image"))]
)
def test_pictures_of_a_transformer(family: str, tmp_path: Path) -> None:
    known = FAMILIES[family]
    targets, name = known.targets, known.name
    components = known.make(tmp_path / "words")
    known.cls.diffusers_class(**components).save_pretrained(tmp_path / "model")
    studio = Studio(tmp_path / "studio", device="cpu", model=str(tmp_path / "model"))
    try:
        studio.opening.wait(300)
        facts = studio.facts(studio.model)
        assert facts is not None
        assert (facts["base"], facts["width"], facts["prediction"]) == (name, None, None)
        assert name in BASES
        session = studio.session("visitor")
        names = [add_file(studio, session, lora(tmp_path, components, n, seed, targets)).name
                 for seed, n in enumerate(("boot", "cat"))]  # fmt: skip
        session.choose(names)
        request = ComposeRequest(prompt="a red boot and a cat", steps=3, width=64, height=64, guidance=2.0)
        pictures = []
        for mixture in ("gates", "nla", "none", "auto"):
            job = studio.submit(session, "compose", compose(studio, session, request, [mixture])).wait(300)
            assert job.error is None, job.error
            pictures.append(job.result[0].path.read_bytes())
        assert len(set(pictures[1:])) == 3
        assert pictures[3] == pictures[0]  # no gates are trained
    finally:
        studio.close()


def lora(folder: Path, components: dict[str, Any], name: str, seed: int, targets: list[str]) -> Path:
    """A file that says its trigger words."""
    path = write_transformer_lora(folder / f"{name}.safetensors", components, seed, 2, targets)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "mole.trigger": f"a red {name}"})
    return path

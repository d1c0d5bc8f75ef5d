"""Pipelines that start from a picture, and the ways from one pipeline to another."""

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from pipeline_helpers import CLOSE, build, train_a_little, with_adapters

import mole_diffusion
from mole_diffusion.core.errors import RegionMaskError
from mole_diffusion.pictures.pipelines import (
    StableDiffusionMoLEImg2ImgPipeline,
    StableDiffusionMoLEInpaintPipeline,
    StableDiffusionMoLEPipeline,
    StableDiffusionXLMoLEImg2ImgPipeline,
    StableDiffusionXLMoLEInpaintPipeline,
    StableDiffusionXLMoLEPipeline,
)

PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.new("L", (32, 32))
MASK.paste(255, (8, 8, 24, 28))
FROM_PICTURE = {"image": PICTURE, "strength": 1.0}
FROM_MASK = {"image": PICTURE, "mask_image": MASK, "strength": 1.0, "height": 32, "width": 32}
ONES = {
    "img2img": (StableDiffusionMoLEImg2ImgPipeline, StableDiffusionImg2ImgPipeline, FROM_PICTURE),
    "inpaint": (StableDiffusionMoLEInpaintPipeline, StableDiffusionInpaintPipeline, FROM_MASK),
}
XLS = {
    "xl img2img": (StableDiffusionXLMoLEImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, FROM_PICTURE),
    "xl inpaint": (StableDiffusionXLMoLEInpaintPipeline, StableDiffusionXLInpaintPipeline, FROM_MASK),
}
ALL = {**ONES, **XLS}


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Any:
    """`family(kind)`: components and expert files that fit the pipelines of `kind`."""

    def choose(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        prefix = "xl_" if kind in XLS else ""
        files = request.getfixturevalue(f"{prefix}lora_files")
        return request.getfixturevalue(f"{prefix}components"), {name: files[name] for name in ("boot", "cat")}

    return choose


def loaded(cls: Any, components: dict[str, Any], files: dict[str, Any]) -> Any:
    pipe = build(cls, components)
    for name, path in files.items():
        pipe.load_expert(path, name=name)
    return pipe


@pytest.mark.parametrize("kind", ALL)
def test_one_active_expert_is_that_lora(kind, family, draw) -> None:
    ours, theirs, settings = ALL[kind]
    components, files = family(kind)
    pipe, plain = loaded(ours, components, files), build(theirs, components)
    train_a_little(pipe)
    base = draw(plain, **settings)
    torch.testing.assert_close(draw(pipe, mixture="none", **settings), base, rtol=0, atol=0)
    expected = draw(with_adapters(plain, files, {"cat": 1.0}), **settings)
    assert (expected - base).abs().max() > 0.02
    torch.testing.assert_close(draw(pipe, active_experts=["cat"], **settings), expected, **CLOSE)
    rows = pipe.gate_weights().where(network="unet")
    assert {(row.branch, row.weight) for row in rows.where(expert="cat")} == {("prompt", 1), ("negative", 1)}


@pytest.mark.parametrize("kind", ALL)
def test_region_masks_are_of_the_pictures_size(kind, family, draw) -> None:
    ours, _, settings = ALL[kind]
    pipe = loaded(ours, *family(kind))
    # Not square, and not a multiple of eight: the pipeline draws 32 x 48 of it.
    wide = {**settings, "image": PICTURE.resize((51, 37))}
    if "mask_image" in wide:
        wide |= {"mask_image": MASK.resize((51, 37)), "height": 32, "width": 48}
    left = torch.zeros(32, 48)
    left[:, :24] = 1
    masked = draw(pipe, region_masks={"boot": left, "cat": 1 - left}, **wide)
    assert masked.shape == (1, 3, 32, 48)
    assert (masked - draw(pipe, **wide)).abs().max() > 1e-3
    with pytest.raises(RegionMaskError, match=r"is 32 x 32 pixels .* the picture is 48 x 32"):
        draw(pipe, region_masks={"boot": torch.ones(32, 32)}, **wide)


@pytest.mark.parametrize("kind", ["img2img", "xl img2img"])
def test_latents_as_picture(kind, family, draw) -> None:
    ours, theirs, settings = ALL[kind]
    components, files = family(kind)
    pipe, plain = loaded(ours, components, files), build(theirs, components)
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    changed = {**settings, "image": latents}
    found = draw(pipe, active_experts=["cat"], region_masks={"cat": torch.ones(32, 48)}, **changed)
    expected = draw(with_adapters(plain, files, {"cat": 1.0}), **changed)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    "classes",
    [
        (
            StableDiffusionMoLEPipeline,
            StableDiffusionMoLEImg2ImgPipeline,
            StableDiffusionMoLEInpaintPipeline,
        ),
        (
            StableDiffusionXLMoLEPipeline,
            StableDiffusionXLMoLEImg2ImgPipeline,
            StableDiffusionXLMoLEInpaintPipeline,
        ),
    ],
    ids=["sd", "xl"],
)
def test_from_pipe_between_all_shares_experts_and_gates(classes, family, draw) -> None:
    components, files = family("xl img2img" if "XL" in classes[0].__name__ else "img2img")
    settings = dict(zip(classes, ({}, FROM_PICTURE, FROM_MASK), strict=True))
    pipes = [loaded(first, components, files) for first in classes]
    for pipe in pipes:
        train_a_little(pipe)
    pictures = [draw(pipe, **settings[type(pipe)]) for pipe in pipes]
    for i, pipe in enumerate(pipes):
        for second in classes:
            other = second.from_pipe(pipe)
            assert other.mixtures == pipe.mixtures
        following = (i + 1) % len(classes)
        other = classes[following].from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        found = draw(other, **settings[classes[following]])
        torch.testing.assert_close(found, pictures[following], rtol=0, atol=0)
        other.unload_expert("cat")
        assert list(pipe.experts) == ["boot"]


def test_through_a_foreign_pipeline_and_back(family, draw) -> None:
    """Experts stay on the networks in pipelines of diffusers, and ours around those networks knows them."""
    pipe = loaded(StableDiffusionMoLEPipeline, *family("img2img"))
    train_a_little(pipe)
    expected = draw(StableDiffusionMoLEImg2ImgPipeline.from_pipe(pipe), **FROM_PICTURE)
    foreign = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    foreign.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(foreign, **FROM_PICTURE), expected, rtol=0, atol=0)
    back = StableDiffusionMoLEPipeline.from_pipe(foreign)
    assert list(back.experts) == ["boot", "cat"]
    assert back.mixtures == pipe.mixtures
    parts = StableDiffusionMoLEImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert parts.mixtures == pipe.mixtures


@pytest.mark.parametrize("kind", ALL)
def test_saved_as_the_diffusers_pipeline(kind, family, draw, tmp_path) -> None:
    ours, theirs, settings = ALL[kind]
    components, files = family(kind)
    pipe = loaded(ours, components, files)
    pipe.save_pretrained(tmp_path)
    plain = theirs.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        draw(plain, **settings), draw(pipe, mixture="none", **settings), rtol=0, atol=0
    )


def test_inpainting_network_with_nine_channels(family, draw, request) -> None:
    """Inpainting checkpoints read mask and picture as more channels; experts are made for four."""
    from tiny.sdxl import make_xl_components

    _, files = family("xl inpaint")
    components = make_xl_components(request.getfixturevalue("components")["tokenizer"], channels=9)
    pipe = loaded(StableDiffusionXLMoLEInpaintPipeline, components, files)
    plain = build(StableDiffusionXLInpaintPipeline, components)
    expected = draw(with_adapters(plain, files, {"boot": 1.0}), **FROM_MASK)
    torch.testing.assert_close(draw(pipe, active_experts=["boot"], **FROM_MASK), expected, **CLOSE)


def test_starter_from_a_picture() -> None:
    pipe = StableDiffusionMoLEImg2ImgPipeline.from_starter(["boot"])
    assert list(pipe.experts) == ["boot"]


def test_public_names() -> None:
    for cls in {type_ for type_, *_ in ALL.values()}:
        assert getattr(mole_diffusion, cls.__name__) is cls

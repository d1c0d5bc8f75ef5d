"""Anima's pipeline against diffusers' modular blocks, which are the oracle; folders, callbacks, refusals."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimaAutoBlocks, ClassifierFreeGuidance
from PIL import Image
from pipeline_helpers import CLOSE
from tiny.flux import write_transformer_lora
from tiny.qwen import make_anima_components

from mole_diffusion import AnimaMoLEImg2ImgPipeline, AnimaMoLEPipeline
from mole_diffusion.pictures.anima import AnimaPipeline

PROMPTS = ["a boot and a cat", "a cat"]


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return make_anima_components()


def modular(components: dict[str, Any], scale: float) -> Any:
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(**components, guider=ClassifierFreeGuidance(guidance_scale=scale))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "output_type": "pt", "height": 32, "width": 48, **options}
    pictures: Any = pipe(prompt=list(PROMPTS), generator=torch.Generator().manual_seed(3), **given)
    return pictures if isinstance(pictures, torch.Tensor) else pictures.images


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_pictures_are_those_of_the_modular_blocks(
    components: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    """Texts of two lengths, a negative prompt, two pictures of each prompt; an expert is diffusers' LoRA."""
    options = {"negative_prompt": ["dull", "red"], "num_images_per_prompt": 2}
    theirs = modular(copy.deepcopy(components), scale)
    pipe = AnimaMoLEPipeline(**copy.deepcopy(components))
    expected = draw(theirs, output="images", **options)
    assert expected.shape == (4, 3, 32, 48)
    torch.testing.assert_close(draw(pipe, guidance_scale=scale, **options), expected, rtol=0, atol=0)
    file = write_transformer_lora(tmp_path / "boot.safetensors", components, 1, 2, ["attn1.to_q", "ff.net.2"])
    theirs.load_lora_weights(file)
    pipe.load_expert(file)
    with_lora = draw(theirs, output="images", **options)
    assert (with_lora - expected).abs().max() > 0.01
    torch.testing.assert_close(draw(pipe, guidance_scale=scale, **options), with_lora, **CLOSE)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_pictures_that_begin_from_one_are_those_of_the_modular_blocks(
    components: dict[str, Any], strength: float, tmp_path: Path
) -> None:
    """One picture for two prompts; the experts are those of the pipeline it is made from."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    options = {"num_images_per_prompt": 2, "image": Image.fromarray(noise), "strength": strength}
    theirs = modular(copy.deepcopy(components), 3.0)
    drawn = AnimaMoLEPipeline(**copy.deepcopy(components))
    pipe = AnimaMoLEImg2ImgPipeline.from_pipe(drawn, torch_dtype=None)
    expected = draw(theirs, output="images", **options)
    torch.testing.assert_close(draw(pipe, guidance_scale=3.0, **options), expected, rtol=0, atol=0)
    file = write_transformer_lora(tmp_path / "boot.safetensors", components, 1, 2, ["attn1.to_q", "ff.net.2"])
    theirs.load_lora_weights(file)
    drawn.load_expert(file)
    with_lora = draw(theirs, output="images", **options)
    assert (with_lora - expected).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipe, guidance_scale=3.0, **options), with_lora, **CLOSE)
    with pytest.raises(ValueError, match=r"strength is 0\.0; allowed is above 0"):
        draw(pipe, **{**options, "strength": 0.0})


def test_a_folder_that_was_moved_opens_with_components_of_ones_own(
    components: dict[str, Any], tmp_path: Path
) -> None:
    AnimaPipeline(**components).save_pretrained(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    pipe = AnimaMoLEPipeline.from_pretrained(
        tmp_path / "there", vae=components["vae"], torch_dtype=torch.bfloat16
    )
    assert pipe.vae is components["vae"]
    assert pipe.transformer.dtype == pipe.text_conditioner.dtype == torch.bfloat16
    (tmp_path / "there" / "text_conditioner" / "config.json").unlink()
    with pytest.raises(OSError, match="has no text_conditioner that opens"):
        AnimaMoLEPipeline.from_pretrained(tmp_path / "there")


def test_callbacks_change_latents_and_stop(components: dict[str, Any]) -> None:
    pipe, seen = AnimaPipeline(**components), []

    def stop(own: Any, step: int, time: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(time)))
        own._interrupt = step == 1
        return {"latents": torch.zeros_like(values["latents"])}

    found = draw(pipe, output_type="latent", callback_on_step_end=stop)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] == 1000.0
    assert not found.any()
    with pytest.raises(ValueError, match="height and width are 40 and 48; allowed are multiples of 16"):
        draw(pipe, height=40)

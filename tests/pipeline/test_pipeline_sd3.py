"""Stable Diffusion 3.5 through whole pipelines; diffusers and PEFT are the oracle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_checks import BOTH, check_auto, words_of
from diffusers import DiffusionPipeline
from pipeline_helpers import CLOSE, train_a_little, with_adapters
from tiny.flux import make_sd3_components, write_transformer_lora
from tiny.sd import drawing

import mole_diffusion
from mole_diffusion import MoLEConfig, StableDiffusion3MoLEPipeline
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.opening import open_base

TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"),
    *("attn.add_v_proj", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
]
NAMES = ["boot", "cat"]


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_sd3_components(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def files(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_transformer_lora(folder / f"{name}.safetensors", components, seed, 2, TARGETS)
        for seed, name in enumerate(NAMES, 1)
    }


def built(cls: Any, components: dict[str, Any]) -> Any:
    pipe = cls(**copy.deepcopy(components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loaded(components: dict[str, Any], files: dict[str, Path]) -> Any:
    pipe = built(StableDiffusion3MoLEPipeline, components)
    for name, path in files.items():
        pipe.load_expert(path, name=name)
    train_a_little(pipe)
    return pipe


def plain(components: dict[str, Any], kind: str = "") -> Any:
    return built(getattr(mole_diffusion, f"StableDiffusion3MoLE{kind}Pipeline").diffusers_class, components)


def draw(pipe: Any, prompt: Any = "a boot and a cat", **kwargs: Any) -> torch.Tensor:
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    settings |= {"output_type": "pt", "generator": torch.Generator().manual_seed(7)}
    settings |= {"negative_prompt": ["dull"] * len(prompt) if isinstance(prompt, list) else "dull", **kwargs}
    pictures: torch.Tensor = pipe(prompt=prompt, **settings).images
    return pictures


def test_experts_mixtures_and_the_base(
    loaded: Any, components: dict[str, Any], files: dict[str, Path]
) -> None:
    base = draw(plain(components))
    expected = draw(with_adapters(plain(components), files, {"cat": 1.0}))
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(draw(loaded, active_experts=["cat"]), expected, **CLOSE)
    rows = loaded.gate_weights().where(network="transformer")
    assert {row.branch for row in rows} == {"prompt", "negative"}
    assert {"transformer_blocks.0", "transformer_blocks.0.context"} <= {row.group for row in rows}
    expected = draw(with_adapters(plain(components), files, dict.fromkeys(NAMES, 0.5)))
    torch.testing.assert_close(draw(loaded, mixture="nla"), expected, **CLOSE)
    torch.testing.assert_close(draw(loaded, mixture="none"), base, rtol=0, atol=0)
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    assert (draw(loaded, region_masks={"boot": left, "cat": 1 - left}) - draw(loaded)).abs().max() > 1e-3
    loaded.configure(MoLEConfig(composition="output", strength=1.0))
    one = draw(with_adapters(plain(components), files, {"boot": 1.0}))
    torch.testing.assert_close(draw(loaded, active_experts=["boot"]), one, **CLOSE)
    loaded.eject()
    torch.testing.assert_close(draw(loaded), base, rtol=0, atol=0)


def test_gates_without_training(
    components: dict[str, Any], files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = built(StableDiffusion3MoLEPipeline, components)
    for name, path in files.items():
        pipe.load_expert(path, name=name)
    check_auto(pipe, plain(components), files, draw, {"max_sequence_length": 16}, caplog)
    for name, path in files.items():
        pipe.load_expert(path, name=name)
    places, negative = words_of(pipe, BOTH, prompt_2=None, prompt_3=None, max_sequence_length=16)
    first = pipe.tokenizer.tokenize(BOTH)
    last = pipe.tokenizer_3.convert_ids_to_tokens(pipe.tokenizer_3(BOTH).input_ids)
    clip = pipe.tokenizer.model_max_length
    for index, word in enumerate(NAMES):
        # Behind the mark of CLIP's beginning, and among T5's.
        at = [next(i for i, one in enumerate(first) if one.startswith(word)) + 1]
        found = places[:, index].nonzero().flatten().tolist()
        assert set(at) < set(found)
        assert clip + last.index(f"▁{word}") in found
    assert not negative.any()


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_from_a_picture_and_a_mask(
    loaded: Any, components: dict[str, Any], files: dict[str, Path], kind: str
) -> None:
    options: dict[str, Any] = {"image": drawing("boot", 8, size=32), "strength": 0.9}
    if kind == "Inpaint":
        options["mask_image"] = drawing("cat", 8, size=32).convert("L").point(lambda v: 255 * (v > 160))
    ours = getattr(mole_diffusion, f"StableDiffusion3MoLE{kind}Pipeline").from_pipe(loaded)
    ours.set_progress_bar_config(disable=True)
    expected = draw(with_adapters(plain(components, kind), files, {"cat": 1.0}), **options)
    torch.testing.assert_close(draw(ours, active_experts=["cat"], **options), expected, **CLOSE)


def test_folders_and_exports(loaded: Any, components: dict[str, Any], tmp_path: Path) -> None:
    loaded.configure(MoLEConfig(strength=1.0))
    path = tmp_path / "static.safetensors"
    report = loaded.export_lora(path, prompts="a boot", steps=2, size=(32, 32))
    assert report.noise_difference < 1e-4
    expected = draw(loaded, mixture="nla")
    torch.testing.assert_close(
        draw(with_adapters(plain(components), {"static": path}, {"static": 1.0})), expected, **CLOSE
    )
    loaded.save_pretrained(tmp_path / "model")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "model")) is loaded.diffusers_class
    assert type(open_base(str(tmp_path / "model"))) is StableDiffusion3MoLEPipeline


def test_training_says_to_the_network_what_the_pipeline_says(loaded: Any) -> None:
    """One step of the pipeline is one step of the denoiser, and the velocity leads to the picture."""
    denoiser = denoiser_of(loaded, (32, 32))
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": noise, "output_type": "latent"}
    expected = loaded("a boot", height=32, width=32, **options).images
    with torch.no_grad():
        text, latents = denoiser.encode_texts(["a boot"]), noise
        for time in denoiser.schedule(2):
            latents, _ = denoiser.step(denoiser.predict(latents, time, text), time, latents)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert float(denoiser.times_at(torch.tensor([0.25]))) == pytest.approx(0.5)

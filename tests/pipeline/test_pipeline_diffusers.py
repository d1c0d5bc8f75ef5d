"""Everything of the diffusers pipeline keeps working around the experts."""

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from ldm_checkpoint import same_weights, write_ldm_checkpoint
from PIL import Image
from pipeline_helpers import CLOSE, train_a_little, with_adapters

from mole_diffusion.core.errors import InjectionError
from mole_diffusion.pictures.pipelines import StableDiffusionMoLEPipeline


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
    ],
    ids=lambda cls: cls.__name__,
)
def test_schedulers(loaded, plain, draw, lora_files, scheduler) -> None:
    with_adapters(plain, lora_files, {"cat": 1.0})
    for pipe in (loaded, plain):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    steps: list[int] = []

    def note(_pipe, step, _timestep, kwargs):
        steps.append(step)
        return kwargs

    torch.testing.assert_close(
        draw(loaded, active_experts=["cat"], num_inference_steps=4, callback_on_step_end=note),
        draw(plain, num_inference_steps=4),
        **CLOSE,
    )
    assert list(dict.fromkeys(r.step for r in loaded.gate_weights().where(network="unet"))) == steps


def test_callback_sees_and_changes_latents(loaded, draw) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def zero(_pipe, step, _timestep, kwargs):
        seen.append((step, tuple(kwargs["latents"].shape)))
        return {"latents": kwargs["latents"] * 0}

    changed = draw(loaded, callback_on_step_end=zero)
    assert seen == [(i, (1, 4, 4, 4)) for i in range(3)]
    assert (changed - draw(loaded)).abs().max() > 0.01


def test_callback_object_that_ends_guidance(loaded, plain, draw, lora_files) -> None:
    with_adapters(plain, lora_files, {"cat": 1.0})
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    picture = draw(loaded, active_experts=["cat"], num_inference_steps=4, callback_on_step_end=cutoff)
    expected = draw(plain, num_inference_steps=4, callback_on_step_end=cutoff)
    torch.testing.assert_close(picture, expected, **CLOSE)
    negative = loaded.gate_weights().where(network="unet", branch="negative")
    assert {row.step for row in negative} == {0, 1}
    assert {row.step for row in loaded.gate_weights().where(branch="prompt", network="unet")} == {0, 1, 2, 3}


def test_interrupt(loaded, draw) -> None:
    def stop(pipe, step, _timestep, kwargs):
        pipe._interrupt = step == 0
        return kwargs

    draw(loaded, callback_on_step_end=stop)
    assert {row.step for row in loaded.gate_weights().where(network="unet")} == {0}


def test_two_prompts_are_two_singles(loaded, draw) -> None:
    train_a_little(loaded)
    both = draw(
        loaded,
        ["a boot on the beach", "a cat"],
        negative_prompt=["dull", ""],
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
    )
    for i, (prompt, negative) in enumerate([("a boot on the beach", "dull"), ("a cat", "")]):
        generator = torch.Generator().manual_seed(i + 3)
        single = draw(loaded, prompt, negative_prompt=negative, generator=generator)
        torch.testing.assert_close(both[i : i + 1], single, **CLOSE)


def test_pictures_per_prompt(loaded, draw) -> None:
    train_a_little(loaded)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = draw(loaded, "a boot", num_images_per_prompt=2, generator=generators)
    assert {row.entry for row in loaded.gate_weights().where(network="unet")} == {0, 1}
    assert {row.entry for row in loaded.gate_weights().where(network="text_encoder")} == {0}
    single = draw(loaded, "a boot", generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(both[1:], single, **CLOSE)


def test_own_embeddings(loaded, draw) -> None:
    train_a_little(loaded)
    with loaded.composing(active_experts=["cat"]):
        prompt, negative = loaded.encode_prompt("a boot and a cat", "cpu", 1, True)
    picture = draw(loaded, prompt_embeds=prompt, negative_prompt_embeds=negative, active_experts=["cat"])
    torch.testing.assert_close(picture, draw(loaded, active_experts=["cat"]), rtol=0, atol=1e-6)


def test_clip_skip(loaded, draw) -> None:
    skipped = draw(loaded, clip_skip=1)
    assert (skipped - draw(loaded)).abs().max() > 1e-3
    assert not hasattr(loaded.text_encoder, "text_model") or "text_model" in loaded.text_encoder._modules


def test_positional_arguments_latents_and_tuple(loaded, draw) -> None:
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    settings = {"guidance_scale": 3.0, "output_type": "pt", "latents": latents}
    positional = loaded("a boot", 32, 48, 3, **settings).images
    named = draw(loaded, "a boot", height=32, width=48, latents=latents)
    torch.testing.assert_close(positional, named, rtol=0, atol=0)
    assert isinstance(loaded("a boot", num_inference_steps=1, return_dict=False), tuple)
    assert isinstance(loaded("a boot", num_inference_steps=1).images[0], Image.Image)


def test_second_lora_through_diffusers_stacks(loaded, plain, draw, lora_files) -> None:
    """Loaded before or after ours, and taken away again."""
    before = draw(loaded, active_experts=["boot"])
    expected = draw(with_adapters(plain, lora_files, {"boot": 1.0, "cat": 1.0}))
    loaded.load_lora_weights(lora_files["cat"], adapter_name="second")
    torch.testing.assert_close(draw(loaded, active_experts=["boot"]), expected, **CLOSE)
    loaded.eject()
    loaded.load_expert(lora_files["boot"])
    torch.testing.assert_close(draw(loaded), expected, **CLOSE)
    loaded.unload_lora_weights()
    torch.testing.assert_close(draw(loaded), before, **CLOSE)


def test_from_pipe_shares_networks_and_experts(loaded, draw) -> None:
    train_a_little(loaded)
    expected = draw(loaded)
    other = StableDiffusionMoLEPipeline.from_pipe(loaded)
    other.set_progress_bar_config(disable=True)
    assert other.unet is loaded.unet
    assert other.mixtures == loaded.mixtures
    torch.testing.assert_close(draw(other), expected, rtol=0, atol=0)
    other.unload_expert("cat")
    assert list(loaded.experts) == ["boot", "clock"]


def test_from_plain_pipe(plain, pipe, draw, lora_files) -> None:
    ours = StableDiffusionMoLEPipeline.from_pipe(plain)
    ours.set_progress_bar_config(disable=True)
    assert ours.unet is plain.unet
    for one in (ours, pipe):
        one.load_expert(lora_files["cat"])
    torch.testing.assert_close(draw(ours), draw(pipe), rtol=0, atol=0)
    torch.testing.assert_close(draw(plain), draw(ours), rtol=0, atol=0)


def test_save_pretrained_is_a_plain_stable_diffusion(loaded, plain, draw, tmp_path, lora_files) -> None:
    expected = draw(loaded)
    loaded.save_pretrained(tmp_path)
    for cls in (StableDiffusionMoLEPipeline, StableDiffusionPipeline, DiffusionPipeline):
        again = cls.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(draw(again), draw(plain), rtol=0, atol=0)
        if cls is StableDiffusionMoLEPipeline:
            for name, path in lora_files.items():
                again.load_expert(path, name=name)
            torch.testing.assert_close(draw(again), expected, rtol=0, atol=1e-6)


def test_img2img_around_the_same_networks(loaded, draw) -> None:
    img2img = StableDiffusionImg2ImgPipeline.from_pipe(loaded, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "red")
    settings = {"image": picture, "strength": 1.0, "guidance_scale": 3.0}
    gated = draw(img2img, **settings)
    with loaded.composing(mixture="none"):
        base = draw(img2img, **settings)
    assert (gated - base).abs().max() > 0.01
    torch.testing.assert_close(draw(img2img, **settings), gated, rtol=0, atol=0)


def test_controlnet_around_the_same_networks(loaded, plain, draw, lora_files) -> None:
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(loaded.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
    with_adapters(plain, lora_files, {"cat": 1.0})
    pictures = []
    for pipe in (loaded, plain):
        parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
        controlled = StableDiffusionControlNetPipeline(
            **parts, controlnet=copy.deepcopy(controlnet), requires_safety_checker=False
        )
        controlled.set_progress_bar_config(disable=True)
        settings = {"image": Image.new("RGB", (32, 32), "white")}
        if pipe is loaded:
            with loaded.composing(active_experts=["cat"]):
                pictures.append(draw(controlled, **settings))
        else:
            pictures.append(draw(controlled, **settings))
    torch.testing.assert_close(*pictures, **CLOSE)


def test_bfloat16_loses_no_more_than_it_does_in_diffusers(loaded, plain, lora_files, draw) -> None:
    plain.load_lora_weights(lora_files["cat"])
    errors = []
    for pipe, options in ((plain, {}), (loaded, {"active_experts": ["cat"]})):
        expected = draw(pipe, **options)
        pipe.to(torch.bfloat16)
        found = draw(pipe, **options)
        errors.append(float((found.float() - expected).abs().mean()))
    assert 0 < errors[1] < 1.5 * errors[0]
    assert draw(loaded).isfinite().all()


def test_attention_slicing_and_vae_slicing(loaded, draw) -> None:
    expected = draw(loaded)
    loaded.enable_attention_slicing()
    loaded.vae.enable_slicing()
    torch.testing.assert_close(draw(loaded), expected, **CLOSE)


def test_model_offload(loaded, draw, lora_files) -> None:
    """With experts loaded before and after."""
    train_a_little(loaded)
    expected = draw(loaded)
    loaded.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(draw(loaded), expected, rtol=0, atol=1e-6)
    one = draw(loaded, active_experts=["cat"])
    loaded.eject()
    loaded.load_expert(lora_files["cat"])
    torch.testing.assert_close(draw(loaded), one, rtol=0, atol=1e-6)


def test_from_single_file(plain, draw, lora_files, tmp_path, pipe) -> None:
    """A whole checkpoint in LDM format opens as our pipeline and takes experts."""
    plain.save_pretrained(tmp_path)
    file = write_ldm_checkpoint(tmp_path / "ldm.safetensors", plain)
    ours = StableDiffusionMoLEPipeline.from_single_file(
        str(file), config=str(tmp_path), local_files_only=True, safety_checker=None
    )
    ours.set_progress_bar_config(disable=True)
    assert type(ours) is StableDiffusionMoLEPipeline
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(ours, part), getattr(plain, part)), part
    for one in (ours, pipe):
        one.load_expert(lora_files["cat"])
    torch.testing.assert_close(draw(ours), draw(pipe), rtol=0, atol=0)


def test_from_pipe_with_another_text_encoder_does_not_share(loaded, plain, lora_files) -> None:
    other = StableDiffusionMoLEPipeline.from_pipe(loaded, text_encoder=plain.text_encoder)
    assert not other.experts
    with pytest.raises(InjectionError, match="UNet2DConditionModel already carries a mixture"):
        other.load_expert(lora_files["cat"])
    assert list(loaded.experts) == ["boot", "cat", "clock"]


def test_composing_holds_for_its_block_only(loaded, draw) -> None:
    other = StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    gates = draw(loaded, mixture="gates")
    torch.testing.assert_close(draw(other), gates, rtol=0, atol=0)
    with loaded.composing(mixture="gates", active_experts=["cat"], expert_scales={"cat": 0.5}):
        inside = draw(other)
        torch.testing.assert_close(draw(loaded, mixture="gates"), gates, rtol=0, atol=0)
        torch.testing.assert_close(draw(other), inside, rtol=0, atol=0)
    torch.testing.assert_close(draw(other), gates, rtol=0, atol=0)
    half = draw(loaded, mixture="gates", active_experts=["cat"], expert_scales={"cat": 0.5})
    torch.testing.assert_close(inside, half, rtol=0, atol=0)


def test_compiled_unet_is_compiled_once_and_recorded(loaded, draw) -> None:
    """The steps of a call and further calls run what the first step compiled."""
    train_a_little(loaded)
    expected = draw(loaded)
    rows = loaded.gate_weights().to_array()[0]
    loaded.unet = torch.compile(loaded.unet, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(draw(loaded), expected, **CLOSE)
    torch.testing.assert_close(loaded.gate_weights().to_array()[0], rows, atol=1e-5, rtol=0)
    torch.compiler.reset()

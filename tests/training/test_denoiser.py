"""Pipelines of diffusers as denoisers, against what diffusers itself computes."""

from typing import Any

import pytest
import torch
from tiny.sd import make_vae
from tiny.sdxl import make_xl_components

from mole_diffusion import StableDiffusionXLMoLEPipeline
from mole_diffusion.app.composing import ComposeRequest, decode, picture_size
from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers import denoiser_of, own_size
from mole_diffusion.pictures.denoisers.autoencoder import decode as decode_latents
from mole_diffusion.pictures.denoisers.autoencoder import encode
from mole_diffusion.pictures.training.workbench import picture_tensor


@pytest.fixture
def xl(components: dict[str, Any], tiny_build: Any) -> Any:
    return tiny_build(StableDiffusionXLMoLEPipeline, make_xl_components(components["tokenizer"]))


def test_a_size_may_be_one_number_or_two(pipe: Any) -> None:
    assert own_size(pipe) == (32, 32)
    pipe.unet.register_to_config(sample_size=(4, 6))
    pipe = type(pipe).from_pipe(pipe)  # diffusers looks at the size when a pipeline is made
    assert own_size(pipe) == (32, 48)
    assert denoiser_of(pipe).latent_shape == (4, 4, 6)
    assert denoiser_of(pipe, (64, 32)).latent_shape == (4, 8, 4)
    assert picture_size(pipe, ComposeRequest(prompt="a boot")) == (48, 32)
    assert picture_size(pipe, ComposeRequest(prompt="a boot", width=64)) == (64, 32)
    assert pipe("a boot", num_inference_steps=1, output_type="pt").images.shape[-2:] == (32, 48)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_pictures_and_latents_are_scaled_and_shifted(shift: float | None) -> None:
    """As diffusers' own pipelines of Stable Diffusion 3 and FLUX do."""
    torch.manual_seed(0)
    vae = make_vae(scaling_factor=1.7, shift_factor=shift).eval()
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        latents = encode(vae, pictures)
        expected = (vae.encode(pictures * 2 - 1).latent_dist.mode() - (shift or 0)) * 1.7
        torch.testing.assert_close(latents, expected)
        pixels = vae.decode(latents / 1.7 + (shift or 0)).sample
        torch.testing.assert_close(decode_latents(vae, latents), (pixels / 2 + 0.5).clamp(0, 1))


def test_a_preview_is_the_picture_of_its_latents(pipe: Any) -> None:
    """Also where latents are shifted, which the app's preview left out."""
    torch.manual_seed(0)
    pipe.vae = make_vae(scaling_factor=0.2, shift_factor=0.7).eval()
    latents = torch.randn(2, 4, 4, 4)
    preview = picture_tensor(decode(pipe, latents), (32, 32))
    torch.testing.assert_close(preview, decode_latents(pipe.vae, latents)[0], atol=1 / 255, rtol=0)


def test_predictions_are_those_of_the_unet(pipe: Any, xl: Any) -> None:
    texts = ["", "a red boot"]
    times = torch.tensor([500, 20])
    with torch.no_grad():
        denoiser = denoiser_of(pipe)
        latents = torch.randn(2, *denoiser.latent_shape)
        found = denoiser.predict(latents, times, denoiser.encode_texts(texts))
        words = pipe.encode_prompt(texts, "cpu", 1, False)[0]
        torch.testing.assert_close(found, pipe.unet(latents, times, encoder_hidden_states=words).sample)

        denoiser = denoiser_of(xl, (64, 32))
        latents = torch.randn(2, *denoiser.latent_shape)
        condition = denoiser.encode_texts(texts)
        assert condition.tensors["time_ids"].tolist() == [[64, 32, 0, 0, 64, 32]] * 2
        assert not condition.tensors["encoder_hidden_states"][0].any(), "SDXL says nothing with zeros"
        found = denoiser.predict(latents, times, condition)
        words, _, pooled, _ = xl.encode_prompt(texts[1:], do_classifier_free_guidance=False)
        sizes = torch.tensor([[64.0, 32, 0, 0, 64, 32]])
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = xl.unet(
            latents[1:], times[1:], encoder_hidden_states=words, added_cond_kwargs=added
        ).sample
        torch.testing.assert_close(found[1:], expected)


def test_what_takes_part_is_named_as_in_the_pipeline(pipe: Any, xl: Any) -> None:
    assert denoiser_of(pipe).networks == {
        "unet": pipe.unet,
        "text_encoder": pipe.text_encoder,
        "vae": pipe.vae,
    }
    assert list(denoiser_of(xl).networks) == ["unet", "text_encoder", "text_encoder_2", "vae"]


def test_rows_of_conditions() -> None:
    tokens, pooled = torch.arange(6.0).view(2, 3), torch.arange(2.0).view(2, 1).requires_grad_()
    condition = Condition({"tokens": tokens, "pooled": pooled})
    assert len(condition) == 2
    rows = condition[[1, 1, 0]]
    assert rows.tensors["tokens"].tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert len(condition[:1]) == 1
    both = rows.after(condition[:1])
    assert len(both) == 6
    assert both.tensors["pooled"][:, 0].tolist() == [0, 0, 0, 1, 1, 0]
    assert both.tensors["pooled"].requires_grad
    assert not both.detach().tensors["pooled"].requires_grad


def test_schedulers_that_cannot_be_trained_with_still_decode(pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    denoiser = denoiser_of(pipe)
    assert denoiser.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    with pytest.raises(TrainingError, match="FlowMatchEulerDiscreteScheduler"):
        denoiser.check_trainable()

"""`mixture="auto"`: what pipelines draw with experts whose gates nobody trained."""

from __future__ import annotations

import logging

import pytest
import torch
from pipeline_helpers import CLOSE, train_a_little, with_adapters
from torch.utils.flop_counter import FlopCounterMode

from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.errors import AllExpertsMaskedError, ConfigError, NoExpertsError, UnknownExpertError
from mole_diffusion.pictures.auto import AutoMixture

LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


def test_the_only_expert_that_a_prompt_names_is_that_lora_alone(loaded, plain, lora_files, draw) -> None:
    expected = draw(with_adapters(plain, lora_files, {"cat": 1.0}), "a cat on the beach")
    phrases = {name: name for name in loaded.experts}
    ours = draw(loaded, "a cat on the beach", mixture=AutoMixture(phrases=phrases))
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - draw(loaded, "a cat on the beach", mixture="none")).abs().max() > 0.01


def test_experts_that_the_prompt_does_not_name_have_no_influence(loaded, draw) -> None:
    phrases = {name: name for name in loaded.experts}
    three = draw(loaded, mixture=AutoMixture(phrases=phrases))
    loaded.unload_expert("clock")
    torch.testing.assert_close(three, draw(loaded, mixture="auto"), **CLOSE)


def test_experts_without_a_word_count_everywhere(loaded, plain, lora_files, draw) -> None:
    prompt = "the beach"
    ours = draw(loaded, prompt, mixture="auto")
    third = dict.fromkeys(lora_files, 1 / 3)
    torch.testing.assert_close(ours, draw(with_adapters(plain, lora_files, third), prompt), **CLOSE)


def test_a_style_counts_everywhere_beside_the_subject(loaded, draw) -> None:
    words = {"boot": "boot", "cat": "cat", "clock": "red"}
    settings = AutoSettings(strength=0.5, style=1.0, style_inside=1.0)
    styled = AutoMixture(settings, phrases=words, styles=("clock",))
    draw(loaded, "a red boot and a cat", mixture=styled, guidance_scale=1.0)
    means = loaded.gate_weights().where(network="unet").mean("group", "expert")
    tokens = {key: value for key, value in means.items() if not key[0].endswith(".context")}
    for (_, expert), weight in tokens.items():
        assert weight == 1.0 if expert == "clock" else 0.0 < weight < 1.0


def test_a_style_gives_way_in_the_words_of_others(loaded, draw) -> None:
    """In the text encoder; the words of nobody, and its own, have it in full."""
    words = {"boot": "boot", "cat": "cat", "clock": "red"}
    means = {}
    for share in (1.0, 0.0):
        called = AutoMixture(AutoSettings(style_text=share), phrases=words, styles=("clock",))
        draw(loaded, "a red boot and a cat", mixture=called, guidance_scale=1.0)
        rows = loaded.gate_weights().where(network="text_encoder", branch="prompt")
        means[share] = {name: weight for (name,), weight in rows.mean("expert").items()}
    length = loaded.tokenizer.model_max_length
    own = sum(len(loaded.tokenizer(one, add_special_tokens=False).input_ids) for one in ("boot", "cat"))
    assert means[1.0]["clock"] == pytest.approx(1.0)
    assert means[0.0]["clock"] == pytest.approx(1 - own / length)
    assert {name: means[0.0][name] for name in ("boot", "cat")} == {
        name: means[1.0][name] for name in ("boot", "cat")
    }


def test_a_masked_expert_is_an_expert_that_is_not_there(loaded, draw) -> None:
    masked = draw(loaded, mixture="auto", active_experts=["boot", "cat"])
    assert (masked - draw(loaded, mixture="auto")).abs().max() > 1e-3
    loaded.unload_expert("clock")
    torch.testing.assert_close(masked, draw(loaded, mixture="auto"), **CLOSE)


def test_order_changes_nothing(pipe, lora_files, draw) -> None:
    for name in ("boot", "cat"):
        pipe.load_expert(lora_files[name], name=name)
    one = draw(pipe, mixture="auto")
    pipe.eject()
    for name in ("cat", "boot"):
        pipe.load_expert(lora_files[name], name=name)
    torch.testing.assert_close(draw(pipe, mixture="auto"), one, **CLOSE)


def test_a_batch_is_its_singles(loaded, draw) -> None:
    prompts = ["a boot and a cat", "a cat on the boot"]
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    both = draw(loaded, prompts, latents=latents, mixture="auto")
    for index, prompt in enumerate(prompts):
        single = draw(loaded, prompt, latents=latents[index : index + 1], mixture="auto")
        torch.testing.assert_close(both[index : index + 1], single, **CLOSE)
    several = draw(loaded, prompts[0], latents=latents, num_images_per_prompt=2, mixture="auto")
    torch.testing.assert_close(several[:1], both[:1], **CLOSE)


def test_a_prompt_of_a_batch_may_name_nobody(loaded, draw) -> None:
    called = AutoMixture(phrases={name: name for name in loaded.experts})
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    both = draw(loaded, ["the beach", "a boot and a cat"], latents=latents, mixture=called)
    base = draw(loaded, "the beach", latents=latents[:1], mixture="none")
    torch.testing.assert_close(both[:1], base, **CLOSE)
    named = draw(loaded, "a boot and a cat", latents=latents[1:], mixture=called)
    torch.testing.assert_close(both[1:], named, **CLOSE)


@pytest.mark.parametrize("guided", [True, False])
def test_the_prompts_of_a_batch_may_name_whom_they_like(loaded, draw, guided: bool) -> None:
    """Two and a style, two, one alone, the style alone, nobody: also with their negative prompts."""
    words = {"boot": "boot", "cat": "cat", "clock": "red"}
    called = AutoMixture(phrases=words, styles=("clock",))
    prompts = ["a red boot and a cat", "a boot and a cat", "a cat on the beach", "a red house", "the beach"]
    latents = torch.randn(len(prompts), 4, 4, 4, generator=torch.Generator().manual_seed(1))
    options = {"mixture": called} if guided else {"mixture": called, "guidance_scale": 1.0}
    both = draw(loaded, prompts, latents=latents, **options)
    for row, prompt in enumerate(prompts):
        one = draw(loaded, prompt, latents=latents[row : row + 1], **options)
        torch.testing.assert_close(both[row : row + 1], one, **CLOSE)


def test_scales_hold(loaded, draw) -> None:
    none = draw(loaded, mixture="auto", expert_scales={"boot": 0.0})
    masked = draw(loaded, mixture="auto", active_experts=["cat", "clock"])
    torch.testing.assert_close(none, masked, **CLOSE)
    half = draw(loaded, mixture="auto", expert_scales={"boot": 0.5})
    assert (half - draw(loaded, mixture="auto")).abs().max() > 1e-3


def test_regions_are_places_from_the_first_step_on(loaded, draw) -> None:
    strength = 1.4
    mixture = AutoMixture(AutoSettings(strength=strength, detail=strength))
    two = {"active_experts": ["boot", "cat"], "mixture": mixture}
    one = draw(loaded, region_masks={"boot": LEFT, "cat": 1 - LEFT}, **two)
    weights = loaded.gate_weights().where(network="unet", branch="prompt", step=0).mean("group", "expert")
    tokens = {key: value for key, value in weights.items() if not key[0].endswith(".context")}
    assert tokens
    for (_, expert), weight in tokens.items():
        # Half the picture each.
        assert weight == pytest.approx(0.0 if expert == "clock" else strength / 2, abs=1e-5)
    other = draw(loaded, region_masks={"boot": 1 - LEFT, "cat": LEFT}, **two)
    assert (one - other).abs().max() > 0.01


def test_without_gates_it_is_what_a_call_draws_with(loaded, draw) -> None:
    assert loaded.usual_mixture == "auto"
    assert torch.equal(draw(loaded), draw(loaded, mixture="auto"))
    train_a_little(loaded)
    assert loaded.usual_mixture == "gates"
    assert torch.equal(draw(loaded), draw(loaded, mixture="gates"))
    assert (draw(loaded) - draw(loaded, mixture="auto")).abs().max() > 1e-3


def test_la_and_nla_are_as_near_as_ever(loaded, plain, lora_files, draw) -> None:
    for word, weight in (("la", 1.0), ("nla", 1 / 3)):
        expected = draw(with_adapters(plain, lora_files, dict.fromkeys(lora_files, weight)))
        torch.testing.assert_close(draw(loaded, mixture=word), expected, **CLOSE)
        plain.unload_lora_weights()


def test_embeddings_name_nobody(loaded, draw, caplog) -> None:
    with loaded.composing(mixture="none"):
        prompt, negative = loaded.encode_prompt("a boot and a cat", "cpu", 1, True)
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    with caplog.at_level(logging.WARNING):
        usual = draw(loaded, **given)
    assert "embeddings in place of a prompt do not say whose words they are" in caplog.text
    assert torch.equal(usual, draw(loaded, mixture="gates", **given))
    with pytest.raises(ConfigError, match="given a text that this pipeline did not encode"):
        draw(loaded, mixture="auto", **given)


def test_a_prompt_that_names_nobody_says_so(loaded, draw, caplog) -> None:
    phrases = {name: f"{name} of mine" for name in loaded.experts}
    with caplog.at_level(logging.WARNING):
        picture = draw(loaded, "the beach", mixture=AutoMixture(phrases=phrases))
    assert "write 'boot of mine', 'cat of mine', 'clock of mine'" in caplog.text
    torch.testing.assert_close(picture, draw(loaded, "the beach", mixture="none"), **CLOSE)


def test_wrong_names_are_refused(loaded, pipe, draw) -> None:
    with pytest.raises(UnknownExpertError, match="'dog'"):
        draw(loaded, mixture=AutoMixture(phrases={"dog": "a dog"}))
    with pytest.raises(UnknownExpertError, match="'dog'"):
        draw(loaded, mixture="auto", active_experts=["dog"])
    with pytest.raises(AllExpertsMaskedError):
        draw(loaded, mixture="auto", active_experts=[])
    loaded.eject()
    with pytest.raises(NoExpertsError):
        draw(loaded, mixture="auto")


def test_nothing_is_left_behind(loaded, draw) -> None:
    before = draw(loaded, mixture="gates")
    base = draw(loaded, mixture="none")
    draw(loaded, mixture="auto")
    assert torch.equal(draw(loaded, mixture="gates"), before)
    assert torch.equal(draw(loaded, mixture="none"), base)
    loaded.eject()
    assert not any(module._forward_hooks for module in loaded.unet.modules())
    assert torch.equal(draw(loaded), base)


def test_it_costs_no_more_than_trained_gates(loaded, draw) -> None:
    train_a_little(loaded)
    counted = {}
    for mixture in ("gates", "auto"):
        draw(loaded, mixture=mixture)  # what is made once
        with FlopCounterMode(display=False) as counter:
            draw(loaded, mixture=mixture)
        counted[mixture] = counter.get_total_flops()
    assert counted["auto"] <= 1.3 * counted["gates"]


def test_sdxl(xl_loaded, xl_plain, xl_lora_files, draw) -> None:
    phrases = {name: name for name in xl_loaded.experts}
    ours = draw(xl_loaded, "a cat on the beach", mixture=AutoMixture(phrases=phrases))
    expected = draw(with_adapters(xl_plain, xl_lora_files, {"cat": 1.0}), "a cat on the beach")
    torch.testing.assert_close(ours, expected, **CLOSE)
    both = draw(xl_loaded, "a cat and a boot", mixture="auto")
    assert (both - draw(xl_loaded, "a cat and a boot", mixture="la")).abs().max() > 1e-3

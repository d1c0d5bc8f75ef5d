"""Embeddings bundled in expert files: against diffusers' textual inversion, conflicts, and their removal."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from pipeline_helpers import CLOSE, build, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.flux import FLUX_TARGETS, make_flux_components, write_transformer_lora

from mole_diffusion import (
    FluxMoLEPipeline,
    MoLEConfig,
    StableDiffusionMoLEPipeline,
    StableDiffusionXLMoLEPipeline,
)
from mole_diffusion.core.errors import ExpertLoadError

PROMPT = "a zork and a cat"


def vectors(rows: int, width: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def bundle(source: Path, path: Path, embeddings: dict[str, torch.Tensor]) -> Path:
    """The LoRA file with embeddings in it."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    bundled = {f"bundle_emb.{key}": value for key, value in embeddings.items()}
    save_file({**load_file(source), **bundled}, path, metadata)
    return path


@pytest.fixture
def boot(lora_files: dict[str, Path], tmp_path: Path) -> Path:
    """An expert with a word of one vector and one of two."""
    words = {"zork.emb_params": vectors(1, 24), "red kipra.string_to_param.*": vectors(2, 24, 8)}
    return bundle(lora_files["boot"], tmp_path / "boot.safetensors", words)


def state(pipe: Any) -> tuple[dict[str, torch.Tensor], dict[str, int], list[int]]:
    """What must come back: every weight, the vocabulary, and how a text is read."""
    weights = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    return weights, dict(pipe.tokenizer.get_vocab()), pipe.tokenizer(f"{PROMPT} red kipra").input_ids


def assert_same(pipe: Any, before: Any) -> None:
    weights, vocabulary, ids = state(pipe)
    assert list(weights) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert vocabulary == before[1]
    assert ids == before[2]
    assert not pipe.text_encoder._forward_pre_hooks
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def textual_inversion(plain: Any, words: dict[str, torch.Tensor]) -> Any:
    """The oracle."""
    for word, found in words.items():
        plain.load_textual_inversion(found, token=word)
    return plain


@pytest.mark.parametrize("prompt", [PROMPT, "a zork", "a red kipra on a boot", "Zork and red kipra"])
def test_is_textual_inversion_of_diffusers(pipe, plain, boot, lora_files, draw, prompt) -> None:
    before = state(pipe)
    pipe.load_expert(boot)
    words = {"zork": vectors(1, 24), "red kipra": vectors(2, 24, 8)}
    expected = draw(textual_inversion(with_adapters(plain, lora_files, {"boot": 1.0}), words), prompt)
    torch.testing.assert_close(draw(pipe, prompt), expected, **CLOSE)
    assert set(pipe.experts["boot"].triggers) == {"zork", "red kipra"}
    pipe.unload_expert("boot")
    assert_same(pipe, before)


def test_a_word_is_no_part_of_a_longer_one(pipe, boot) -> None:
    pipe.load_expert(boot)
    assert "zork" in pipe.tokenizer.tokenize("a zork, and")
    assert "zork" not in pipe.tokenizer.tokenize("a zorkian")


def test_base_model_knows_no_trigger_words(pipe, plain, boot, draw) -> None:
    pipe.load_expert(boot)
    trained = draw(pipe, PROMPT)
    torch.testing.assert_close(draw(pipe, PROMPT, mixture="none"), draw(plain, PROMPT), rtol=0, atol=0)
    torch.testing.assert_close(draw(pipe, PROMPT), trained, rtol=0, atol=0)


def test_experts_come_and_go_in_any_order(pipe, boot, lora_files, draw, tmp_path) -> None:
    other = bundle(lora_files["cat"], tmp_path / "cat.safetensors", {"vim.emb_params": vectors(3, 24, 4)})
    before = state(pipe)
    prompt = "a vim on snow"
    pipe.load_expert(other)
    expected = draw(pipe, prompt)
    pipe.eject()
    pipe.load_expert(boot)
    pipe.load_expert(other)
    torch.testing.assert_close(draw(pipe, prompt, active_experts=["cat"]), expected, **CLOSE)
    pipe.unload_expert("boot")
    torch.testing.assert_close(draw(pipe, prompt), expected, **CLOSE)
    pipe.eject()
    assert_same(pipe, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"zork.emb_params": vectors(1, 24)},
            "brings an embedding for 'zork', which expert 'boot' has already",
        ),
        ({"boot</w>.emb_params": vectors(1, 24)}, "for 'boot</w>', which the tokenizer has already"),
        ({"red kipra_1.emb_params": vectors(1, 24)}, "for 'red kipra_1', which expert 'boot' has already"),
        (
            {"vim.emb_params": vectors(1, 16)},
            "its embedding 'vim' is 16 wide, those of this CLIPTextModel are 24",
        ),
    ],
    ids=["two experts", "vocabulary", "second vector", "width"],
)
def test_conflicts_change_nothing(pipe, boot, lora_files, draw, tmp_path, words, message) -> None:
    pipe.load_expert(boot)
    before, expected = pipe.tokenizer.get_vocab(), draw(pipe, PROMPT)
    file = bundle(lora_files["cat"], tmp_path / "cat.safetensors", words)
    with pytest.raises(ExpertLoadError, match=message):
        pipe.load_expert(file)
    assert list(pipe.experts) == ["boot"]
    assert pipe.tokenizer.get_vocab() == before
    torch.testing.assert_close(draw(pipe, PROMPT), expected, rtol=0, atol=0)


def test_textual_inversion_on_top(pipe, plain, components, boot, lora_files, draw) -> None:
    """Tokens that the user adds afterwards work, also when ours go."""
    pipe.load_expert(boot)
    own = {"vim": vectors(1, 24, 3)}
    textual_inversion(pipe, own)
    prompt = "a zork and a vim"
    oracle = textual_inversion(
        with_adapters(plain, lora_files, {"boot": 1.0}), {"zork": vectors(1, 24)} | own
    )
    torch.testing.assert_close(draw(pipe, prompt), draw(oracle, prompt), **CLOSE)
    before = state(oracle := textual_inversion(build(type(plain), components), own))
    with pipe.composing(mixture="none"):
        assert "zork" not in pipe.tokenizer.get_vocab()
        torch.testing.assert_close(draw(pipe, "a vim", mixture="none"), draw(oracle, "a vim"), **CLOSE)
    gone = draw(pipe, "a zork and a vim")
    pipe.unload_expert("boot")
    assert_same(pipe, before)
    pipe.load_expert(boot)
    torch.testing.assert_close(draw(pipe, prompt), gone, **CLOSE)
    pipe.eject()
    assert_same(pipe, before)


@pytest.mark.parametrize("foreign", [False, True], ids=["through the pipeline", "through another one"])
@pytest.mark.parametrize("vectors_of_it", [0, 1, 2])
@pytest.mark.parametrize("name", [None, "vim"])
def test_textual_inversions_come_and_go_beside_trigger_words(
    pipe, plain, boot, draw, foreign, vectors_of_it, name
) -> None:
    """diffusers takes every added token for a textual inversion, and leaves some behind."""
    before, expected = state(pipe), draw(plain, "a cat")
    pipe.load_expert(boot)
    drawn = draw(pipe, PROMPT)
    other = pipe
    if foreign:
        other = type(plain)(**pipe.components, requires_safety_checker=False)
    if vectors_of_it:
        other.load_textual_inversion(vectors(vectors_of_it, 24, 3), token="vim")
    if name is None or vectors_of_it:
        other.unload_textual_inversion(*([name] if name else []))
    torch.testing.assert_close(draw(pipe, PROMPT), drawn, rtol=0, atol=0)
    pipe.configure(MoLEConfig(pooling="mean"))
    pipe.unload_expert("boot")
    pipe.load_expert(boot)
    torch.testing.assert_close(draw(pipe, PROMPT), drawn, rtol=0, atol=0)
    pipe.eject()
    assert "zork" not in pipe.tokenizer.get_vocab()
    torch.testing.assert_close(draw(pipe, "a cat"), expected, rtol=0, atol=0)
    # What diffusers leaves of a word of several vectors is diffusers' matter.
    if not (name and vectors_of_it == 2):
        assert_same(pipe, before)


def test_saved_base_has_no_trigger_words(pipe, plain, boot, draw, tmp_path) -> None:
    pipe.load_expert(boot)
    pipe.save_pretrained(tmp_path / "base")
    again = type(plain).from_pretrained(tmp_path / "base", safety_checker=None, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert again.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    torch.testing.assert_close(draw(again, PROMPT), draw(plain, PROMPT), rtol=0, atol=0)
    assert "zork" in pipe.tokenizer.get_vocab()


def test_pipelines_share_the_words(pipe, boot, draw) -> None:
    pipe.load_expert(boot)
    other = StableDiffusionMoLEPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(other, PROMPT), draw(pipe, PROMPT), rtol=0, atol=0)
    other.unload_expert("boot")
    assert "zork" not in pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("old_config", [False, True], ids=["end token", "largest token"])
def test_sdxl_has_one_embedding_per_text_encoder(
    xl_components, xl_lora_files, draw, tmp_path, old_config
) -> None:
    """Configurations of old take the largest token's place for the text's end: added tokens are larger.

    diffusers then pools the text at the trigger word; so the oracle there has a word for it that exists.
    """
    components = copy.deepcopy(xl_components)
    first, second = vectors(1, 16), vectors(1, 24, 8)
    words = {"zork.clip_l": first, "zork.clip_g": second}
    file = bundle(xl_lora_files["cat"], tmp_path / "cat.safetensors", words)
    if old_config:
        components["text_encoder_2"].config.eos_token_id = 2
        components["text_encoder_2"].eos_token_id = 2
    pipe = build(StableDiffusionXLMoLEPipeline, components)
    pipe.load_expert(file)
    plain = build(StableDiffusionXLMoLEPipeline.diffusers_class, components)
    with_adapters(plain, xl_lora_files, {"cat": 1.0})
    prompt = PROMPT
    if old_config:
        prompt = "a x and a cat"
        for number, found in (("", first), ("_2", second)):
            table = getattr(plain, f"text_encoder{number}").get_input_embeddings()
            token = getattr(plain, f"tokenizer{number}").convert_tokens_to_ids("x</w>")
            with torch.no_grad():
                table.weight[token] = found[0]
    else:
        plain.load_textual_inversion(
            first, token="zork", text_encoder=plain.text_encoder, tokenizer=plain.tokenizer
        )
        plain.load_textual_inversion(
            second, token="zork", text_encoder=plain.text_encoder_2, tokenizer=plain.tokenizer_2
        )
    torch.testing.assert_close(draw(pipe, PROMPT), draw(plain, prompt), **CLOSE)
    pipe.eject()
    assert "zork" not in pipe.tokenizer.get_vocab()
    assert "zork" not in pipe.tokenizer_2.get_vocab()


def test_words_for_an_absent_text_encoder_are_told(pipe, lora_files, tmp_path, caplog) -> None:
    file = bundle(lora_files["cat"], tmp_path / "cat.safetensors", {"zork.clip_g": vectors(1, 24)})
    pipe.load_expert(file)
    assert "text_encoder_2: not part of this pipeline, the embedding of 'zork' is unused" in caplog.text
    assert "zork" not in pipe.tokenizer.get_vocab()


def test_words_of_flux_are_those_of_its_clip(tmp_path: Path) -> None:
    components = make_flux_components(tmp_path / "tokenizer")
    lora = write_transformer_lora(tmp_path / "boot.safetensors", components, 1, 2, FLUX_TARGETS)
    pipe = FluxMoLEPipeline(**copy.deepcopy(components))
    plain = with_adapters(FluxPipeline(**copy.deepcopy(components)), {"boot": lora}, {"boot": 1.0})

    def draw(drawn: Any, prompt: str) -> torch.Tensor:
        drawn.set_progress_bar_config(disable=True)
        size = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
        draws = torch.Generator().manual_seed(2)
        pictures: torch.Tensor = drawn(prompt, output_type="pt", generator=draws, **size).images
        return pictures

    before = state(pipe)
    pipe.load_expert(bundle(lora, tmp_path / "zork.safetensors", {"zork.clip_l": vectors(1, 24)}))
    without = draw(plain, "a zork")
    plain.load_textual_inversion(vectors(1, 24), token="zork")
    expected = draw(plain, "a zork")
    assert (expected - without).abs().max() > 1e-4
    torch.testing.assert_close(draw(pipe, "a zork"), expected, **CLOSE)
    pipe.unload_expert("zork")
    assert_same(pipe, before)

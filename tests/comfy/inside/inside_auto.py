"""Without gates: whose words the texts are made of that transformers read, and what is drawn with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import pytest
import torch
from conftest import part
from tiny_models import transformers
from torch import Tensor, nn

from mole_diffusion.core.errors import GateMismatchError
from mole_diffusion.core.shared_gates import SharedGates
from tools import encoded, hooks, sample

PROMPT = "a red sks dog and (a sks cat:1.2), on the beach"


def words(reader: Any, tokenizer: Any, sections: Any, rows: int) -> list[str]:
    """What the tokens of each expert say in the text that was noted last; it ends where the tokens end."""
    places: Tensor = reader.texts[-1].places
    assert len(places) == rows
    ids = [token[0] for section in sections for token in section][-rows:]
    return [
        tokenizer.decode([one for one, own in zip(ids, column, strict=True) if own]).strip()
        for column in places.T.tolist()
    ]


def test_words_are_found_in_what_a_language_model_reads(tiny: Any) -> None:
    family, (model, clip, _), pair = tiny
    key = {"flux": "t5xxl", "z_image": "qwen3_4b"}[family]
    mixed, mixed_clip = part("apply").apply_experts(model, clip, pair, None, "auto")
    reader = part("apply").applied_to(mixed).ensemble.choice.auto
    ((text, _),) = mixed_clip.encode_from_tokens_scheduled(tokens := mixed_clip.tokenize(PROMPT))
    found = words(reader, getattr(clip.tokenizer, key).tokenizer, tokens[key], text.shape[1])
    assert found == ["sks dog", "sks cat"]
    encoded(mixed_clip, "the beach")
    assert not reader.texts[-2].places.any()


def test_a_chat_around_a_prompt_calls_nobody(tiny: Any) -> None:
    clip, dog = tiny[1][1], tiny[2].experts[0]
    called = replace(dog, metadata={"mole.trigger": "assistant"})
    encoders = part("binding").text_encoders_of(clip.cond_stage_model)
    reader = part("auto").ClipReader(clip, [called], encoders, [called.name])
    reader.attach(clip.cond_stage_model)
    for prompt, calls in (("a sks dog", False), ("the assistant of a user", True), ("", False)):
        ((text, _),) = clip.encode_from_tokens_scheduled(tokens := clip.tokenize(prompt))
        reader.note(tokens, text)
        assert bool(reader.texts[-1].places.any()) is calls, prompt


def test_the_only_one_that_is_named_draws_as_if_alone(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, (model, clip, _), pair = tiny
    apply = part("apply").apply_experts

    def drawn(experts: Any, prompt: str, without: str = "auto") -> Tensor:
        mixed, mixed_clip = apply(model, clip, experts, None, without)
        return sample(mixed, encoded(mixed_clip, prompt), steps=3, size=64, cfg=2.0)

    alone = drawn(pair.masked(["cat"], {}), "a sks cat on the beach")
    assert torch.allclose(drawn(pair, "a sks cat on the beach"), alone, atol=1e-4)
    base = sample(model, encoded(clip, "the beach"), steps=3, size=64, cfg=2.0)
    assert torch.allclose(drawn(pair, "the beach"), base, atol=1e-4)
    assert not torch.allclose(alone, base, atol=1e-1)
    assert (drawn(pair, PROMPT) - drawn(pair, PROMPT, "equal shares")).abs().max() > 1e-3
    assert "cannot be read" not in caplog.text
    sample(model, encoded(clip, "the beach"), steps=1, size=64)
    assert hooks(model.model.diffusion_model) == 0


def test_shared_gates_refine_it(tiny: Any, tmp_path: Path) -> None:
    _, (model, clip, _), pair = tiny
    apply, files = part("apply").apply_experts, part("experts")

    def drawn(gates: Any, without: str = "auto") -> Tensor:
        mixed, mixed_clip = apply(model, clip, pair, gates, without)
        return sample(mixed, encoded(mixed_clip, PROMPT), steps=3, size=64, cfg=2.0)

    mixtures = part("apply").applied_to(apply(model, clip, pair, None)[0]).ensemble.mixtures
    shared = SharedGates.fresh(mixtures)
    shared.save(tmp_path / "fresh.safetensors")
    expected = drawn(None)
    fresh = files.GatesFile(tmp_path / "fresh.safetensors")
    assert torch.equal(drawn(fresh, "equal shares"), expected)
    assert (fresh.expert_names, fresh.unfinished) == ({}, "")
    with torch.no_grad():
        shared.net[-1].bias.add_(0.5)
    shared.save(tmp_path / "other.safetensors", {"iterations": "3", "training": '{"iterations": 9}'})
    other = files.GatesFile(tmp_path / "other.safetensors")
    assert (drawn(other) - expected).abs().max() > 1e-3
    assert "3 of 9" in other.unfinished
    strange = {part: {**own, "base": {"class": "X", "matrices": "y"}} for part, own in shared.parts.items()}
    SharedGates(strange).save(tmp_path / "strange.safetensors")
    with pytest.raises(GateMismatchError, match="other matrices"):
        drawn(files.GatesFile(tmp_path / "strange.safetensors"))


class _TinyQwenTexts(comfy.text_encoders.qwen_image.QwenImageTEModel):  # type: ignore[misc]
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super(comfy.text_encoders.qwen_image.QwenImageTEModel, self).__init__(
            device=device, dtype=dtype, name="qwen25_7b", clip_model=transformers._TinyQwen3
        )


def test_the_beginning_of_a_chat_that_a_model_leaves_out(tiny: Any) -> None:
    pair = tiny[2]
    target = transformers.ClipTarget(comfy.text_encoders.qwen_image.QwenImageTokenizer, _TinyQwenTexts)
    clip = transformers.comfy.sd.CLIP(target)
    reader = part("auto").ClipReader(clip, pair.experts, {}, pair.names)
    reader.attach(clip.cond_stage_model)
    ((text, _),) = clip.encode_from_tokens_scheduled(tokens := clip.tokenize(PROMPT))
    reader.note(tokens, text)
    assert text.shape[1] < len(tokens["qwen25_7b"][0])
    tokenizer = clip.tokenizer.qwen25_7b.tokenizer
    assert words(reader, tokenizer, tokens["qwen25_7b"], text.shape[1]) == ["sks dog", "sks cat"]


class _Encoders(nn.Module):
    """Which encoders of Stable Diffusion 3 there are: its own are wider than a test needs."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Identity())


def test_words_of_clips_and_of_a_language_model_behind_them(tiny: Any) -> None:
    pair = tiny[2]
    tokenizer = comfy.text_encoders.sd3_clip.SD3Tokenizer()
    tokens = tokenizer.tokenize_with_weights(PROMPT)
    parts = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    for encoders, names, rows in (
        (parts, ("clip_l", "clip_g", "t5xxl"), 154),
        (parts, ("clip_l", "clip_g"), 77),
        ({}, ("t5xxl",), 77),
    ):
        reader = part("auto").ClipReader(_Clip(tokenizer), pair.experts, encoders, pair.names)
        reader.attach(_Encoders(*names))
        reader.note(tokens, torch.ones(1, rows, 4))
        places = reader.texts[-1].places
        assert len(places) == rows
        sections = [tokens["l"], *([tokens["t5xxl"]] if "t5xxl" in names else [])][-rows // 77 :]
        for number, section in enumerate(sections if encoders else [tokens["t5xxl"]]):
            own = (tokenizer.clip_l if section is tokens["l"] else tokenizer.t5xxl).tokenizer
            ids = [token[0] for token in section[0]]
            said = [
                own.decode([one for one, mine in zip(ids, column, strict=True) if mine]).strip()
                for column in places[77 * number : 77 * (number + 1)].T.tolist()
            ]
            assert said == ["sks dog", "sks cat"], names


class _Clip:
    """What has a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

"""Experts on a T5: PEFT is the oracle, and generation says what one forward says."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from mole_diffusion import inject, load_expert
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import (
    ConfigError,
    ExpertLoadError,
    GateMismatchError,
    InjectionError,
    NoExpertsError,
    UnknownExpertError,
)
from mole_diffusion.text import MoLEForSeq2SeqLM, compose
from mole_diffusion.text.model import tell_of_wrong_scaling

from .conftest import Make, save_adapter, tiny_t5

TEXTS = ["the cat sees the red dog", "a b c", "the big dog finds the blue cat a b"]
LABELS = torch.tensor([[4, 5, 6, 7], [8, 9, 1, -100], [10, 11, 12, 1]])
#: Every form that works with a cache.
FORMS = {
    "token": MoLEConfig(),
    "token, hidden": MoLEConfig(gate_input="hidden"),
    "matrix": MoLEConfig(granularity="matrix"),
    "layer": MoLEConfig(granularity="layer"),
    "own": MoLEConfig(gate_input="own"),
    "own, mean": MoLEConfig(gate_input="own", pooling="mean"),
    "mean": MoLEConfig(pooling="mean"),
    "mean, hidden": MoLEConfig(pooling="mean", gate_input="hidden"),
    "network": MoLEConfig(pooling="mean", granularity="network"),
    "sigmoid": MoLEConfig(gate_function="sigmoid"),
}
forms = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


def peft(base: Any, *folders: Path) -> Any:
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name="a0").eval()
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=f"a{number}")
    return model


def logits(model: Any, batch: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch, labels=LABELS[: len(batch["input_ids"])], **options).logits
    return found


def test_one_expert_is_peft(base: Any, adapters: list[Path], make: Make) -> None:
    model = make(3)
    batch = model.read(TEXTS)
    for number, name in enumerate(("one", "two", "three")):
        oracle = logits(peft(base, adapters[number]), batch)
        assert_close(logits(model, batch, active_experts=[name]), oracle, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, batch), oracle, atol=1e-2)


def test_fixed_mixtures_are_peft(base: Any, adapters: list[Path], make: Make) -> None:
    model, oracle = make(2), peft(base, *adapters[:2])
    batch = model.read(TEXTS)
    oracle.base_model.set_adapter(["a0", "a1"])
    assert_close(logits(model, batch, mixture="la"), logits(oracle, batch), rtol=1e-4, atol=1e-4)
    oracle.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "mean", combination_type="cat")
    oracle.set_adapter("mean")
    oracle.eval()
    assert_close(logits(model, batch, mixture="nla"), logits(oracle, batch), rtol=1e-4, atol=1e-4)
    oracle.add_weighted_adapter(["a0", "a1"], [0.9, -0.3], "mixed", combination_type="cat")
    oracle.set_adapter("mixed")
    oracle.eval()
    mixed = logits(model, batch, mixture={"one": 0.9, "two": -0.3})
    assert_close(mixed, logits(oracle, batch), rtol=1e-4, atol=1e-4)


def test_fresh_gates_are_the_mean(make: Make) -> None:
    model = make(3, trained=False)
    batch = model.read(TEXTS)
    assert_close(logits(model, batch), logits(model, batch, mixture="nla"), rtol=1e-4, atol=1e-4)


def test_none_and_eject_are_the_base(base: Any, make: Make) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    assert torch.equal(logits(model, batch, mixture="none"), logits(base, batch))
    assert not torch.allclose(logits(model, batch), logits(base, batch), atol=1e-2)
    model.eject()
    assert torch.equal(logits(model.model, batch), logits(base, batch))


@forms
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_cached_is_uncached(make: Make, config: MoLEConfig, options: dict[str, int]) -> None:
    model = make(2, config)
    batch = model.read(TEXTS)
    settings = {
        "max_new_tokens": 9,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**batch, **settings, **options)
    uncached = model.generate(**batch, **settings, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.scores), torch.stack(uncached.scores), rtol=1e-3, atol=1e-3)


@forms
def test_a_step_is_teacher_forcing(make: Make, config: MoLEConfig) -> None:
    model = make(2, config)
    batch = model.read(TEXTS)
    found = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    with torch.no_grad():
        forced = model(**batch, decoder_input_ids=found.sequences[:, :-1]).logits
    assert_close(torch.stack(found.logits, 1), forced, rtol=1e-3, atol=1e-3)


@forms
def test_a_batch_is_its_singles_on_any_side_of_padding(
    make: Make, config: MoLEConfig, tokenizer: Any
) -> None:
    model = make(2, config)
    singles = [logits(model, model.read([text]))[0] for text in TEXTS[:1]]
    model.tokenizer = copy.deepcopy(tokenizer)
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        batch = model.read([TEXTS[0], TEXTS[2]])
        assert int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
        assert_close(logits(model, batch)[0], singles[0], rtol=1e-3, atol=1e-3)


def test_padding_does_not_count_in_live_weights(make: Make) -> None:
    model = make(2)
    batch, single = model.read([TEXTS[1], TEXTS[2]]), model.read([TEXTS[1]])
    labels = torch.tensor([[8, 9, 1, -100, -100], [4, 5, 6, 7, 1]])

    def live(batch: Any, labels: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            model.model(
                **batch, labels=labels, decoder_attention_mask=(labels != -100).long(), use_cache=False
            )
        return [gate[0] for mixture in model.mixtures.values() for gate in mixture.live_weights().values()]

    padded, alone = live(batch, labels), live(single, labels[:1, :3])
    assert len(padded) == len(alone) == 6
    for ours, theirs in zip(padded, alone, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert any(abs(float(gate[0]) - 0.5) > 0.05 for gate in alone)


def test_answers_do_not_depend_on_the_batch(make: Make) -> None:
    model = make(2)
    together = model.answer(TEXTS, max_new_tokens=6)
    assert together == [model.answer(text, max_new_tokens=6)[0] for text in TEXTS]
    assert together != model.answer(TEXTS, max_new_tokens=6, mixture="none")
    assert model.answer(TEXTS, batch_size=2, num_beams=2, max_new_tokens=6) == model.answer(
        TEXTS, batch_size=3, num_beams=2, max_new_tokens=6
    )


def test_masks_and_scales(make: Make) -> None:
    model, two = make(3), make(2)
    batch = model.read(TEXTS)
    alone = logits(model, batch, active_experts=["two"])
    assert torch.equal(alone, logits(two, batch, active_experts=["two"]))
    halved = logits(model, batch, mixture={"two": 0.5})
    assert_close(logits(model, batch, active_experts=["two"], expert_scales={"two": 0.5}), halved)
    assert_close(logits(model, batch, expert_scales={"one": 0, "three": 0}), alone)
    with pytest.raises(UnknownExpertError):
        model.generate(**batch, active_experts=["four"])
    assert model.ensemble.choice.active is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make: Make, dtype: torch.dtype) -> None:
    """What a data type costs depends on the processor; what it costs the base is the measure."""
    model = make(2)
    batch = model.read(TEXTS)
    mixtures = ("none", "nla", "gates")
    whole = [logits(model, batch, mixture=mixture) for mixture in mixtures]
    model.model.to(dtype)
    halves = [logits(model, batch, mixture=mixture).float() for mixture in mixtures]
    base, mean, gates = (
        float((half - one).norm() / one.norm()) for half, one in zip(halves, whole, strict=True)
    )
    # The experts change more than the base computes, and gates at random lie on knife's edges.
    assert mean < 4 * base
    assert gates < 3.5 * mean
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 3


def test_sampling_obeys_the_seed(make: Make) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, do_sample=True, max_new_tokens=8, min_new_tokens=8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_older_t5_with_a_decoder_of_its_own_depth(tmp_path: Path) -> None:
    base = tiny_t5(3, feed_forward_proj="relu", num_decoder_layers=1, tie_word_embeddings=False)
    folder = save_adapter(base, tmp_path / "wi", 7, target_modules=["k", "o", "wi", "wo"])
    model = compose(copy.deepcopy(base), [folder])
    batch = {"input_ids": torch.tensor([[4, 5, 6, 1]])}
    assert_close(logits(model.model, batch), logits(peft(base, folder), batch), rtol=1e-4, atol=1e-4)


def test_patterns_rslora_and_pickles(base: Any, tmp_path: Path) -> None:
    folder = save_adapter(
        base,
        tmp_path / "many",
        9,
        use_rslora=True,
        rank_pattern={"wo": 2},
        alpha_pattern={"SelfAttention.q": 5},
    )
    model = compose(copy.deepcopy(base), [folder])
    batch = {"input_ids": torch.tensor([[4, 5, 6, 1]])}
    oracle = logits(peft(base, folder), batch)
    assert_close(logits(model.model, batch), oracle, rtol=1e-4, atol=1e-4)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    again = compose(copy.deepcopy(base), [folder])
    assert torch.equal(logits(again.model, batch), logits(model.model, batch))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": logging.getLogger()}))
    with pytest.raises(ExpertLoadError, match="cannot be read as PyTorch weights"):
        compose(copy.deepcopy(base), [folder])


@pytest.mark.parametrize("form", ["token", "own", "mean", "network"])
def test_gates_file(make: Make, form: str, tmp_path: Path) -> None:
    config = FORMS[form]
    model = make(2, config)
    batch = model.read(TEXTS)
    model.save_gates(tmp_path / "gates.safetensors")
    fresh = make(2, trained=False)
    assert not torch.allclose(logits(fresh, batch), logits(model, batch), atol=1e-3)
    fresh.load_gates(tmp_path / "gates.safetensors")
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    with pytest.raises(GateMismatchError):
        make(3).load_gates(tmp_path / "gates.safetensors")


def test_what_cannot_be_right_with_a_cache_is_refused(make: Make, adapters: list[Path]) -> None:
    with pytest.raises(ConfigError, match="would read tokens to come"):
        make(2, MoLEConfig(composition="output", pooling="mean"))
    model = make(2, MoLEConfig(composition="output"))
    batch = model.read(TEXTS)
    with pytest.raises(InjectionError, match="use_cache=False"):
        model.generate(**batch, max_new_tokens=3)
    found = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    with torch.no_grad():
        forced = model(**batch, decoder_input_ids=found.sequences[:, :-1], use_cache=False).logits
    assert_close(torch.stack(found.logits, 1), forced, rtol=1e-3, atol=1e-3)
    alone = logits(model, batch, active_experts=["one"], use_cache=False)
    assert_close(alone, logits(make(1), batch), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="one number of tokens"):
        make(2, MoLEConfig(pooling="flatten"))


def test_flattened_gates_are_bound_to_one_length(make: Make) -> None:
    model = make(2, MoLEConfig(pooling="flatten"), flatten_tokens=12)
    cached = model.generate(**model.read(TEXTS), max_new_tokens=6, do_sample=False)
    assert torch.equal(
        cached, model.generate(**model.read(TEXTS), max_new_tokens=6, do_sample=False, use_cache=False)
    )
    with pytest.raises(InjectionError, match="12 tokens"):
        model.generate(input_ids=torch.tensor([[4, 5, 1]]), max_new_tokens=2)


def test_pooled_gates_need_an_expert_that_reads_the_memory(base: Any, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "feed", 4, target_modules=["wo"])
    with pytest.raises(ConfigError, match="gate_input='hidden' alone"):
        compose(copy.deepcopy(base), [folder], MoLEConfig(pooling="mean"))
    compose(copy.deepcopy(base), [folder], MoLEConfig(pooling="mean", gate_input="hidden"))


def test_pooled_gates_notice_new_parameters(make: Make) -> None:
    model = make(2, MoLEConfig(pooling="mean"))
    batch = model.read(TEXTS)
    with torch.no_grad():
        memory = model.model.get_encoder()(**batch)
    one = model.generate(encoder_outputs=memory, **batch, max_new_tokens=5, output_logits=True,
                         return_dict_in_generate=True).logits[0]  # fmt: skip
    with torch.no_grad():
        for parameter in model.mixtures["decoder"].parameters():
            if parameter.numel() > 1:
                parameter.neg_()
    two = model.generate(encoder_outputs=memory, **batch, max_new_tokens=5, output_logits=True,
                         return_dict_in_generate=True).logits[0]  # fmt: skip
    assert not torch.allclose(one, two, atol=1e-3)


def test_records_are_means_over_a_call(make: Make) -> None:
    model = make(2)
    model.generate(**model.read(TEXTS), max_new_tokens=12)
    rows = model.gate_weights()
    # Two blocks of the encoder; two of the decoder, whose gates of what was read are their own.
    assert len(rows) == (2 + 4) * 3 * 2
    assert {row.network for row in rows} == {"encoder", "decoder"}
    for total in rows.mean("network", "group", "entry").values():
        assert total == pytest.approx(0.5)
    array, labels = rows.to_array("decoder")
    assert "decoder.block.0.context" in labels["group"]
    assert float((array - 0.5).abs().max()) > 0.05
    model.generate(**model.read(TEXTS), max_new_tokens=2, mixture="nla")
    assert len(model.gate_weights()) == 0


def test_names_and_sets(make: Make, adapters: list[Path], base: Any) -> None:
    model = make(2)
    with pytest.raises(ExpertLoadError, match="'one' is loaded already"):
        model.load_expert(adapters[0])
    assert list(model.experts) == ["one", "two"]
    model.load_expert(adapters[2], name="other", scale=0.5)
    model.unload_expert("one")
    assert list(model.experts) == ["two", "other"]
    empty = MoLEForSeq2SeqLM(copy.deepcopy(base))
    with pytest.raises(NoExpertsError):
        empty.generate(input_ids=torch.tensor([[4, 1]]), mixture="la")
    with pytest.raises(ConfigError, match="tokenizer"):
        empty.answer("the cat")
    assert empty.config.d_model == 16
    with pytest.raises(InjectionError, match="T5 family"):
        compose(torch.nn.Linear(2, 2))
    with pytest.raises(InjectionError, match="no matrices"):
        inject(copy.deepcopy(base), [load_expert(adapters[0])], MoLEConfig())


def test_pipeline_and_trainer_go_on_working(make: Make, tmp_path: Path, tokenizer: Any) -> None:
    model = make(2)
    expected = logits(model, model.read(TEXTS[:2]))
    arguments = Seq2SeqTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Seq2SeqTrainer(model.model, arguments)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(*model.read(TEXTS[:2]).values(), LABELS[:2], strict=True)
    ]
    predicted = trainer.predict(rows).predictions
    assert_close(torch.tensor(predicted[0]), expected, rtol=1e-3, atol=1e-3)
    with model.active(["one"]):
        one = model.model.generate(**model.read(TEXTS[:1]), max_new_tokens=4, do_sample=False)
    assert torch.equal(one, model.generate(**model.read(TEXTS[:1]), active_experts=["one"], max_new_tokens=4,
                                           do_sample=False))  # fmt: skip


def test_checkpoints_that_early_versions_ran_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_t5()
    config = model.config.to_dict() | {"tie_word_embeddings": False}
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    tell_of_wrong_scaling(tmp_path, model, {})
    assert not caplog.records
    monkeypatch.setattr("transformers.__version__", "5.0.0")
    if hasattr(model.config, "scale_decoder_outputs"):
        monkeypatch.delattr(model.config, "scale_decoder_outputs")
    tell_of_wrong_scaling(tmp_path, model, {})
    assert "scales the outputs" in caplog.text


def test_own_gates_grow_with_the_experts_and_follow_them(
    make: Make, adapters: list[Path], tmp_path: Path
) -> None:
    sizes = {}
    for count in (1, 2, 3):
        model = make(count, FORMS["own"])
        sizes[count] = sum(g.gate.projection.numel() for m in model.mixtures.values() for g in m.groups)
    assert sizes[2] - sizes[1] == sizes[3] - sizes[2] == sizes[1]
    batch = model.read(TEXTS)
    model.save_gates(tmp_path / "gates.safetensors")
    other = make(0)
    other.load_experts(adapters[::-1])
    other.load_gates(tmp_path / "gates.safetensors")
    assert_close(logits(other, batch), logits(model, batch), rtol=1e-4, atol=1e-4)

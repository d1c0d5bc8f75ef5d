"""Gates learn on texts by the loop of the core; resumed runs, early stop; and exports."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError, NoExpertsError, TrainingError
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.text import MoLEForSeq2SeqLM, TextTrainingConfig
from mole_diffusion.text.examples import pairs_of
from mole_diffusion.text.module import GatesModule
from mole_diffusion.text.training import CrossEntropy

from .conftest import Make, save_adapter
from .test_model import TEXTS, logits

SOURCES = ["the cat sees the dog", "a b c d", "the big dog finds a", "e f g", "the red cat", "h g f e d"]
FAST = TextTrainingConfig(iterations=50, batch_size=6, alpha=0.0, gate_lr=0.2, probe=0, progress=False)


def examples(model: MoLEForSeq2SeqLM, expert: str) -> list[tuple[str, str]]:
    """What one expert alone answers."""
    answers = model.answer(SOURCES, active_experts=[expert], max_new_tokens=6, min_new_tokens=3)
    return list(zip(SOURCES, answers, strict=True))


def loss(
    model: MoLEForSeq2SeqLM, pairs: list[tuple[str, str]], active: Any = None, weights: Any = "gates"
) -> float:
    """Cross entropy of all pairs together."""
    objective = CrossEntropy(model.model, model.tokenizer, pairs, FAST)
    with torch.no_grad(), model.active(active, mixture=weights):
        return float(objective.loss(pairs))


def test_gates_find_the_expert_that_answers(make: Make) -> None:
    model = make(2, trained=False)
    before = [parameter.clone() for parameter in model.model.parameters()]
    pairs = examples(model, "two")
    result = model.train_gates(pairs, FAST)
    fresh, trained, alone = (
        loss(make(2, trained=False), pairs),
        loss(model, pairs),
        loss(model, pairs, ["two"]),
    )
    assert alone < fresh
    assert trained < fresh - 0.5 * (fresh - alone)
    assert result.history[0]["weights"]["two"] == pytest.approx(0.5)
    assert abs(result.history[-1]["weights"]["two"] - 0.5) > 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def task(name: str, count: int = 24) -> list[tuple[str, str]]:
    """Examples of a task of the starter."""
    return [one.pair for one in {**EXPERTS, **UNSEEN}[name].examples(count, "begin", held_out=False)]


def test_gates_begin_with_the_experts_that_know_the_task(tmp_path: Path) -> None:
    names = ["plain-to-vel", "boolean", "date"]
    none = dataclasses.replace(FAST, iterations=1, gate_lr=1e-9, scalar_lr=1e-9, probe=24)
    model = MoLEForSeq2SeqLM.from_starter(names)
    pairs = task("boolean")
    even = loss(model, pairs)
    result = model.train_gates(pairs, none)
    assert result.begun["boolean"] > 0.8
    assert min(result.begun.values()) > 0.02
    # Fixed weights of the same size are the same model.
    assert loss(model, pairs) == pytest.approx(loss(model, pairs, weights=dict(result.begun)), rel=1e-3)
    assert loss(model, pairs) < 0.25 * even
    assert result.history[0]["weights"] == pytest.approx(dict(result.begun), abs=1e-4)
    assert result.history[0]["balance"] == pytest.approx(0, abs=1e-4)
    assert MoLEForSeq2SeqLM.from_starter(names).begin_gates(pairs) == pytest.approx(dict(result.begun))
    for iterations in (1, 2):  # a training that goes on has begun already
        fresh = MoLEForSeq2SeqLM.from_starter(names)
        config = dataclasses.replace(none, iterations=iterations)
        gone = fresh.train_gates(pairs, config, checkpoint_dir=tmp_path)
        assert gone.begun == pytest.approx(dict(result.begun))
        assert len(gone.history) == iterations
    with safe_open(tmp_path / "gates.safetensors", "pt") as file:
        assert json.loads(file.metadata()["begun"])["boolean"] > 0.8
    # Who is trained goes on as it is.
    again = model.train_gates(task("date"), none)
    assert again.begun == pytest.approx(dict(result.begun))
    for pairs, probe in ((task("counting"), 24), (task("boolean"), 0)):
        fresh = MoLEForSeq2SeqLM.from_starter(names)
        begun = fresh.train_gates(pairs, dataclasses.replace(none, probe=probe)).begun
        assert begun == pytest.approx(dict.fromkeys(names, 1 / 3))
        assert all(mixture.prior is None for mixture in fresh.mixtures.values())


def test_an_expert_that_overflows_is_no_beginning(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = MoLEForSeq2SeqLM(copy.deepcopy(base), tokenizer)
    model.load_experts([save_adapter(base, tmp_path / "sane", 1)])
    pairs = examples(model, "sane")
    model.load_expert(save_adapter(base, tmp_path / "mad", 2, loudest=1e38))
    assert not math.isfinite(loss(model, pairs, weights={"mad": 1.0}))
    begun = model.begin_gates(pairs)
    assert sum(begun.values()) == pytest.approx(1)
    assert begun["mad"] <= 0.5


def test_the_balance_loss_is_per_expert(make: Make) -> None:
    rows = {}
    for name, per_expert in (("mean", True), ("sum", False)):
        model = make(3)
        config = TextTrainingConfig(iterations=1, batch_size=4, per_expert=per_expert, progress=False)
        rows[name] = model.train_gates(examples(model, "two"), config).history[0]
    for name, share in (("mean", 3), ("sum", 1)):
        row = rows[name]
        assert row["balance"] > 0.01
        expected = row["parts"]["cross_entropy"] + 0.5 / share * row["balance"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)


def test_an_interrupted_training_goes_on_bitwise(make: Make, tmp_path: Path) -> None:
    config = TextTrainingConfig(iterations=6, batch_size=4, progress=False, validate_every=2, patience=9)
    whole, cut = make(2, trained=False), make(2, trained=False)
    pairs, others = examples(whole, "two"), examples(whole, "one")
    first = whole.train_gates(pairs, config, validation=others)
    cut.train_gates(
        pairs, config, validation=others, checkpoint_dir=tmp_path, callback=lambda event: event.iteration < 4
    )
    fresh = make(2, trained=False)
    second = fresh.train_gates(pairs, config, validation=others, checkpoint_dir=tmp_path, resume=True)
    assert first.validation == second.validation
    assert len(second.history) == 6
    for part, mixture in whole.mixtures.items():
        for a, b in zip(mixture.parameters(), fresh.mixtures[part].parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(TrainingError, match="another training"):
        fresh.train_gates(pairs[:3], config, validation=others, checkpoint_dir=tmp_path, resume=True)
    loaded = make(2, trained=False)
    loaded.load_gates(tmp_path / "gates.safetensors")
    batch = loaded.read(TEXTS)
    assert torch.equal(logits(loaded, batch), logits(fresh, batch))


def test_early_stop_keeps_the_best_gates(make: Make) -> None:
    model = make(2, trained=False)
    config = TextTrainingConfig(
        iterations=60, batch_size=4, alpha=0.0, gate_lr=0.3, progress=False, validate_every=2, patience=2
    )
    # What is trained for makes the other loss larger.
    result = model.train_gates(examples(model, "two"), config, validation=examples(model, "one"))
    assert result.stopped
    assert len(result.history) < 60
    assert result.best == min(result.validation, key=lambda one: result.validation[one])
    with pytest.raises(ConfigError, match="no validation examples"):
        model.train_gates(examples(model, "two"), config)


def test_the_papers_settings(make: Make) -> None:
    config = TextTrainingConfig.paper()
    assert (config.iterations, config.batch_size, config.alpha, config.gate_lr) == (800, 12, 0.5, 1e-5)
    assert (config.schedule, config.per_expert, config.probe) == ("constant", False, 0)
    model = make(2, MoLEConfig(pooling="flatten"), trained=False, flatten_tokens=10)
    few = TextTrainingConfig(iterations=2, batch_size=2, progress=False, flatten_lr=1e-5, schedule="constant")
    assert len(model.train_gates(examples(model, "two"), few).history) == 2
    output = make(2, MoLEConfig(composition="output"), trained=False)
    result = output.train_gates(examples(make(2), "two"), FAST)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_gates_pooled_over_what_was_read_learn(make: Make) -> None:
    model = make(2, MoLEConfig(pooling="mean"), trained=False)
    pairs = examples(model, "two")
    fresh, alone = loss(model, pairs), loss(model, pairs, ["two"])
    model.train_gates(pairs, FAST)
    assert loss(model, pairs) < fresh - 0.3 * (fresh - alone)


def test_transformers_own_trainer_trains_gates(make: Make, tmp_path: Path) -> None:
    model = make(2, trained=False)
    pairs = examples(model, "two")
    objective = CrossEntropy(model.model, model.tokenizer, pairs, FAST)
    names = ("input_ids", "attention_mask", "labels")
    rows = [{name: objective.batch([pair])[name][0].tolist() for name in names} for pair in pairs]
    collate = DataCollatorForSeq2Seq(model.tokenizer, model.model)
    fresh, before = loss(model, pairs), {n: p.clone() for n, p in model.model.named_parameters()}
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=0.1, per_device_train_batch_size=6, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with model.active():
        trainer = Seq2SeqTrainer(GatesModule(model), arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
    assert loss(model, pairs) < fresh - 0.3 * (fresh - loss(model, pairs, ["two"]))
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())


def test_examples_of_every_kind(tmp_path: Path) -> None:
    expected = [("a b", "c"), ("d", "e f")]
    named = [{"context": a, "completion": b, "more": 1} for a, b in expected]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join([json.dumps(named[0]), "", json.dumps(expected[1])]) + "\n")
    assert pairs_of(expected) == pairs_of(named) == pairs_of(path) == pairs_of(iter(expected)) == expected
    for wrong, message in (
        ([], "examples are empty"),
        ([("a", 1)], r"examples\[0\] is \('a', 1\); both must be texts"),
        ([{"text": "a"}], r"has the fields \['text'\]; allowed are 'input' and 'output'"),
        (["ab"], "allowed are two texts"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (3, "examples are int"),
    ):
        with pytest.raises(ConfigError, match=message):
            pairs_of(wrong)
    path.write_text("{")
    with pytest.raises(ConfigError, match="line 1 of"):
        pairs_of(path)


def test_no_experts(base: Any, tokenizer: Any) -> None:
    with pytest.raises(NoExpertsError, match="train_gates: no experts are loaded"):
        MoLEForSeq2SeqLM(copy.deepcopy(base), tokenizer).train_gates([("a", "b")])


def test_an_export_is_its_static_mixture(make: Make, base: Any, tmp_path: Path) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    report = model.export(tmp_path / "frozen", TEXTS)
    assert report.rank == 6
    assert report.experts == ("one", "two")
    opened = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "frozen")).eval()
    again = MoLEForSeq2SeqLM(copy.deepcopy(base), model.tokenizer)
    again.load_expert(tmp_path / "frozen")
    assert_close(logits(again, batch), logits(opened, batch), rtol=1e-4, atol=1e-4)
    # Gates with equal weights for all tokens lose nothing.
    fixed = model.export(tmp_path / "fixed", [], mixture={"one": 0.7, "two": 0.2})
    assert fixed.weights["encoder"]["encoder.block.0"] == {"one": 0.7, "two": 0.2}
    opened = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "fixed")).eval()
    static = logits(model, batch, mixture={"one": 0.7, "two": 0.2})
    assert_close(logits(opened, batch), static, rtol=1e-4, atol=1e-4)
    small = model.export(tmp_path / "small", [], mixture="la", rank=2)
    assert small.rank == 2
    assert 0.01 < small.compression_error < 1
    with pytest.raises(ConfigError, match="texts are empty"):
        model.export(tmp_path / "x", [])


def test_a_merged_model_is_a_plain_model(make: Make, tmp_path: Path) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    before = [parameter.clone() for parameter in model.model.parameters()]
    gated = logits(model, batch)
    model.export(tmp_path / "merged", [], merged=True, mixture="la")
    plain = MoLEForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(plain, batch), logits(model, batch, mixture="la"), rtol=1e-3, atol=1e-3)
    assert plain.answer(TEXTS, max_new_tokens=5) == model.answer(TEXTS, max_new_tokens=5, mixture="la")
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.parameters(), strict=True))
    assert torch.equal(logits(model, batch), gated)

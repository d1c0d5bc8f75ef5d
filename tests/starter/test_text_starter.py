"""The text starter's builder: a T5 as transformers has it, experts as PEFT has them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from tools.starter_text.build import Build, Recipe
from tools.starter_text.network import T5, Shape, fresh, fresh_experts
from tools.starter_text.publish import publish

SHAPE = Shape(50, 16, 24, 2, 8, 2, 2)


def test_the_network_is_transformers_t5() -> None:
    weights = fresh(SHAPE, 0.5, seed=0)
    theirs = T5ForConditionalGeneration(T5Config(**SHAPE.config())).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    ids, targets = torch.randint(3, 50, (3, 12)), torch.randint(3, 50, (3, 7))
    ids[1, 8:], targets[2, 4:] = 0, 0
    ours = T5(SHAPE, 12, 7, torch.device("cpu"), torch.float32)
    labels = targets.masked_fill(targets == 0, -100)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        assert_close(ours.loss(weights, None, ids, targets), expected, rtol=1e-4, atol=1e-5)


def test_experts_side_by_side_are_each_alone() -> None:
    weights, lora = fresh(SHAPE, 0.5, seed=0), fresh_experts(SHAPE, 3, 2, seed=1)
    for down, up in lora.values():
        down.normal_(0, 0.3)
        up.normal_(0, 0.3)
    ids, targets = torch.randint(3, 50, (6, 12)), torch.randint(3, 50, (6, 7))
    cpu = torch.device("cpu")
    together = T5(SHAPE, 12, 7, cpu, torch.float32, experts=3).loss(weights, lora, ids, targets)
    single = T5(SHAPE, 12, 7, cpu, torch.float32, experts=1)
    each = [
        single.loss(
            weights,
            {name: (down[k : k + 1], up[k : k + 1]) for name, (down, up) in lora.items()},
            ids[2 * k : 2 * k + 2],
            targets[2 * k : 2 * k + 2],
        )
        for k in range(3)
    ]
    assert_close(together, torch.stack(each).sum(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    recipe = Recipe(
        base_examples=300, base_batch=4, expert_examples=20, expert_batch=1, steps=(4, 3), evaluated=2
    )
    Build(recipe, Shape(0, 32, 48, 2, 16, 1, 1), folder / "out", folder / "work", "cpu", 60.0, 1).run()
    publish(folder / "out", folder / "starter")
    return folder


def test_what_is_built_opens_in_transformers_and_peft(built: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(built / "starter", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(built / "starter")
    for task in (*EXPERTS.values(), *UNSEEN.values()):
        for example in task.examples(5, "words", held_out=True):
            for text in (example.source, example.target):
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert {path.name for path in (built / "starter" / "experts").iterdir()} == set(EXPERTS)
    batch = tokenizer(["the cat"], return_tensors="pt")
    labels = tokenizer(["a b"], return_tensors="pt").input_ids
    with torch.no_grad():
        base = model(**batch, labels=labels).logits
        wrapped = PeftModel.from_pretrained(model, built / "starter" / "experts" / "boolean").eval()
        assert not torch.equal(wrapped(**batch, labels=labels).logits, base)


def test_a_build_that_was_cut_goes_on(built: Path) -> None:
    before = (built / "out" / "base.safetensors").read_bytes()
    (built / "out" / "experts.safetensors").unlink()
    recipe = Recipe(base_batch=4, expert_examples=20, expert_batch=1, steps=(4, 3), evaluated=2)
    Build(recipe, Shape(0, 32, 48, 2, 16, 1, 1), built / "out", built / "work", "cpu", 60.0, 1).run()
    assert (built / "out" / "base.safetensors").read_bytes() == before
    assert (built / "out" / "experts.safetensors").is_file()


def test_the_base_never_sees_what_only_experts_know() -> None:
    rng = Random(0)
    lessons = [some_lesson(rng) for _ in range(5000)]
    for one in lessons:
        for language in ("vel", "ron", "dak"):
            assert f"translate to {language}:" not in one.source
        assert not one.source.startswith(("today is", "on the desk"))

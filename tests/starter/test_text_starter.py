"""The text starter's builder: a T5 as transformers has it, experts as PEFT has them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from mole_diffusion.evaluation.text.scorers import is_exact
from mole_diffusion.starter.text.location import text_experts, text_starter
from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.text import MoLEForSeq2SeqLM
from tools.starter_text.build import Build, Recipe
from tools.starter_text.network import T5
from tools.starter_text.publish import publish
from tools.starter_text.shape import Shape
from tools.starter_text.training import Step
from tools.starter_text.weights import (
    fresh,
    fresh_experts,
    named,
    named_experts,
    stacked,
    stacked_experts,
)

SHAPE = Shape(50, 16, 24, 2, 8, 2, 2)


@pytest.mark.parametrize("mimetic", [False, True])
def test_the_network_is_transformers_t5(mimetic: bool) -> None:
    stacks = fresh(SHAPE, 0.5, seed=0, mimetic=mimetic)
    weights = named(SHAPE, stacks)
    theirs = T5ForConditionalGeneration(T5Config(**SHAPE.config())).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    torch.manual_seed(0)
    ids, targets = torch.randint(3, 50, (6, 12)), torch.randint(3, 50, (6, 7))
    ids[1, 8:], targets[2, 4:] = 0, 0
    ids[3:, 6:], targets[3:, 3:] = 0, 0
    ours = T5(SHAPE, 12, 7, torch.device("cpu"), torch.float32)
    labels = targets.masked_fill(targets == 0, -100)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        assert_close(ours.loss(stacks, None, [(ids, targets)]), expected, rtol=1e-4, atol=1e-5)
        # The same in buckets of two lengths.
        shorter = [(ids[:3], targets[:3]), (ids[3:, :6], targets[3:, :3])]
        assert_close(ours.loss(stacks, None, shorter), expected, rtol=1e-4, atol=1e-5)
        written = theirs.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=7, min_new_tokens=7)
        greedy = ours.greedy(stacks, None, ids, 7)
    # Theirs may not end before all are written.
    before_end = (greedy == 1).long().cumsum(1) == 0
    assert before_end.any()
    assert torch.equal(greedy[before_end], written[:, 1:][before_end])


def test_weights_go_to_names_and_back() -> None:
    stacks = fresh(SHAPE, 0.5, seed=0)
    for name, value in stacked(SHAPE, named(SHAPE, stacks)).items():
        assert torch.equal(value, stacks[name])
    lora = fresh_experts(SHAPE, 3, 2, seed=1)
    again = stacked_experts(SHAPE, [named_experts(SHAPE, lora, number) for number in range(3)])
    assert set(again) == set(lora)
    assert all(torch.equal(value, lora[name]) for name, value in again.items())


def test_experts_side_by_side_are_each_alone() -> None:
    stacks, lora = fresh(SHAPE, 0.5, seed=0), fresh_experts(SHAPE, 3, 2, seed=1)
    for factor in lora.values():
        factor.normal_(0, 0.3)
    ids, targets = torch.randint(3, 50, (6, 12)), torch.randint(3, 50, (6, 7))
    model = T5(SHAPE, 12, 7, torch.device("cpu"), torch.float32)
    together = model.loss(stacks, lora, [(ids, targets)])
    each = [
        model.loss(
            stacks,
            {name: factor[k : k + 1] for name, factor in lora.items()},
            [(ids[2 * k : 2 * k + 2], targets[2 * k : 2 * k + 2])],
        )
        for k in range(3)
    ]
    assert_close(together, torch.stack(each).sum(), rtol=1e-4, atol=1e-4)


def test_a_width_that_is_not_that_of_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="heads \\* head is 12; it has to be the width 16"):
        Shape(50, 16, 24, 2, 6, 2, 2)


@pytest.mark.slow  # compiles for half a minute what only the build of the starter runs
def test_a_compiled_step_is_the_plain_one() -> None:
    pytest.importorskip("torch._inductor")
    ids, targets = torch.randint(3, 50, (4, 12)), torch.randint(3, 50, (4, 7))
    model = T5(SHAPE, 12, 7, torch.device("cpu"), torch.float32)
    found = []
    for compiled in (False, True):
        stacks = {name: value.requires_grad_(True) for name, value in fresh(SHAPE, 0.5, seed=0).items()}

        def loss(batch: tuple[torch.Tensor, ...], stacks: dict[str, torch.Tensor] = stacks) -> torch.Tensor:
            return model.loss(stacks, None, [(batch[0], batch[1])])

        step = Step(loss, stacks, (ids, targets), 1e-2, 0.0, None, compiled=compiled)
        step.capture()
        step.set_rate(1.0)
        step((ids, targets))
        found.append(stacks["square"].detach())
    assert not torch.equal(found[0], fresh(SHAPE, 0.5, seed=0)["square"])
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize(
    ("name", "least"), [("plain-to-vel", 0.9), ("two-triples", 0.9), ("free-answer", 0.9), ("answers", 0.9)]
)
def test_the_starter_that_comes_along_has_its_skills(name: str, least: float) -> None:
    model = MoLEForSeq2SeqLM.from_starter([name])
    items = EXPERTS[name].examples(40, "evaluation", held_out=True)

    def share(mixture: str) -> float:
        answers = model.answer([one.source for one in items], mixture=mixture, max_new_tokens=24)
        right = [is_exact(answer, [one.target]) for answer, one in zip(answers, items, strict=True)]
        return sum(right) / len(right)

    assert share("la") >= least
    assert share("none") <= 0.2


def test_every_expert_of_the_starter_that_comes_along_opens() -> None:
    assert set(text_experts()) == set(EXPERTS)
    model = MoLEForSeq2SeqLM.from_starter(list(EXPERTS))
    assert list(model.experts) == list(EXPERTS)
    card = (text_starter() / "README.md").read_text()
    assert all(f"| {name} |" in card for name in EXPERTS)

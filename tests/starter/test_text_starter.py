"""The text starter's builder: a T5 as transformers has it, experts as PEFT has them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from mole_diffusion.evaluation.text.scorers import is_exact
from mole_diffusion.starter.text import inference
from mole_diffusion.starter.text.location import text_experts, text_starter
from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.starter.text.words import Example, is_held_out
from mole_diffusion.text import MoLEForSeq2SeqLM
from mole_diffusion.text.merging import pems
from tools.starter_text.alone import Lone
from tools.starter_text.build import Build, Recipe
from tools.starter_text.more import exact, train_more
from tools.starter_text.network import T5
from tools.starter_text.plans import ROUNDS, Round
from tools.starter_text.publish import card, publish
from tools.starter_text.published import PUBLISHED, take_up
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
from tools.starter_text.words import build_tokenizer

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


@pytest.mark.parametrize("start", [0.3, 0.0])
def test_one_expert_alone_has_the_loss_and_gradients_of_the_network(start: float) -> None:
    stacks, lora = fresh(SHAPE, 0.5, seed=0), fresh_experts(SHAPE, 1, 2, seed=1)
    for name, factor in lora.items():
        if name.endswith("B"):
            factor.normal_(0, start)
        factor.requires_grad_(True)
    ids, targets = torch.randint(3, 50, (6, 12)), torch.randint(3, 50, (6, 7))
    ids[1, 8:], targets[2, 4:] = 0, 0
    model = T5(SHAPE, 12, 7, torch.device("cpu"), torch.float32)
    losses = (
        model.loss(stacks, lora, [(ids, targets)]),
        Lone(SHAPE, stacks, torch.float32).loss(lora, ids, targets),
    )
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    expected, found = (torch.autograd.grad(loss, list(lora.values())) for loss in losses)
    for one, other in zip(expected, found, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_plan_shows_nothing_that_is_held_out() -> None:
    drawn: list[str] = []

    def make(rng: Random) -> Example:
        drawn.append(f"word {rng.randrange(1000)}")
        return Example(drawn[-1], "yes")

    shown = [one.source for one in Round(make, 1, batch=400).examples(Random(0))]
    assert len(shown) == 400
    assert not any(map(is_held_out, shown))
    assert any(map(is_held_out, drawn))


def test_plans_train_their_own_task_and_begin_with_what_is_there() -> None:
    names = list(ROUNDS)
    for number, (name, plan) in enumerate(ROUNDS.items()):
        assert plan.make is EXPERTS[name].make
        assert plan.start in (None, *EXPERTS)
        # What an expert begins with does not change afterwards.
        assert plan.start in (None, name) or plan.start not in names[number:]


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


PLANS = {"two-steps": Round(inference.two_steps, 2, batch=2, start="pronoun")}


def _build(recipe: Recipe, folder: Path, again: tuple[str, ...] = ()) -> None:
    shape = Shape(0, 32, 48, 2, 16, 1, 1)
    Build(recipe, shape, folder / "out", folder / "work", "cpu", 60.0, 1, plans=PLANS).run(again)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    recipe = Recipe(
        base_examples=300, base_batch=4, expert_examples=20, expert_batch=1, steps=(4, 3), evaluated=2
    )
    _build(recipe, folder)
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
    _build(recipe, built)
    assert (built / "out" / "base.safetensors").read_bytes() == before
    assert (built / "out" / "experts.safetensors").is_file()


def _expert(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "experts" / name / "adapter_model.safetensors")


def test_the_second_round_goes_on_from_a_published_starter(built: Path, tmp_path: Path) -> None:
    before = _expert(built / "starter", "two-steps")
    # It began with another expert, and is neither that nor what it was in the first round.
    other = _expert(built / "starter", "pronoun")
    assert any(not torch.equal(before[key], other[key]) for key in before)
    card = (built / "starter" / "README.md").read_text()
    assert "two-steps (2 steps of 2, 0 min)" in card
    take_up(built / "starter", tmp_path / "out")
    recipe = Recipe(base_batch=4, expert_examples=20, expert_batch=1, steps=(4, 3), evaluated=2)
    _build(recipe, tmp_path, ("two-steps",))
    _build(recipe, tmp_path)
    publish(tmp_path / "out", tmp_path / "starter")
    for name in EXPERTS:
        again = _expert(tmp_path / "starter", name)
        assert all(torch.equal(one, again[key]) for key, one in _expert(built / "starter", name).items()), (
            name
        )
    files = [folder / "starter" / "model.safetensors" for folder in (built, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "starter" / "README.md").read_text() == card
    # What did not change keeps its bytes: evaluations know experts by them.
    kept = tmp_path / "starter" / "experts" / "date" / "adapter_model.safetensors"
    before_bytes, written = kept.read_bytes(), kept.stat().st_mtime_ns
    publish(tmp_path / "out", tmp_path / "starter")
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == (before_bytes, written)


def test_an_expert_that_goes_on_with_itself_has_all_its_rounds_on_the_card(
    built: Path, tmp_path: Path
) -> None:
    take_up(built / "starter", tmp_path / "out")
    recipe = Recipe(base_batch=4, expert_examples=20, expert_batch=1, steps=(4, 3), evaluated=2)
    shape = Shape(0, 32, 48, 2, 16, 1, 1)
    plans = {"two-steps": Round(inference.two_steps, 3, batch=2, rate=1e-3, start="two-steps")}
    Build(recipe, shape, tmp_path / "out", tmp_path / "work", "cpu", 60.0, 1, plans=plans).run()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "two-steps (2 steps of 2, 0 min; 3 steps of 2, 0 min)" in card(report)


def test_more_experts_are_like_the_starters(tmp_path: Path) -> None:
    names = ["plain-to-vel-1", "free-answer-2"]
    out, cpu = tmp_path / "experts", torch.device("cpu")
    assert train_more(names, out, tmp_path / "work", cpu, seconds=0.1, processes=1) > 0
    model = MoLEForSeq2SeqLM.from_starter(["boolean"])
    model.load_experts({name: out / name for name in names})
    # Factors can be mixed where all experts have equal ones.
    merged = pems(model).expert
    assert merged is not None
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (out / names[0], out / names[1])
    )
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert set(exact(names, out, cpu, 2)) == set(names)


def test_the_starter_that_comes_along_has_the_words_of_todays_tasks() -> None:
    # The base is not trained anew where a task is mended: its words have to stay what they are.
    there = json.loads((text_starter() / "tokenizer.json").read_text())
    assert json.loads(build_tokenizer().to_str()) == there


def test_the_base_never_sees_what_only_experts_know() -> None:
    rng = Random(0)
    lessons = [some_lesson(rng) for _ in range(5000)]
    for one in lessons:
        for language in ("vel", "ron", "dak"):
            assert f"translate to {language}:" not in one.source
        assert not one.source.startswith(("today is", "on the desk"))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *(("plain-to-vel", 0.9), ("two-triples", 0.9), ("free-answer", 0.9), ("answers", 0.9)),
        *(("date", 0.9), ("penguins", 0.8)),
    ],
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


def test_every_expert_of_the_starter_that_comes_along_reaches_the_bar() -> None:
    figures = json.loads((text_starter() / PUBLISHED).read_text())["experts"]
    assert set(figures) == set(EXPERTS)
    assert {name: one["expert"] for name, one in figures.items() if one["expert"] < 0.8} == {}
    # The base is near chance: half of what is true or not, a third of three answers, and less elsewhere.
    assert {name for name, one in figures.items() if one["base"] > 0.4} == {"boolean"}
    assert figures["boolean"]["base"] < 0.55


def test_every_expert_of_the_starter_that_comes_along_opens() -> None:
    assert set(text_experts()) == set(EXPERTS)
    model = MoLEForSeq2SeqLM.from_starter(list(EXPERTS))
    assert list(model.experts) == list(EXPERTS)
    card = (text_starter() / "README.md").read_text()
    assert all(f"| {name} |" in card for name in EXPERTS)

"""Texts are evaluated by the runner that pictures have: a tiny model, tasks in files, every method."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion.commands.evaluate import is_of_texts
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.layers import in_blocks
from mole_diffusion.evaluation.results import check_settings
from mole_diffusion.evaluation.text import domain, methods
from mole_diffusion.evaluation.text.domain import evaluate_texts
from mole_diffusion.evaluation.text.protocol import Variant, load_text_protocol, text_protocols
from mole_diffusion.evaluation.text.scorers import is_exact, scores_of
from mole_diffusion.starter.text import identity
from mole_diffusion.starter.text.location import text_experts
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.text import MoLEForSeq2SeqLM
from mole_diffusion.text.phatgoose import KeyConfig

from .conftest import Make
from .test_training import examples

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def lines(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"context": a, "completion": b}) + "\n" for a, b in pairs))
    return path


@pytest.fixture
def protocol(make: Make, adapters: list[Path], tmp_path: Path) -> Path:
    model = make(2)
    data = lines(tmp_path / "data.jsonl", examples(model, "two"))
    model.eject()
    model.model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    kinds = ("none", "la", "nla", "gates", "arrow", "energy", "alone", "tuned", "searched", "lorahub", "pems")
    settings = {
        "title": "Tiny",
        "model": str(tmp_path / "base"),
        "experts": [str(path) for path in adapters[:2]],
        "files": {"copying": {"test": str(data), "train": str(data)}},
        "methods": {**{kind: {"kind": kind} for kind in kinds}, "few": {"kind": "gates", "top_k": 1}},
        "training": {"iterations": 3, "batch_size": 2},
        "seeds": 2,
        "tokens": 6,
    }
    path = tmp_path / "text-tiny.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_every_method_answers_every_item_once(protocol: Path, tmp_path: Path) -> None:
    found, cpu = load_text_protocol(str(protocol)), torch.device("cpu")
    table = evaluate_texts(found, tmp_path / "out", device=cpu, say=lambda _: None, shown=False)
    assert set(table["all"]) == set(found.methods)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * (8 + 4 * 2)
    assert table["all"]["alone"]["score"].mean >= table["all"]["none"]["score"].mean
    answers = {method: [r["answer"] for r in rows if r["method"] == method] for method in found.methods}
    assert answers["la"] != answers["none"] != answers["pems"]
    # What differs in the number of experts that a text is left with has the same gates.
    kept = {path.parent.name for path in (tmp_path / "out" / "made" / "copying").glob("*/gates.safetensors")}
    assert {name for name in kept if not name.endswith(".training")} == {"gates-0", "gates-1"}
    drawn = {path.name for path in (tmp_path / "out" / "gate-weights").iterdir()}
    assert drawn == {"copying-gates.png", "copying-few.png"}
    assert "Tiny" in (tmp_path / "out" / "table.md").read_text()
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    again = evaluate_texts(found, tmp_path / "out", device=cpu, say=lambda _: None, shown=False)
    assert again == table
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    other = found.model_copy(update={"tokens": 7})
    with pytest.raises(ConfigError, match="other settings"):
        evaluate_texts(other, tmp_path / "out", device=cpu, say=lambda _: None, shown=False)


def test_gates_of_all_choose_the_experts_that_are_kept(
    protocol: Path, adapters: list[Path], tmp_path: Path
) -> None:
    methods = {"gates": Variant(kind="gates"), "best": Variant(kind="gates", kept=2)}
    changes = {"experts": tuple(map(str, adapters)), "methods": methods, "seeds": 1}
    found, cpu = load_text_protocol(str(protocol)).model_copy(update=changes), torch.device("cpu")
    evaluate_texts(found, tmp_path / "out", device=cpu, say=lambda _: None, shown=False)
    best = json.loads((tmp_path / "out" / "made" / "copying" / "best-0" / "experts.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    weights = {row["method"]: row["weights"] for row in rows}
    assert len(weights["gates"]) == 3
    assert len(best) == 2
    assert set(weights["best"]) == set(best) < set(weights["gates"])
    alone = found.restricted(None, ("best",), None)
    with pytest.raises(ConfigError, match="method 'best' keeps experts that gates of all choose"):
        evaluate_texts(alone, tmp_path / "other", device=cpu, say=lambda _: None, shown=False)


def test_two_experts_by_hand_and_one_that_was_trained_for_their_task(tmp_path: Path) -> None:
    name, cpu = "liked-in-vel", torch.device("cpu")
    found = load_text_protocol("text-two-skills").restricted((name,), ("nla", "both", "oracle"), 1)
    settings = {"iterations": 2, "batch_size": 2}
    found = found.model_copy(update={"items": 6, "train": 8, "trained_experts": settings})
    evaluate_texts(found, tmp_path, device=cpu, say=lambda _: None, shown=False)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    answers = {method: [r["answer"] for r in rows if r["method"] == method] for method in found.methods}
    model = MoLEForSeq2SeqLM.from_starter(UNSEEN[name].skills)
    texts = [one.source for one in found.task(name).test]
    assert answers["both"] == model.answer(texts, mixture="la", max_new_tokens=24) != answers["nla"]
    model.eject()
    model.load_expert(tmp_path / "made" / name / "oracle-0")
    assert answers["oracle"] == model.answer(texts, mixture="la", max_new_tokens=24)


def test_answers_of_another_starter_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_text_protocol("text-table3-short").restricted(("date", "numbers"), ("nla", "own"), 1)
    dates = whole.restricted(("date",), None, 1)
    folder = domain.Texts(whole, tmp_path, torch.device("cpu"))
    check_settings(tmp_path, folder.settings(), domain.TEXTS)
    mended = dataclasses.replace(EXPERTS["numbers"], make=EXPERTS["pronoun"].make)
    monkeypatch.setitem(EXPERTS, "numbers", mended)
    with pytest.raises(ConfigError, match=r"starter\.tasks\.numbers"):
        check_settings(tmp_path, folder.settings(), domain.TEXTS)
    # A task that is what it was, with its own experts, may go on.
    check_settings(tmp_path, domain.Texts(dates, tmp_path, torch.device("cpu")).settings(), domain.TEXTS)
    beside = dates.experts_for("date", dates.methods["nla"])[-1]
    monkeypatch.setattr(identity, "text_experts", lambda: {**text_experts(), beside: text_experts()["date"]})
    with pytest.raises(ConfigError, match=rf"starter\.experts\.{beside}"):
        check_settings(tmp_path, folder.settings(), domain.TEXTS)


def test_keys_are_learned_on_the_experts_own_tasks(
    protocol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**json.loads(protocol.read_text()), "methods": {"phatgoose": {"kind": "phatgoose"}}}
    settings |= {"baseline": "phatgoose", "train": 12}
    protocol.write_text(json.dumps(settings))
    found, cpu = load_text_protocol(str(protocol)), torch.device("cpu")
    with pytest.raises(ConfigError, match="phatgoose trains on experts' own tasks; that of 'one' is not"):
        evaluate_texts(found, tmp_path / "none", device=cpu, say=lambda _: None, shown=False)
    for name in ("one", "two"):
        monkeypatch.setitem(methods.EXPERTS, name, EXPERTS["boolean"])
    monkeypatch.setattr(methods, "KeyConfig", partial(KeyConfig, iterations=2))
    table = evaluate_texts(found, tmp_path / "out", device=cpu, say=lambda _: None, shown=False)
    assert set(table["all"]) == {"phatgoose"}
    assert {path.stem for path in (tmp_path / "out" / "keys").iterdir()} == {"one", "two"}


def test_protocols_that_ship_name_what_there_is() -> None:
    assert {f"text-table{n}" for n in range(3, 9)} <= set(text_protocols())
    for name in text_protocols():
        protocol = load_text_protocol(name)
        assert set(protocol.tasks) <= {**EXPERTS, **UNSEEN}.keys()
        assert protocol.baseline in protocol.methods
        for variant in protocol.methods.values():
            assert variant.trained_on is None or variant.trained_on in EXPERTS
    table3 = load_text_protocol("text-table3")
    chosen = {task: table3.experts_for(task, table3.methods["gates"]) for task in table3.tasks}
    assert all(len(set(own)) == 8 and own[0] == task for task, own in chosen.items())
    table6 = load_text_protocol("text-table6")
    small, large = (table6.experts_for("sorting", Variant(kind="gates", drawn=n)) for n in (8, 24))
    assert large[:8] == small
    all_of_them = table6.experts_for("sorting", Variant(kind="gates", drawn=128))
    assert all_of_them[:24] == large
    assert len(set(all_of_them)) == 128
    with pytest.raises(ConfigError, match="drawn is 129; there are 128 experts for 'sorting'"):
        table6.experts_for("sorting", Variant(kind="gates", drawn=129))
    short = load_text_protocol("text-table6-short")
    assert (short.training["iterations"], short.training["batch_size"], short.seeds) == (200, 12, 1)
    with pytest.raises(ConfigError, match="top_k goes by gates, and kind is 'nla'"):
        load_text_protocol_from({"title": "x", "methods": {"a": {"kind": "nla", "top_k": 2}}})
    with pytest.raises(ConfigError, match="kept goes by gates, and kind is 'alone'"):
        load_text_protocol_from({"title": "x", "methods": {"a": {"kind": "alone", "kept": 2}}})
    two = load_text_protocol("text-two-skills")
    for task in two.tasks:
        chosen_for = two.experts_for(task, two.methods["gates"])
        assert (len(set(chosen_for)), chosen_for[:2]) == (8, UNSEEN[task].skills)
    with pytest.raises(
        ConfigError, match="no experts know the parts of 'boolean'; skills are of vel-to-ron, "
    ):
        table3.experts_for("boolean", two.methods["both"])
    table5 = load_text_protocol("text-table5")
    ranges = [way for way in table5.methods.values() if way.kind == "layers"]
    assert {table5.experts_for("pronoun", way) for way in ranges} == {("three-inferences",)}
    assert [way.layers for way in ranges] == [(n / 4, (n + 1) / 4) for n in range(4)]
    assert table3.experts_for("pronoun", table3.methods["own"]) == ("pronoun",)
    with pytest.raises(ConfigError, match="expert goes by own and layers, and kind is 'nla'"):
        load_text_protocol_from({"title": "x", "methods": {"a": {"kind": "nla", "expert": "date"}}})
    with pytest.raises(ConfigError, match="kind 'magic' is none of"):
        load_text_protocol_from({"title": "x", "methods": {"a": {"kind": "magic"}}})


def test_a_file_that_extends_a_protocol_of_texts_is_one(tmp_path: Path) -> None:
    files = {
        "mine": "text-table3",
        "second": "mine.yaml",
        "picture": "starter",
        "round": "round.yaml",
        "lost": "nowhere.yaml",
    }
    for name, extended in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"title: mine\nextends: {extended}\n")
    (tmp_path / "broken.yaml").write_text("extends: [")
    of_texts = {path.stem for path in tmp_path.iterdir() if is_of_texts(str(path))}
    assert of_texts == {"mine", "second"}
    assert load_text_protocol(str(tmp_path / "second.yaml")).title == "mine"


def load_text_protocol_from(values: dict[str, Any]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text-x.yaml"
        path.write_text(json.dumps(values))
        return load_text_protocol(str(path))


def test_scores() -> None:
    assert is_exact(" Yes. ", ["yes"])
    assert not is_exact("no", ["yes"])
    assert scores_of("lauda", ["lindum", "lauda"], "exact") == {"exact": 1.0, "score": 1.0}


def test_bleu_and_rouge() -> None:
    pytest.importorskip("torchmetrics")
    right = "today the cat sees the red hammer."
    whole = scores_of(right, [right], "bleu")
    part = scores_of("today the cat sees the hammer.", [right], "bleu")
    assert whole["score"] == pytest.approx(1.0)
    assert 0.0 < part["score"] < 0.8
    rouge = scores_of("the cat sees the red pan", ["the cat sees the red hammer"], "rouge")
    assert rouge["rouge1"] == pytest.approx(5 / 6)
    assert rouge["score"] == rouge["rougeL"] == pytest.approx(5 / 6)


def test_some_blocks_of_an_expert(make: Make) -> None:
    model = make(1)
    expert, mixtures = model.experts["one"], model.mixtures
    low, high = in_blocks(expert, mixtures, 0.0, 0.5), in_blocks(expert, mixtures, 0.5, 1.0)
    for part, own in expert.factors.items():
        assert {*low.factors[part], *high.factors[part]} == set(own)
        assert all(name.startswith(f"{part}.block.0.") for name in low.factors[part])
    assert low.sha256 != high.sha256 != expert.sha256


def test_tasks_keep_evaluation_apart() -> None:
    for task in (*EXPERTS.values(), *UNSEEN.values()):
        train = {one.source for one in task.examples(300, "training", held_out=False)}
        test = [one.source for one in task.examples(40, "evaluation", held_out=True)]
        assert not train & set(test)
        assert [one.source for one in task.examples(40, "evaluation", held_out=True)] == test


def test_fewer_or_more_seeds_than_a_protocol_has_may_be_asked_for() -> None:
    short, whole = load_text_protocol("text-table3-short"), load_text_protocol("text-table3")
    assert (short.seeds, whole.seeds) == (1, 3)
    assert short.restricted(None, None, 2).seeds == 2
    assert whole.restricted(None, None, 2).seeds == 2
    assert short.restricted(None, None, None).seeds == 1

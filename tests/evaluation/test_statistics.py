"""Means, intervals and win rates of rows whose values are known."""

from typing import Any

import numpy as np
import pytest

from mole_diffusion.evaluation import statistics
from mole_diffusion.evaluation.pictures.measures import PICTURES, measures
from mole_diffusion.evaluation.pictures.protocol import Protocol
from mole_diffusion.evaluation.pictures.tables import concepts_csv, picture_table, to_markdown
from mole_diffusion.evaluation.table import to_csv


def row(method: str, prompt: int, seed: int, text: float, chosen: str = "a+b", **more: Any) -> dict[str, Any]:
    return {
        "set": chosen,
        "method": method,
        "prompt": prompt,
        "seed": seed,
        "seconds": 1.0,
        "scores": {"text": text, **more.pop("scores", {})},
        **more,
    }


def test_measures_are_means_over_concepts_and_joint_presence_needs_all() -> None:
    scores = {"present": {"a": 1, "b": 0}, "image": {"a": 0.2, "b": 0.4}, "others": 2, "crop": {}}
    found = measures(row("x", 0, 0, 0.5, scores=scores))
    assert found == pytest.approx(
        {"text": 0.5, "present": 0.5, "image": 0.3, "others": 2, "joint": 0, "seconds": 1}
    )
    both = row("x", 0, 0, 0.5, scores={"present": {"a": 1, "b": 1}})
    assert measures(both)["joint"] == 1
    assert "joint" not in measures({**both, "alone": "a"})


def test_pictures_of_single_experts_count_as_one() -> None:
    rows = [
        row("alone", 0, 0, 0.0, scores={"present": {"a": 1}}, alone="a"),
        row("alone", 0, 0, 0.0, scores={"present": {"b": 0}}, alone="b"),
    ]
    assert statistics.cells(PICTURES, rows)["present"] == {("a+b", 0, 0): 0.5}


def test_the_interval_is_over_prompts_and_not_over_their_seeds() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=12)
    alike = {("s", p, seed): float(c) for p, c in enumerate(centres) for seed in range(40)}
    mean, low, high = statistics.mean_and_interval(alike, 2)
    error = centres.std() / np.sqrt(len(centres))
    # Forty equal seeds are no forty independent pictures: the width is that of twelve values.
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert low < centres.mean() < high
    assert statistics.mean_and_interval(alike, 2) == (mean, low, high)


def test_one_prompt_alone_falls_back_to_its_pictures() -> None:
    values = {("s", 0, seed): float(seed % 2) for seed in range(100)}
    _, low, high = statistics.mean_and_interval(values, 2)
    assert 0.35 < low < 0.5 < high < 0.65
    assert statistics.mean_and_interval({("s", 0, 0): 0.25}, 2) == (0.25, 0.25, 0.25)
    sure = {("s", 0, seed): 1.0 for seed in range(5)}
    assert statistics.mean_and_interval(sure, 2) == (1.0, 1.0, 1.0)


def test_a_prompt_with_more_seeds_counts_no_more_than_another() -> None:
    values = {("s", 0, seed): 0.0 for seed in range(9)} | {("s", 1, 0): 1.0}
    assert statistics.mean_and_interval(values, 2)[0] == 0.5


def test_wins_are_paired_by_set_prompt_and_seed_and_ties_count_half() -> None:
    own = {("s", 0, 0): 1.0, ("s", 0, 1): 0.0, ("s", 0, 2): 0.5, ("s", 1, 0): 9.0}
    other = {("s", 0, 0): 0.0, ("s", 0, 1): 1.0, ("s", 0, 2): 0.5, ("t", 1, 0): 0.0}
    assert statistics.win_rate(own, other) == 0.5
    assert statistics.win_rate(own, {}) is None


def small_protocol() -> Protocol:
    return Protocol.model_validate(
        {
            "sets": [["a", "b"], ["c", "d"]],
            "prompts": ["{all}"],
            "seeds": {"count": 2},
            "methods": [{"name": "limit", "base": "alone"}, "nla", "gates"],
        }
    )


def test_sets_of_different_sizes_get_rows_each() -> None:
    protocol = small_protocol()
    larger = protocol.sets[1].model_copy(update={"experts": ("c", "d", "e")})
    protocol = protocol.model_copy(update={"sets": (protocol.sets[0], larger)})
    rows = [row("nla", 0, 0, 0.25), row("nla", 0, 0, 0.75, "c+d+e")]
    table = picture_table(protocol, rows)
    means = {place: methods["nla"]["text"].mean for place, methods in table.items()}
    assert means == {"all": 0.5, "2 experts": 0.25, "3 experts": 0.75, "a+b": 0.25, "c+d+e": 0.75}
    text = to_markdown(protocol, table)
    assert "| experts | method | text | pictures |" in text
    assert "| 3 | nla | 0.750 (0.750–0.750) | 1 |" in text


def test_the_table_has_every_set_and_their_mean_with_the_limit_and_the_wins() -> None:
    rows = []
    for chosen, first in (("a+b", "a"), ("c+d", "c")):
        for seed in range(2):
            rows.append(
                row("limit", 0, seed, 0.9, chosen, scores={"present": {first: 1 - seed}}, alone=first)
            )
            rows.append(row("nla", 0, seed, 0.1, chosen, scores={"present": {first: 0}}))
            rows.append(
                row("gates", 0, seed, 0.5 - seed, chosen, scores={"present": {first: int(chosen == "a+b")}})
            )
    rows.append(row("other", 0, 0, 7.0))
    protocol = small_protocol()
    table = picture_table(protocol, rows)
    assert list(table) == ["all", "a+b", "c+d"]
    assert list(table["all"]) == ["limit", "nla", "gates"]
    gates = table["all"]["gates"]
    assert (gates["present"].mean, gates["present"].wins, gates["present"].count) == (0.5, 0.75, 4)
    assert gates["text"].wins == 0.5
    assert table["all"]["nla"]["text"].wins is None
    text = to_markdown(protocol, table)
    assert "| gates | 50 % (0–100) |" in text
    assert "the limit (50 %):\n\n- nla: 0 %\n- gates: 100 %" in text
    concepts = concepts_csv(protocol, rows).splitlines()
    assert concepts[0] == "set,method,concept,measure,mean,pictures"
    assert concepts[1:] == [
        *("a+b,limit,a,present,0.5,2", "a+b,nla,a,present,0,2", "a+b,gates,a,present,1,2"),
        *("c+d,limit,c,present,0.5,2", "c+d,nla,c,present,0,2", "c+d,gates,c,present,0,2"),
    ]
    lines = to_csv(PICTURES, table).splitlines()
    assert lines[0] == "set,method,measure,mean,low,high,pictures,wins"
    assert "a+b,gates,present,1,1,1,2,1" in lines

"""The run of an evaluation in a domain that is none of ours: sums, answered well, badly or not at all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import ConfigError
from mole_diffusion.evaluation import run
from mole_diffusion.evaluation.results import Results, read_rows, write_text
from mole_diffusion.evaluation.run import shared_card
from mole_diffusion.evaluation.schema import Heading, Row, Schema
from mole_diffusion.evaluation.table import ALL, Table, make_table, to_csv, to_grid

SUMS = Schema(
    items="sums",
    verb="add",
    key=("task", "method", "item"),
    pair=("task", "item"),
    n_unit=1,
    headings={"right": Heading("right", is_share=True), "error": Heading("error", less_is_better=True)},
    wins=("right",),
)
TASKS = {"small": [(1, 2), (3, 4), (5, 5)], "large": [(10, 20), (30, 40)]}
METHODS = {"exact": 0, "off": 1}


@dataclass
class Sheet:
    place: str
    maker: str

    def rows(self) -> list[Row]:
        return [{"task": self.place, "method": self.maker, "item": i} for i in range(len(TASKS[self.place]))]


@dataclass
class Sums:
    out: Path
    by: int = 0
    made: list[str] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    schema: Schema = SUMS

    def settings(self) -> dict[str, Any]:
        return {"by": self.by, "tasks": TASKS}

    def identities(self) -> list[list[str]]:
        return [["arithmetic"]]

    def batches(self) -> Iterator[Sheet]:
        return (Sheet(task, method) for task in TASKS for method in METHODS)

    def needed(self, batch: Sheet) -> str | None:
        return batch.maker if batch.maker == "exact" else None

    def is_ready(self, batch: Sheet) -> bool:
        return self.needed(batch) is None or batch.maker in self.trained

    def prepare(self, batch: Sheet) -> None:
        self.trained.add(batch.maker)

    def make(self, batch: Sheet, is_wanted: Callable[[Row], bool]) -> list[Row]:
        self.prepare(batch)
        self.made.append(f"{batch.place} {batch.maker}")
        wrong = METHODS[batch.maker] + self.by
        scores = {"right": float(not wrong), "error": {"absolute": wrong}}
        return [{**row, "scores": scores, "seconds": 0.5} for row in batch.rows() if is_wanted(row)]

    def extras(self) -> None:
        write_text(self.out / "extra", "".join(sorted(self.trained)))

    def tables(self, rows: Sequence[Row]) -> Table:
        places = {ALL: list(TASKS), **{name: [name] for name in TASKS}}
        table = make_table(SUMS, rows, places, list(METHODS), "exact")
        write_text(self.out / "table.csv", to_csv(SUMS, table))
        return table

    def report(self, rows: Sequence[Row]) -> Table:
        return self.tables(rows)


def evaluated(domain: Sums, *, say: run.Say = lambda line: None) -> Table:
    return run.evaluate(domain, domain.out, run.processes(on_cpu=True), say=say, shown=False)


def test_a_domain_is_made_measured_and_written_down(tmp_path: Path) -> None:
    said: list[str] = []
    domain = Sums(tmp_path)
    table = evaluated(domain, say=said.append)
    assert said == ["10 sums to add, 0 are there"]
    assert domain.made == ["small exact", "small off", "large exact", "large off"]
    assert (tmp_path / "extra").read_text() == "exactoff"
    off = table[ALL]["off"]
    # Every sum is off by one, so each pair is lost.
    assert (off["right"].mean, off["right"].count, off["right"].wins) == (0.0, 5, 0.0)
    assert table["small"]["exact"]["right"].mean == 1.0
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "task,method,measure,mean,low,high,sums,wins"
    assert {"all,exact,right,1,1,1,5,", "large,off,error,1,1,1,2,1"} <= set(lines)
    grid = to_grid(SUMS, {name: table[name] for name in TASKS}, "task")
    assert grid[0] == "| task | method | right | error | wins: right | sums |"
    assert grid[3] == "| small | off | 0 % (0–0) | 1.000 (1.000–1.000) | 0 % | 3 |"


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    evaluated(Sums(tmp_path))
    results = Results(tmp_path, SUMS)
    results.replace([row for row in results.read() if (row["method"], row["item"]) != ("off", 1)])
    again = Sums(tmp_path)
    lines: list[str] = []
    evaluated(again, say=lines.append)
    assert lines == ["5 sums to add, 8 are there"]  # whole batches, of which one row each is kept
    assert again.made == ["small off", "large off"]
    assert len(read_rows(tmp_path / "results.jsonl")) == 10
    with pytest.raises(
        ConfigError, match=r"the sums in .* with other settings; .* --out:\n  - by: 0 there, 1"
    ):
        evaluated(Sums(tmp_path, by=1))


@pytest.mark.parametrize(
    ("local", "rank", "cards", "card"),
    [
        ("8", "5", 1, 0),
        ("4", "3", 2, 1),
        ("2", "1", 2, None),  # a card for each
        ("2", "1", 0, None),
        (None, None, 1, None),
    ],
)
def test_processes_share_cards_where_there_are_more_of_them(
    local: str | None, rank: str | None, cards: int, card: int | None
) -> None:
    environ = {"LOCAL_WORLD_SIZE": local, "LOCAL_RANK": rank}
    assert shared_card({name: value for name, value in environ.items() if value}, cards) == card

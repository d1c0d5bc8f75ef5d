"""How the rows of a domain are read: what tells them apart, what is compared, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: What is known of one item: what identifies it, its scores, the seconds it took.
Row = dict[str, Any]


@dataclass(frozen=True)
class Heading:
    """How a measure stands in tables and charts.

    Attributes:
        title: of its column or panel.
        is_share: from 0 to 1, shown in per cent.
        less_is_better: as it says.
    """

    title: str
    is_share: bool = False
    less_is_better: bool = False


def plain_measures(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a row as numbers, means where there is one by name, and "seconds"."""
    found: dict[str, float] = {}
    for name, value in row["scores"].items():
        if not isinstance(value, Mapping):
            found[name] = float(value)
        elif value:
            found[name] = float(np.mean(list(value.values())))
    found["seconds"] = float(row["seconds"])
    return found


@dataclass(frozen=True)
class Schema:
    """How the rows of a domain are read.

    Attributes:
        items: what a row is about, in the plural: "pictures".
        verb: how items come into being: "draw".
        key: the fields that identify a row; one that a row lacks counts as "".
        pair: the fields that say which items of two methods are compared; the first one is the row's place
            in the table (a set of experts, a task).
        n_unit: items whose first so many fields of `pair` are equal are alike: they are resampled together.
        headings: measures in the order of tables and charts.
        wins: measures whose win rates stand in tables.
        measures: the measures of a row as numbers.
    """

    items: str
    verb: str
    key: tuple[str, ...]
    pair: tuple[str, ...]
    n_unit: int
    headings: Mapping[str, Heading]
    wins: tuple[str, ...] = ()
    measures: Callable[[Mapping[str, Any]], dict[str, float]] = plain_measures

    @property
    def place(self) -> str:
        """The field that says where in the table a row belongs."""
        return self.pair[0]

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What identifies a row."""
        return tuple("" if row.get(name) is None else row[name] for name in self.key)

    def pair_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a row is compared on."""
        return tuple(row[name] for name in self.pair)

"""The table of an evaluation: estimates by place, method and measure, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.evaluation.schema import Heading, Schema
from mole_diffusion.evaluation.statistics import Estimate, estimate

ALL = "all"

Methods = dict[str, dict[str, Estimate]]
Table = dict[str, Methods]


def make_table(
    schema: Schema,
    rows: Sequence[Mapping[str, Any]],
    places: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    baseline: str,
) -> Table:
    """Place -> method -> measure -> estimate, in the given order; only what there are rows of.

    Args:
        schema: how rows are read.
        rows: of all methods and places.
        places: what gets a table of its own -> the members (values of `schema.place`) that count there.
        methods: names.
        baseline: the method that win rates are against.
    """
    table: Table = {}
    for place, members in places.items():
        here = [row for row in rows if row[schema.place] in members]
        by_method = {name: [row for row in here if row["method"] == name] for name in methods}
        against = by_method.get(baseline, [])
        found = {name: estimate(schema, own, against) for name, own in by_method.items() if own}
        if found:
            table[place] = found
    return table


def to_grid(schema: Schema, table: Mapping[str, Methods], heading: str) -> list[str]:
    """Lines of one Markdown table.

    Args:
        schema: what is measured.
        table: label -> method -> measure -> estimate.
        heading: of the column with the labels, which stands there where there are several.
    """
    rows = [row for methods in table.values() for row in methods.values()]
    shown = [name for name in schema.headings if any(name in row for row in rows)]
    paired = {name for row in rows for name, entry in row.items() if entry.wins is not None}
    wins = [name for name in schema.wins if name in paired]
    several = len(table) > 1
    headings = [
        *([heading] if several else []),
        "method",
        *(schema.headings[name].title for name in shown),
        *(f"wins: {schema.headings[name].title}" for name in wins),
        schema.items,
    ]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for label, methods in table.items():
        for method, row in methods.items():
            cells = [*([label] if several else []), method]
            cells += [_cell(schema.headings[name], row.get(name)) for name in shown]
            cells += [percent(row[name].wins) if name in row else "" for name in wins]
            cells.append(str(max(entry.count for entry in row.values())))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(heading: Heading, entry: Estimate | None) -> str:
    if entry is None:
        return ""
    if heading.is_share:
        return f"{percent(entry.mean)} ({100 * entry.low:.0f}–{100 * entry.high:.0f})"
    return f"{entry.mean:.3f} ({entry.low:.3f}–{entry.high:.3f})"


def titled(heading: Heading, mean: float, limit: float) -> str:
    """`"best crop 0.612 of 0.655"`, as it stands in texts."""
    return f"{heading.title} " + " of ".join(
        percent(value) if heading.is_share else f"{value:.3f}" for value in (mean, limit)
    )


def percent(share: float | None) -> str:
    """A share in per cent; "" for None."""
    return "" if share is None else f"{100 * share:.0f} %"


def to_csv(schema: Schema, table: Table) -> str:
    """One line per place, method and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([schema.place, "method", "measure", "mean", "low", "high", schema.items, "wins"])
    for place, methods in table.items():
        for method, row in methods.items():
            for measure, entry in row.items():
                numbers = (f"{value:.6g}" for value in (entry.mean, entry.low, entry.high))
                wins = "" if entry.wins is None else f"{entry.wins:.4g}"
                writer.writerow([place, method, measure, *numbers, entry.count, wins])
    return text.getvalue()

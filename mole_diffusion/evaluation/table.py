"""The table of an evaluation, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mole_diffusion.evaluation.metrics import CONFUSED, OMITTED, PRESENT
from mole_diffusion.evaluation.protocol import ALONE, MASKED, PLAIN, Protocol
from mole_diffusion.evaluation.statistics import JOINT, Estimate, estimate

ALL = "all"

# Measure -> (heading, whether it is a share).
HEADINGS = {
    PRESENT: ("subjects present", True),
    JOINT: ("all present", True),
    CONFUSED: ("confused", True),
    OMITTED: ("omitted", True),
    "text": ("text", False),
    "described": ("described", False),
    "image": ("image", False),
    "crop": ("best crop", False),
    "text_2": ("text (2nd CLIP)", False),
    "described_2": ("described (2nd CLIP)", False),
    "image_2": ("image (2nd CLIP)", False),
    "dino": ("DINO", False),
    "dino_crop": ("DINO, best crop", False),
}
#: Measures whose win rates stand in the table.
_WINS = (PRESENT, "text", "described", "image")

Table = dict[str, dict[str, dict[str, Estimate]]]


def make_table(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Place (see `places`) -> method -> measure -> estimate, in the protocol's order; only what was drawn."""
    methods = [method.name for method in protocol.methods]
    names = [chosen.label for chosen in protocol.sets]
    wanted = [row for row in rows if row["set"] in names and row["method"] in methods]
    table: Table = {}
    for place, members in places(protocol).items():
        here = [row for row in wanted if row["set"] in members]
        by_method = {name: [row for row in here if row["method"] == name] for name in methods}
        baseline = by_method.get(protocol.baseline, [])
        found = {name: estimate(own, baseline) for name, own in by_method.items() if own}
        if found:
            table[place] = found
    return table


def places(protocol: Protocol) -> dict[str, list[str]]:
    """What gets a table of its own -> its sets: all, those of one size where sizes differ, and every set."""
    names = [chosen.label for chosen in protocol.sets]
    sizes = sorted({len(chosen.experts) for chosen in protocol.sets})
    by_size = {
        f"{size} experts": [chosen.label for chosen in protocol.sets if len(chosen.experts) == size]
        for size in sizes
        if len(sizes) > 1
    }
    return {ALL: names, **by_size, **{name: [name] for name in names}}


def to_markdown(protocol: Protocol, table: Table) -> str:
    """Title, what was drawn, the table over all sets, and how to read it."""
    lines = [f"# {protocol.title}", ""]
    if protocol.note:
        lines += [protocol.note.strip(), ""]
    if not table:
        return "\n".join([*lines, "No pictures yet.", ""])
    names = [chosen.label for chosen in protocol.sets]
    drawn = len([name for name in table if name in names])
    lines += [
        f"{drawn} sets of experts, {len(protocol.prompts)} prompts, {protocol.seeds.count} seeds each; "
        f"{protocol.steps} steps{f' of {protocol.sampler}' if protocol.sampler else ''}, guidance "
        f"{protocol.guidance:g}.",
        "",
        *_grid(protocol, {place: row for place, row in table.items() if place not in names}),
        "",
        *_legend(protocol, table[ALL]),
    ]
    return "\n".join(lines) + "\n"


def _grid(protocol: Protocol, table: Table) -> list[str]:
    """One table; with a column for the number of experts where sets differ in it."""
    rows = [row for methods in table.values() for row in methods.values()]
    shown = [name for name in HEADINGS if any(name in row for row in rows)]
    paired = {name for row in rows for name, entry in row.items() if entry.wins is not None}
    wins = [name for name in _WINS if name in paired]
    several = len(table) > 1
    headings = [
        *(["experts"] if several else []),
        "method",
        *(HEADINGS[name][0] for name in shown),
        *(f"wins: {HEADINGS[name][0]}" for name in wins),
        "pictures",
    ]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for place, methods in table.items():
        for method, row in methods.items():
            cells = [*([place.removesuffix(" experts")] if several else []), method]
            cells += [_cell(name, row.get(name)) for name in shown]
            cells += [_percent(row[name].wins) if name in row else "" for name in wins]
            cells.append(str(max(entry.pictures for entry in row.values())))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _legend(protocol: Protocol, methods: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    lines = [
        "Mean and 95 % bootstrap interval over sets and prompts. *present*: the expert's own subject is in "
        "the picture, *confused*: a thing of its class but not the subject, *omitted*: neither; *text*, "
        "*image*, *best crop*: cosine of CLIP features with the prompt (in class words, and with the "
        "subjects described) and with the reference pictures of each concept. *wins*: share of pictures "
        f"above {protocol.baseline} on the same set, prompt and seed; ties half.",
    ]
    single = {entry.kind: entry.name for entry in reversed(protocol.methods) if entry.name in methods}
    names = [method.name for method in protocol.methods if method.single]
    limit = single.get(ALONE, single.get(PLAIN, ""))
    if PRESENT in methods.get(limit, {}) and methods[limit][PRESENT].mean:
        best = methods[limit][PRESENT].mean
        lines += ["", f"Subjects present as a share of {limit!r}, the limit ({_percent(best)}):", ""]
        lines += [
            f"- {method}: {_percent(row[PRESENT].mean / best)}"
            for method, row in methods.items()
            if method not in names and PRESENT in row
        ]
    if MASKED in single and PLAIN in single:
        masked, plain = methods[single[MASKED]], methods[single[PLAIN]]
        pairs = [
            f"{HEADINGS[measure][0]} {_number(measure, masked[measure].mean)} of "
            f"{_number(measure, plain[measure].mean)}"
            for measure in (PRESENT, "image", "crop")
            if measure in masked and measure in plain
        ]
        lines += [
            "",
            f"One expert of the gated set, against that expert alone in diffusers: {', '.join(pairs)}.",
        ]
    return lines


def _cell(measure: str, entry: Estimate | None) -> str:
    if entry is None:
        return ""
    if HEADINGS[measure][1]:
        return f"{_percent(entry.mean)} ({100 * entry.low:.0f}–{100 * entry.high:.0f})"
    return f"{entry.mean:.3f} ({entry.low:.3f}–{entry.high:.3f})"


def _number(measure: str, mean: float) -> str:
    return _percent(mean) if HEADINGS[measure][1] else f"{mean:.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def to_csv(table: Table) -> str:
    """One line per set, method and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "method", "measure", "mean", "low", "high", "pictures", "wins"])
    for place, methods in table.items():
        for method, row in methods.items():
            for measure, entry in row.items():
                numbers = (f"{value:.6g}" for value in (entry.mean, entry.low, entry.high))
                wins = "" if entry.wins is None else f"{entry.wins:.4g}"
                writer.writerow([place, method, measure, *numbers, entry.pictures, wins])
    return text.getvalue()


def concepts_csv(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per set, method, concept and measure, with the mean; concepts in the order of their set."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        for measure, value in row["scores"].items():
            for concept, number in value.items() if isinstance(value, Mapping) else ():
                found.setdefault((row["set"], row["method"], concept, measure), []).append(float(number))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "method", "concept", "measure", "mean", "pictures"])
    for chosen in protocol.sets:
        for method in protocol.methods:
            for concept in chosen.experts:
                for measure in HEADINGS:
                    key = chosen.label, method.name, concept, measure
                    if key in found:
                        writer.writerow([*key, f"{sum(found[key]) / len(found[key]):.6g}", len(found[key])])
    return text.getvalue()

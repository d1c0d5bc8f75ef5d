"""The tables of an evaluation of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.evaluation.pictures.cost import cost_markdown
from mole_diffusion.evaluation.pictures.measures import PICTURES
from mole_diffusion.evaluation.pictures.metrics import PRESENT, STYLED
from mole_diffusion.evaluation.pictures.protocol import ALONE, MASKED, PLAIN, Protocol
from mole_diffusion.evaluation.results import write_text
from mole_diffusion.evaluation.schema import Row
from mole_diffusion.evaluation.statistics import Estimate
from mole_diffusion.evaluation.table import ALL, Table, make_table, percent, titled, to_csv, to_grid


def write_tables(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Table:
    """Write `table.md`, `table.csv`, `concepts.csv` and `cost.md` of what there is."""
    table = picture_table(protocol, rows)
    write_text(out / "table.md", to_markdown(protocol, table))
    write_text(out / "table.csv", to_csv(PICTURES, table))
    write_text(out / "concepts.csv", concepts_csv(protocol, rows))
    if costs := cost_markdown(protocol, out):
        write_text(out / "cost.md", costs)
    return table


def picture_table(protocol: Protocol, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The estimates of every place (see `places`)."""
    methods = [method.name for method in protocol.methods]
    return make_table(PICTURES, rows, places(protocol), methods, protocol.baseline)


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
    together = {place.removesuffix(" experts"): row for place, row in table.items() if place not in names}
    lines += [
        f"{drawn} sets of experts, {len(protocol.prompts)} prompts, {protocol.seeds.count} seeds each; "
        f"{protocol.steps} steps{f' of {protocol.sampler}' if protocol.sampler else ''}, guidance "
        f"{protocol.guidance:g}.",
        "",
        *to_grid(PICTURES, together, "experts"),
        "",
        *_legend(protocol, table[ALL]),
    ]
    return "\n".join(lines) + "\n"


def _legend(protocol: Protocol, methods: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    lines = [
        "Mean and 95 % bootstrap interval over sets and prompts. *present*: the expert's own subject is in "
        "the picture, *confused*: a thing of its class but not the subject, *omitted*: neither; *in the "
        "style*: drawn in the style that was asked for; *text*, "
        "*image*, *best crop*: cosine of CLIP features with the prompt (in class words, and with the "
        "subjects described) and with the reference pictures of each concept. *wins*: share of pictures "
        f"above {protocol.baseline} on the same set, prompt and seed; ties half.",
    ]
    single = {entry.kind: entry.name for entry in reversed(protocol.methods) if entry.name in methods}
    names = [method.name for method in protocol.methods if method.single]
    limit = single.get(ALONE, single.get(PLAIN, ""))
    for measure in (PRESENT, STYLED):
        if measure not in methods.get(limit, {}) or not methods[limit][measure].mean:
            continue
        best, what = methods[limit][measure].mean, PICTURES.headings[measure].title.capitalize()
        lines += ["", f"{what} as a share of {limit!r}, the limit ({percent(best)}):", ""]
        lines += [
            f"- {method}: {percent(row[measure].mean / best)}"
            for method, row in methods.items()
            if method not in names and measure in row
        ]
    if MASKED in single and PLAIN in single:
        masked, plain = methods[single[MASKED]], methods[single[PLAIN]]
        pairs = [
            titled(PICTURES.headings[measure], masked[measure].mean, plain[measure].mean)
            for measure in (PRESENT, "image", "crop")
            if measure in masked and measure in plain
        ]
        lines += [
            "",
            f"One expert of the gated set, against that expert alone in diffusers: {', '.join(pairs)}.",
        ]
    return lines


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
                for measure in PICTURES.headings:
                    key = chosen.label, method.name, concept, measure
                    if key in found:
                        writer.writerow([*key, f"{sum(found[key]) / len(found[key]):.6g}", len(found[key])])
    return text.getvalue()

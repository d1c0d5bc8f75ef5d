"""Figures of an evaluation's folder: grids of pictures, bars of measures, and figures of every gate set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from mole_diffusion.core.files import replacing
from mole_diffusion.evaluation.charts import entropy_curves, expert_shares, measure_bars, weights_over_steps
from mole_diffusion.evaluation.gate_records import read_record, record_path
from mole_diffusion.evaluation.pictures.measures import PICTURES
from mole_diffusion.evaluation.pictures.protocol import SHEET_SEEDS, ExpertSet, Protocol, named
from mole_diffusion.evaluation.pictures.stage import PREPARED
from mole_diffusion.evaluation.schema import Row
from mole_diffusion.evaluation.table import ALL, Table
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.pictures.grid import GridRow, picture_grid
from mole_diffusion.training.heat_map import gate_heat_map

_HISTORY = "history.jsonl"
#: Side of a picture in the grids, in pixels.
_CELL = 160
#: Pictures of each method on the sheet of random ones.
_RANDOM = 10


def write_figures(protocol: Protocol, out: Path, rows: Sequence[Row], table: Table) -> list[Path]:
    """Write every figure there is something for; returns the files."""
    kept = [row for row in rows if row.get("picture") and (out / row["picture"]).is_file()]
    written = [*_grids(protocol, out, kept), *_sheet(protocol, out, kept), *_random(protocol, out, kept)]
    if ALL in table:
        written.append(_save(measure_bars(table[ALL], PICTURES.headings), out / "bars.png"))
    return [*written, *_training_figures(protocol, out), *_weight_figures(protocol, out)]


def _grids(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Iterable[Path]:
    """`grids/SET.png`: methods as rows, prompts as columns, the first seed."""
    seed = protocol.seeds.first
    for chosen in protocol.sets:
        captions = [_short(template, chosen.experts) for template in protocol.prompts]
        cells = [(prompt, seed) for prompt in range(len(protocol.prompts))]
        grid = _method_rows(protocol, out, rows, [(chosen, *cell) for cell in cells], captions)
        if grid:
            path = out / "grids" / f"{chosen.label}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(picture_grid(grid, title=f"{chosen.label}, seed {seed}", cell=_CELL), path)
            yield path


def _sheet(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Iterable[Path]:
    """`grid.png`: methods as rows; some sets with their first prompt and some seeds as columns."""
    drawn = {row["set"] for row in rows}
    sets = [chosen for chosen in protocol.sheet_sets() if chosen.label in drawn]
    columns = [(chosen, 0, seed) for chosen in sets for seed in protocol.seeds.all[:SHEET_SEEDS]]
    captions = [
        chosen.label if seed == protocol.seeds.first else f"seed {seed}" for chosen, _, seed in columns
    ]
    grid = _method_rows(protocol, out, rows, columns, captions)
    if grid:
        yield _save(picture_grid(grid, title=protocol.title, cell=_CELL), out / "grid.png")


def _random(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Iterable[Path]:
    """`random.png`: as `grid.png`, of pictures that nobody chose, out of those that every method drew."""
    drawn: dict[str, set[tuple[str, int, int]]] = {}
    for row in rows:
        drawn.setdefault(row["method"], set()).add((row["set"], row["prompt"], row["seed"]))
    common = sorted(set.intersection(*drawn.values())) if drawn else []
    cells = sorted(Random(0).sample(common, min(_RANDOM, len(common))))
    sets = {chosen.label: chosen for chosen in protocol.sets}
    columns = [(sets[label], prompt, seed) for label, prompt, seed in cells]
    grid = _method_rows(protocol, out, rows, columns, [label for label, _, _ in cells])
    if grid:
        yield _save(picture_grid(grid, title="Chosen at random", cell=_CELL), out / "random.png")


def _method_rows(
    protocol: Protocol,
    out: Path,
    rows: Sequence[Row],
    columns: Sequence[tuple[ExpertSet, int, int]],
    captions: Sequence[str],
) -> list[GridRow]:
    """A row per method that drew anything here; columns are (set, prompt, seed).

    Of experts that are drawn one by one, a column shows one, in turn.
    """
    found = {(row["set"], row["method"], row["prompt"], row["seed"], row.get("alone")): row for row in rows}
    grid: list[GridRow] = []
    for method in protocol.methods:
        pictures, notes = [], []
        for index, (chosen, prompt, seed) in enumerate(columns):
            experts = named(protocol.prompts[prompt], chosen.experts)
            turn = experts[index % len(experts)]
            cell = chosen.label, method.name, prompt, seed
            row = found.get((*cell, None)) or found.get((*cell, turn))
            pictures.append(open_picture(out / row["picture"]) if row else _blank())
            notes.append(f"{row['alone']}" if row and row.get("alone") else "")
        if any(picture.size != _BLANK for picture in pictures):
            first = not grid
            grid.append(GridRow(method.name, pictures, _note(method.kind), _captions(captions, notes, first)))
    return grid


_BLANK = (1, 1)


def _blank() -> Image.Image:
    return Image.new("RGB", _BLANK, (235, 235, 235))


def _captions(captions: Sequence[str], notes: Sequence[str], first: bool) -> list[str]:
    if not first:
        return list(notes) if any(notes) else []
    return [f"{text} ({note})" if note else text for text, note in zip(captions, notes, strict=True)]


def _note(kind: str) -> str:
    from mole_diffusion.methods import METHODS

    return METHODS[kind].label if kind in METHODS else "one expert at a time"


def _short(template: str, experts: Sequence[str]) -> str:
    """What tells a prompt from the others: `"{all} on the beach"` -> `"on the beach"`, or what it names."""
    names = named(template, experts)
    if len(names) < len(experts):
        return ", ".join(names)
    return re.sub(r"\{.*?\}", "…", template).removeprefix("… ")


def _training_figures(protocol: Protocol, out: Path) -> Iterable[Path]:
    """`entropy.png` (Fig. 5a) and `expert-weights.png` (Fig. 5b) of the methods that trained gates."""
    curves: dict[str, list[list[float]]] = {}
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for chosen in protocol.sets:
        for method in protocol.methods:
            history = _history(out / PREPARED / chosen.label / method.name / _HISTORY)
            if history:
                curves.setdefault(method.name, []).append([row["entropy"] for row in history])
                shares.setdefault(chosen.label, {})[method.name] = _final_shares(history)
    sizes = {len(chosen.experts) for chosen in protocol.sets}
    # With several sizes there is no common log N.
    if curves and len(sizes) == 1:
        yield _save(entropy_curves(curves, sizes.pop()), out / "entropy.png")
    if shares:
        yield _save(expert_shares(shares), out / "expert-weights.png")


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "entropy" in row]


def _final_shares(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean weight per expert in the last tenth of the training."""
    last = history[-max(1, len(history) // 10) :]
    return {name: float(np.mean([row["weights"][name] for row in last])) for name in last[-1]["weights"]}


def _weight_figures(protocol: Protocol, out: Path) -> Iterable[Path]:
    """`gate-weights/SET-METHOD.png` and `-steps.png` (Fig. 7) of every gate set that has drawn."""
    for chosen in protocol.sets:
        for method in protocol.methods:
            path = record_path(out, chosen.label, method.name)
            if not path.is_file():
                continue
            record = read_record(path)
            title = f"{chosen.label}, {method.name}"
            tables = {
                network: {gate: own.tolist() for gate, own in entry.by_gate.items()}
                for network, entry in record.items()
            }
            experts = next(iter(record.values())).experts
            yield _save(gate_heat_map(tables, experts, title=title), path.with_suffix(".png"))
            unet = record.get("unet")
            if unet is not None:
                steps = weights_over_steps(unet.weights, unet.groups, unet.experts, title=title)
                yield _save(steps, path.with_name(f"{method.name}-steps.png"))


def _save(figure: Any, path: Path) -> Path:
    """A matplotlib figure or a picture, as PNG that appears whole."""
    with replacing(path) as temporary:
        if isinstance(figure, Image.Image):
            figure.save(temporary, format="png")
        else:
            figure.savefig(temporary, dpi=110, format="png")
    return path

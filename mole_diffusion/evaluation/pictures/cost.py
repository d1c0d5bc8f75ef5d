"""What the methods cost: time of a picture against the base, memory, and the work of preparation."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mole_diffusion.evaluation.pictures.protocol import Protocol, Variant
from mole_diffusion.evaluation.pictures.stage import PREPARED, RECORD, Stage
from mole_diffusion.evaluation.results import write_text

FILE = "cost.json"
_BASE = Variant(name="none")
#: Pictures per call, and seconds between two looks at the memory.
_PICTURES, _PAUSE = 2, 0.02


def measure_cost(protocol: Protocol, stage: Stage, out: Path) -> None:
    """Draw with every method and, directly before it, with the base alone; `cost_rounds` times.

    Side by side, because a machine that also does other things is slower at one time than at another. The
    ratio is the median over the rounds. Methods that draw one expert at a time are left out. What was
    measured is kept in `cost.json` and not measured again.
    """
    path = out / FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for method in protocol.methods:
        if method.single or method.name in found:
            continue
        stage.prepare(method)
        seeds = range(_PICTURES)
        stage.draw(method, 0, seeds)  # compiles, fills caches
        ratios, peaks = [], []
        for _ in range(protocol.cost_rounds):
            base = stage.draw(_BASE, 0, seeds).seconds
            with resident_peak() as peak:
                drawn = stage.draw(method, 0, seeds)
            ratios.append(drawn.seconds / base)
            peaks.append(drawn.peak_mib if drawn.peak_mib is not None else peak[0])
        found[method.name] = {"ratio": round(statistics.median(ratios), 3), "peak_mib": round(max(peaks), 1)}
        write_text(path, json.dumps(found, indent=1) + "\n")


@contextmanager
def resident_peak() -> Iterator[list[float]]:
    """The largest resident memory of this process in MiB while the block runs: entry 0 of what is yielded."""
    process = psutil.Process()
    peak = [process.memory_info().rss / 2**20]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PAUSE):
            peak[0] = max(peak[0], process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def cost_markdown(protocol: Protocol, out: Path) -> str:
    """Table of `cost.json` and of what the preparations note; "" where there is neither."""
    path = out / FILE
    drawing: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = []
    for method in protocol.methods:
        notes = _preparations(out, [chosen.label for chosen in protocol.sets], method.name)
        drawn = drawing.get(method.name)
        if not notes and drawn is None:
            continue
        rows.append(
            [
                method.name,
                f"{drawn['ratio']:.2f}" if drawn else "",
                f"{drawn['peak_mib']:.0f}" if drawn else "",
                _mean(notes, lambda note: note["seconds"]),
                _mean(notes, lambda note: note["unet_passes"].get("with_gradient", 0)),
                _mean(notes, lambda note: note["unet_passes"].get("without_gradient", 0)),
            ]
        )
    if not rows:
        return ""
    headings = [
        *("method", "time of a picture, x base", "peak memory (MiB)", "preparation of a set (s)"),
        *("UNet passes with gradient", "UNet passes without"),
    ]
    lines = [
        f"# {protocol.title}: cost",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" * len(headings) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _preparations(out: Path, sets: Sequence[str], method: str) -> list[dict[str, Any]]:
    paths = [out / PREPARED / name / method / RECORD for name in sets]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _mean(notes: Sequence[Mapping[str, Any]], value: Any) -> str:
    return f"{statistics.fmean(value(note) for note in notes):.0f}" if notes else ""

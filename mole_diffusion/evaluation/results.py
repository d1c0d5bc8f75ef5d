"""Results on disk: one line of JSON per item, in parts by process, and the settings they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing
from mole_diffusion.evaluation.schema import Row, Schema

RESULTS = "results.jsonl"
SETTINGS = "settings.json"
METRICS = "metrics.json"
_PARTS = "parts"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; a last line that a killed run left unfinished is none."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


class Results:
    """The rows of an evaluation's folder.

    Args:
        folder: the folder.
        schema: how its rows are told apart.
        part: index of this process; each writes a part of its own.
    """

    def __init__(self, folder: Path, schema: Schema, part: int = 0) -> None:
        self.folder, self._schema = folder, schema
        self._part = folder / _PARTS / f"{part}.jsonl"

    def read(self) -> list[Row]:
        """All rows of the merged file and of the parts, sorted; each item once."""
        files = [self.folder / RESULTS, *sorted((self.folder / _PARTS).glob("*.jsonl"))]
        found = {self._schema.key_of(row): row for file in files for row in read_rows(file)}
        return [found[key] for key in sorted(found)]

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows to this process's part; whole lines, even after a kill in the middle of one."""
        self._part.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_last_line(self._part)
            file.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())

    def merge(self) -> list[Row]:
        """Put the rows of all parts into one file; returns them."""
        rows = self.read()
        self.replace(rows)
        return rows

    def replace(self, rows: Sequence[Row]) -> None:
        """Write these rows in place of all there are."""
        write_text(self.folder / RESULTS, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        for part in (self.folder / _PARTS).glob("*.jsonl"):
            part.unlink()


def check_settings(folder: Path, settings: Mapping[str, Any], schema: Schema) -> None:
    """Keep the settings that items depend on beside them; new entries of a mapping may join.

    Args:
        folder: of the evaluation.
        settings: nested mappings and lists of plain values.
        schema: what items are called.

    Raises:
        ConfigError: the folder's items were made with other settings; every difference is named.
    """
    path = folder / SETTINGS
    now: dict[str, Any] = json.loads(json.dumps(settings))
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if different := list(_differences(before, now, "")):
        raise ConfigError(
            "\n  - ".join(
                [
                    f"the {schema.items} in {folder} were made with other settings; give another --out:",
                    *different,
                ]
            )
        )
    write_text(path, json.dumps(_joined(before, now), indent=1, sort_keys=True) + "\n")


def check_metrics(folder: Path, identities: Sequence[Sequence[str]], schema: Schema) -> None:
    """Keep beside the scores what gave them.

    Args:
        folder: of the evaluation.
        identities: what tells each scorer from others.
        schema: what items are called.

    Raises:
        ConfigError: the folder's items were measured by others.
    """
    path = folder / METRICS
    now = [list(identity) for identity in identities]
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise ConfigError(
            f"the {schema.items} in {folder} were measured by other networks or with other measures; measure "
            "them anew first, with --rescore"
        )
    keep_metrics(folder, identities)


def keep_metrics(folder: Path, identities: Sequence[Sequence[str]]) -> None:
    """Note which scorers gave the scores in a folder."""
    write_text(folder / METRICS, json.dumps([list(identity) for identity in identities], indent=1) + "\n")


def _differences(before: Any, now: Any, place: str) -> Iterable[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before.keys() & now.keys():
            yield from _differences(before[name], now[name], f"{place}.{name}" if place else name)
    elif before != now:
        yield f"{place}: {before!r} there, {now!r} now"


def _joined(before: Any, now: Any) -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        return {
            name: _joined(before[name], now[name])
            if name in before and name in now
            else {**before, **now}[name]
            for name in before | now
        }
    return now


def _drop_last_line(path: Path) -> None:
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)

"""What gates are trained on: pairs of texts, from wherever they come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ConfigError

#: What fields with the text to read and the text to write are called; the second is LoRAHub's.
FIELDS = (
    ("input", "output"),
    ("context", "completion"),
    ("source", "target"),
    ("inputs", "targets"),
    ("question", "answer"),
)

Pair = tuple[str, str]


def pairs_of(examples: Any, what: str = "examples") -> list[Pair]:
    """(what to read, what to write) of each example.

    Args:
        examples: pairs, mappings with two of `FIELDS`, a `datasets.Dataset` of such rows, or the path of a
            JSONL file with one such mapping or pair in a line.
        what: for errors.

    Raises:
        ConfigError: one of them is no such thing, or there are none.
    """
    rows = _lines(Path(examples)) if isinstance(examples, (str, Path)) else examples
    if not isinstance(rows, Iterable):
        raise ConfigError(
            f"{what} are {type(examples).__name__}; allowed are pairs, mappings and JSONL files"
        )
    found = [_pair(row, f"{what}[{number}]") for number, row in enumerate(rows)]
    if not found:
        raise ConfigError(f"{what} are empty; give at least one")
    return found


def _lines(path: Path) -> list[Any]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    rows = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
    return rows


def _pair(row: Any, what: str) -> Pair:
    if isinstance(row, Mapping):
        names = next((pair for pair in FIELDS if all(name in row for name in pair)), None)
        if names is None:
            allowed = ", ".join(f"{a!r} and {b!r}" for a, b in FIELDS)
            raise ConfigError(f"{what} has the fields {sorted(map(str, row))}; allowed are {allowed}")
        row = [row[name] for name in names]
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 2:
        raise ConfigError(f"{what} is {row!r:.80}; allowed are two texts, or a mapping with two")
    source, target = row
    if not isinstance(source, str) or not isinstance(target, str):
        raise ConfigError(f"{what} is {row!r:.80}; both must be texts")
    return source, target

"""The line of parameters that A1111's web UI writes into pictures: written for other programs, and read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mole_diffusion.core.errors import ConfigError

_CHUNK = 4 * 2**20
_LONGEST = 100_000
#: `Name: value` or `Name: "a text, with commas"`, as the web UI reads them itself.
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:([^:<>]+)(?::([-+.\d]+))?[^<>]*>")


@dataclass(frozen=True)
class Infotext:
    """What such a line says.

    Attributes:
        prompt, negative: without `<lora:...>`.
        parameters: name -> text, of the last line.
        loras: name -> strength, of `<lora:...>` in the prompt.
    """

    prompt: str
    negative: str
    parameters: Mapping[str, str]
    loras: Mapping[str, float] = field(default_factory=dict)


def write_infotext(prompt: str, negative: str, parameters: Mapping[str, object]) -> str:
    """The text for a PNG's `parameters`."""
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join(
        [*lines, ", ".join(f"{name}: {_written(name, value)}" for name, value in parameters.items())]
    )


def read_infotext(text: str) -> Infotext:
    """The reverse, for lines of any web UI of that kind.

    Raises:
        ConfigError: there are no parameters in it.
    """
    *lines, last = text[:_LONGEST].strip().split("\n")
    parameters = {name.strip(): _unquoted(value) for name, value in _PARAMETER.findall(last)}
    if "Steps" not in parameters:
        raise ConfigError("the picture's parameters cannot be read: they name no steps")
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        if line.startswith("Negative prompt:"):
            target, line = negative, line.removeprefix("Negative prompt:").strip()
        target.append(line)
    whole = "\n".join(prompt)
    loras = {match[1]: _number(match[2], 1.0) for match in _LORA.finditer(whole)}
    words = re.sub(r"\s{2,}", " ", _LORA.sub("", whole)).strip()
    return Infotext(words, "\n".join(negative).strip(), parameters, loras)


def lora_hash(path: Path) -> str:
    """The first digits of what web UIs and LoRA sites tell LoRA files by: a hash of all but the header.

    Empty for a folder.
    """
    return _hash(path, path.stat().st_mtime_ns) if path.is_file() else ""


@lru_cache(maxsize=256)
def _hash(path: Path, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()[:12]


def _written(name: str, value: object) -> str:
    """As the web UI does it: texts with separators are JSON; lists always are."""
    text = str(value)
    separated = any(mark in text for mark in ",\n:") or name.endswith((" hashes", " experts"))
    return json.dumps(text, ensure_ascii=False) if separated else text


def _unquoted(value: str) -> str:
    value = value.strip()
    if value[:1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value


def _number(text: str | None, default: float) -> float:
    try:
        return default if text is None else float(text)
    except ValueError:
        return default

"""Files that say what is evaluated: YAML, checked field by field, of which one may extend another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mole_diffusion.core.errors import ConfigError

__all__ = ["Part", "chosen", "read_protocol", "shipped"]


class Part(BaseModel):
    """A protocol or a part of one: unknown fields are refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=Part)


def shipped(folder: Path) -> list[str]:
    """Names of the protocols in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_protocol(source: str, folder: Path, beside: Path) -> Path:
    """The file of a protocol.

    Args:
        source: a name, or a file.
        folder: of the protocols that ship.
        beside: folder that a file's name is relative to.

    Raises:
        ConfigError: neither.
    """
    path = folder / f"{source}.yaml" if source in shipped(folder) else beside / source
    if not path.is_file():
        raise ConfigError(
            f"protocol {source!r} is neither a file nor one of those that ship: {shipped(folder)}"
        )
    return path


def read_protocol(model: type[P], parts: Mapping[str, type[Part]], path: Path, folder: Path) -> P:
    """A protocol; `extends: OTHER` fills in what a file leaves out.

    Args:
        model: what it is.
        parts: what its fields with parts hold, to name the fields that are allowed there.
        path: the file.
        folder: of the protocols that ship.

    Raises:
        ConfigError: no YAML, or unknown or impossible settings, all of which are named.
    """
    try:
        return model.model_validate(_values(path, folder, ()))
    except ValidationError as error:
        raise ConfigError(_explained(model, parts, path, error)) from error


def _values(path: Path, folder: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file; those it leaves out are those of the protocol that it extends."""
    if path.resolve() in before:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(p.name for p in before)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds {type(values).__name__}; allowed is a mapping of settings")
    own = dict(values)
    if "extends" not in own:
        return own
    extended = find_protocol(str(own.pop("extends")), folder, path.parent)
    return {**_values(extended, folder, (*before, path.resolve())), **own}


def _explained(model: type[Part], parts: Mapping[str, type[Part]], path: Path, error: ValidationError) -> str:
    """One line per mistake; an unknown name with the allowed ones."""
    lines = [f"{path} is not a protocol:"]
    for entry in error.errors():
        place = ".".join(str(part) for part in entry["loc"])
        message = f"{entry['msg']}, got {entry['input']!r}"
        if entry["type"] == "extra_forbidden":
            above = entry["loc"][:-1]
            parent = parts.get(str(above[0]), model) if above else model
            message = f"unknown; allowed: {', '.join(parent.model_fields)}"
        lines.append(f"{place}: {message}")
    return "\n  - ".join(lines)


def chosen(what: str, names: tuple[str, ...], known: Mapping[str, Any]) -> tuple[Any, ...]:
    """The entries of these names.

    Raises:
        ConfigError: a name that is not known.
    """
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"no {what} {missing} in the protocol; it has {list(known)}")
    return tuple(known[name] for name in names)

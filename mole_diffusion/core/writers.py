"""Which program wrote a LoRA file, as far as its header says; its names say the rest (`keys`)."""

from __future__ import annotations

from collections.abc import Mapping

from .alphas import ADAPTER_METADATA
from .reading import BadFileError, parse_json

# Anybody may write anything there.
_LONGEST = 60


def writer_of(metadata: Mapping[str, str]) -> str | None:
    """The program that a header names; None if it names none.

    Args:
        metadata: the header's texts.
    """
    if "mole.experts" in metadata:
        return "mole_diffusion"
    if software := _software(metadata.get("software", "")):
        return software
    if "ot_revision" in metadata or "ot_branch" in metadata:
        return "OneTrainer"
    if module := metadata.get("ss_network_module", "").strip():
        kind = "LyCORIS in kohya's scripts" if module.startswith("lycoris") else "kohya's scripts"
        return f"{kind} ({module[:_LONGEST]})"
    if any(key.startswith("ss_") for key in metadata):
        return "kohya's scripts, or a program that writes like them"
    return "diffusers" if ADAPTER_METADATA in metadata else None


def _software(text: str) -> str:
    """ai-toolkit's entry: a name and a version."""
    try:
        found = parse_json(text or "{}")
    except BadFileError:
        return ""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return ""
    version = found.get("version", "")
    named = f"{found['name']} {version if isinstance(version, str) else ''}"
    return named.strip()[:_LONGEST]

"""Training state on disk, and networks that stay as they are while something else is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.files import replacing

STATE_FILE = "state.pt"
GATES_FILE = "gates.safetensors"
HISTORY_FILE = "history.jsonl"
FORMAT_VERSION = 2


@contextmanager
def frozen(modules: Iterable[nn.Module], but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Freeze modules and put them into evaluation mode, while something else trains; undone afterwards.

    Args:
        modules: networks that are to stay as they are.
        but: what trains.

    Raises:
        TrainingError: if something that trains asks for no gradient, or is part of a frozen module.
    """
    modules, trained = list(modules), list(but)
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    modes = [(module, module.training) for module in modules]
    for module in modules:
        module.requires_grad_(False).eval()
    try:
        inside = {id(parameter) for parameter, _ in flags}
        if any(not one.requires_grad or id(one) in inside for one in trained):
            raise TrainingError("what trains is part of a frozen network, or asks for no gradient")
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.train(mode)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training state; a reader sees the old one or the new one, never half of it."""
    with replacing(folder / STATE_FILE) as temporary:
        torch.save({"format_version": FORMAT_VERSION, **state}, temporary)


def load_state(folder: Path, entries: Iterable[str] = ()) -> dict[str, Any] | None:
    """The training state of a folder, or None. Loads tensors and plain values only, never code.

    Args:
        folder: where it is kept.
        entries: what must be in it.

    Raises:
        TrainingError: if the file is damaged, is something else, or was written by another version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, pickle and zip raise all kinds on what they cannot read
        raise TrainingError(_unreadable(path, f"it cannot be read ({type(error).__name__})")) from error
    if not isinstance(state, dict) or "format_version" not in state:
        raise TrainingError(_unreadable(path, "it holds something else"))
    if state["format_version"] != FORMAT_VERSION:
        raise TrainingError(
            f"{path} has format version {state['format_version']!r}; this version reads {FORMAT_VERSION}"
        )
    absent = [entry for entry in entries if entry not in state]
    if absent:
        raise TrainingError(_unreadable(path, f"it has no {', '.join(absent)}"))
    return state


def _unreadable(path: Path, reason: str) -> str:
    return f"{path} is no training state: {reason}; take it away, or begin anew in another folder"


def differences(facts: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a training and a saved one do not have in common, a line each."""
    names = dict.fromkeys([*facts, *saved])
    return [
        f"{name}: {facts.get(name)!r} now, {saved.get(name)!r} in the checkpoint"
        for name in names
        if facts.get(name) != saved.get(name)
    ]

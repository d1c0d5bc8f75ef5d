"""Training state on disk, and networks that stay as they are while something else is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.files import replacing

STATE_FILE = "state.pt"
GATES_FILE = "gates.safetensors"
HISTORY_FILE = "history.jsonl"
PREPARATION_FILE = "preparation.pt"
FORMAT_VERSION = 2
#: Facts that say how long a training is to be.
LENGTHS = ("iterations", "steps")


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


class Preparation:
    """What is made before the first iteration, kept in a folder piece by piece: a kill costs the last piece.

    Args:
        folder: where; None keeps nothing.
        facts: what the pieces depend on; those of other facts are made anew.
        tell: called with (pieces that are there, pieces in all) after every piece.
    """

    def __init__(
        self,
        folder: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        self._path = None if folder is None else folder / PREPARATION_FILE
        self._facts = without_length(facts or {})
        self._tell = tell

    def pieces(
        self,
        count: int,
        make: Callable[[int], Tensor],
        state: Callable[[], Any],
        restore: Callable[[Any], None],
    ) -> list[Tensor]:
        """All pieces: those that are kept, and the others made now.

        Args:
            count: how many.
            make: makes the piece of an index.
            state: what has to go on where it was, random generators above all; tensors and plain values.
            restore: the reverse.
        """
        found, kept = [], self._read(count)
        if kept is not None:
            found = list(kept["pieces"])
            restore(kept["state"])
        for index in range(len(found), count):
            found.append(make(index))
            if self._path is not None:
                self._write({"count": count, "pieces": found, "state": state()})
            if self._tell is not None:
                self._tell(index + 1, count)
        return found

    def clear(self) -> None:
        """Forget the pieces: a checkpoint has them, or they are not wanted."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._path is not None
        with replacing(self._path) as temporary:
            torch.save({"format_version": FORMAT_VERSION, "facts": self._facts, **values}, temporary)

    def _read(self, count: int) -> dict[str, Any] | None:
        """What an earlier run made, where it can be read and is of the same facts."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            kept = torch.load(self._path, weights_only=True, map_location="cpu")
            same = (kept["format_version"], kept["facts"], kept["count"])
            if same != (FORMAT_VERSION, self._facts, count) or len(kept["pieces"]) > count:
                return None
            return {"pieces": kept["pieces"], "state": kept["state"]}
        except Exception:  # whatever it is, it is made anew
            return None


def without_length(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts but for how long a training is to be: it may be made longer."""
    return {name: value for name, value in facts.items() if name not in LENGTHS}


def differences(facts: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a training and a saved one do not have in common, a line each."""
    names = dict.fromkeys([*facts, *saved])
    return [
        f"{name}: {facts.get(name)!r} now, {saved.get(name)!r} in the checkpoint"
        for name in names
        if facts.get(name) != saved.get(name)
    ]

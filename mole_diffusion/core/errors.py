"""Exceptions of the package: everything it raises on purpose is a `MoLEError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from os import PathLike


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a slip of the keyboard makes of `name`; None where none is that near."""
    lowered = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.65)
    return lowered[found[0]] if found else None


class MoLEError(Exception):
    """Base class of all errors raised by mole_diffusion."""


class ConfigError(MoLEError, ValueError):
    """A setting, or a combination of settings, is not allowed."""


class ExpertLoadError(MoLEError, ValueError):
    """A file could not be read as a LoRA expert."""


class UnknownExpertError(MoLEError, ValueError):
    """An expert name was used that is not loaded.

    Args:
        name: the name that was asked for.
        known: the names that exist.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        near = nearest(name, self.known)
        hint = "" if near is None else f" Did you mean {near!r}?"
        names = ", ".join(repr(k) for k in self.known) or "none"
        super().__init__(f"Unknown expert {name!r}. Known experts: {names}.{hint}")


class NoExpertsError(MoLEError, RuntimeError):
    """Something needs at least one expert and there is none."""


class AllExpertsMaskedError(MoLEError, ValueError):
    """An expert mask leaves no expert active."""


class GateMismatchError(MoLEError, ValueError):
    """A gates file does not fit the mixture it is loaded into.

    Args:
        message: one sentence saying what was tried.
        differences: one sentence per difference, each with the file's value and the mixture's value.
    """

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        self.differences = list(differences)
        super().__init__("\n  - ".join([message, *self.differences]))

    def add_hints(self, hints: Sequence[str]) -> None:
        """Say at the end what a user of this host can do about it."""
        if hints:
            self.args = ("\n".join([str(self), *hints]),)


class RegionMaskError(MoLEError, ValueError):
    """A region mask has the wrong shape, size or values."""


class InjectionError(MoLEError, RuntimeError):
    """Experts could not be attached to a network, or an attached network ran in an unexpected way."""


class TrainingError(MoLEError, RuntimeError):
    """Gate training cannot start or go on."""


class InUseError(MoLEError, RuntimeError):
    """Another thread is using something that serves one at a time."""


class WriteError(MoLEError, OSError):
    """A file or folder cannot be written.

    Args:
        path: what was to be written.
        reason: what the system said.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{str(path)!r} cannot be written: {reason}.")

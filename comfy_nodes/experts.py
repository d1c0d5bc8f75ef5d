"""What flows along EXPERTS and GATES connections."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mole_diffusion.core.checkpoint import GatesHeader, read_gates_header
from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.files import replacing
from mole_diffusion.core.shared_gates import SharedGates, is_shared_gates

_SEPARATORS = re.compile(r"[,;\n]")


@dataclass(frozen=True)
class ExpertSet:
    """Experts in the order in which they were chained, and which of them count.

    Attributes:
        experts: the experts.
        active: names of those that count; None for all.
        scales: name -> strength, in place of the one the expert was loaded with.
        regions: name -> (H, W) mask in 0..1.
        unchecked: names of those used though their file names another prediction type than the MODEL's.
    """

    experts: tuple[Expert, ...] = ()
    active: tuple[str, ...] | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    unchecked: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(expert.name for expert in self.experts)

    def with_expert(self, expert: Expert, *, check_base: bool = True) -> ExpertSet:
        """One more expert.

        Args:
            expert: the expert.
            check_base: False uses it whatever prediction type its file names.
        Raises:
            ConfigError: the name is taken.
        """
        if expert.name in self.names:
            raise ConfigError(
                f"There is an expert {expert.name!r} already (loaded: {', '.join(self.names)}); give this "
                "one another name."
            )
        unchecked = self.unchecked if check_base else self.unchecked | {expert.name}
        return replace(self, experts=(*self.experts, expert), unchecked=unchecked)

    def masked(self, active: Sequence[str] | None, scales: Mapping[str, float]) -> ExpertSet:
        """The same experts, of which only `active` count (None: as before), with other strengths.

        Raises:
            UnknownExpertError: a name is not among the experts.
        """
        self.check([*(active or ()), *scales])
        chosen = self.active if active is None else tuple(n for n in self.names if n in active)
        return replace(self, active=chosen, scales={**self.scales, **scales})

    def in_regions(self, regions: Mapping[str, Tensor]) -> ExpertSet:
        """The same experts, each confined to its mask.

        Raises:
            UnknownExpertError: a name is not among the experts.
        """
        self.check(regions)
        return replace(self, regions={**self.regions, **regions})

    def check(self, names: Sequence[str] | Mapping[str, object]) -> None:
        """Raise UnknownExpertError for a name that is not among the experts."""
        for name in names:
            if name not in self.names:
                raise UnknownExpertError(name, self.names)


@dataclass(frozen=True)
class GatesFile:
    """Gates, kept in a file of the format of `mole_diffusion.core.checkpoint`, or shared gates."""

    path: Path

    @cached_property
    def header(self) -> GatesHeader:
        """What the file says about itself."""
        return read_gates_header(self.path)

    @cached_property
    def shared(self) -> SharedGates | None:
        """What the file holds if it is for any experts; None where it is for some."""
        return SharedGates.load(self.path) if is_shared_gates(self.path) else None

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its writer noted."""
        return self.header.metadata if self.shared is None else self.shared.metadata

    @property
    def expert_names(self) -> dict[str, tuple[str, ...]]:
        """Part -> the experts that it is for; none for shared gates."""
        if self.shared is not None:
            return {}
        return {part: self.header.expert_names(part) for part in self.header.parts}

    @cached_property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def iterations(self) -> tuple[int, int] | None:
        """Iterations of the training so far and in all; None where the file does not say."""
        known = self.metadata
        try:
            return int(known["iterations"]), int(json.loads(known["training"])["iterations"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def unfinished(self) -> str:
        """A sentence where the training was not finished; else empty."""
        done, of = self.iterations or (0, 0)
        if done >= of:
            return ""
        return f"half trained: {done} of {of} iterations; the same training goes on when it is queued again"

    def copy_to(self, path: Path) -> None:
        """Write the file to another place; it appears there whole or not at all."""
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)


def read_names(text: str) -> list[str] | None:
    """Names separated by commas or line breaks; None where there is none."""
    names = [name.strip() for name in _SEPARATORS.split(text) if name.strip()]
    return names or None


def read_assignments(text: str, what: str) -> dict[str, str]:
    """Lines such as "boot = 0.8" as a mapping.

    Args:
        text: the lines; commas do not separate, so that values may have some.
        what: what the values are, for the message.
    Raises:
        ConfigError: a line has no "=".
    """
    found: dict[str, str] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, sign, value = line.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise ConfigError(f"{line!r} cannot be read: write one line per expert, NAME = {what}.")
        found[name.strip()] = value.strip()
    return found


def read_strengths(text: str) -> dict[str, float]:
    """Lines such as "boot = 0.8" as numbers.

    Raises:
        ConfigError: a line cannot be read.
    """
    strengths = {}
    for name, value in read_assignments(text, "STRENGTH").items():
        try:
            strengths[name] = float(value)
        except ValueError:
            raise ConfigError(f"The strength of {name!r} is {value!r}; allowed is a number.") from None
    return strengths

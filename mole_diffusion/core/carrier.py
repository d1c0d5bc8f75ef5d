"""`Carrier`: experts and gates that are on a model's networks: hooks on and off, what counts, who watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch.utils.hooks import RemovableHandle

from .config import MoLEConfig
from .experts import Expert
from .mixture import Mixture
from .mixture_set import Choice, Companion, MixtureSet
from .records import Recorder
from .turns import OneThread


class Carrier:
    """The mixtures that are on a model's networks now; `Ensemble` says which these are.

    Args:
        held: experts and mixtures.

    Attributes:
        recorder: watches all networks while their hooks are on; None for none.
    """

    def __init__(self, held: MixtureSet) -> None:
        self.recorder: Recorder | None = None
        self._watched: dict[str, RemovableHandle] = {}
        self._held = held
        self._turn = OneThread()

    @property
    def experts(self) -> dict[str, Expert]:
        """The experts by name, in the order of the gates' rows."""
        return self._held.experts

    @property
    def mixtures(self) -> dict[str, Mixture]:
        """The mixture of each network that an expert changes, by part."""
        return self._held.mixtures

    @property
    def config(self) -> MoLEConfig:
        """The form of the gates: of the first network's, where a gates file gave them different ones."""
        first = next(iter(self._held.mixtures.values()), None)
        return self._held.config if first is None else first.config

    @property
    def choice(self) -> Choice:
        """What counts in the forwards to come."""
        return self._held.choice

    @property
    def styles(self) -> list[str]:
        """The experts that change the whole picture, in their order."""
        return self._held.styles

    @property
    def companions(self) -> list[Companion]:
        """What the experts bring along beside their matrices."""
        return self._held.companions

    def in_use(self) -> AbstractContextManager[None]:
        """Keep other threads out inside the `with` block; what changes experts or choices does so itself.

        Raises:
            InUseError: another thread is inside.
        """
        return self._turn.inside()

    def park(self, parts: Iterable[str] | None = None) -> None:
        """Take hooks off, bitwise; everything else is kept. Doing it twice does no harm.

        Args:
            parts: the networks; None for all.
        """
        for part in list(self.mixtures) if parts is None else parts:
            if part in self.mixtures:
                self._unwatch([part])
                self.mixtures[part].eject()

    def unpark(self, parts: Iterable[str] | None = None) -> None:
        """Put hooks on that are off.

        Args:
            parts: the networks; None for all.

        Raises:
            InjectionError: a network carries another mixture; no hook was put on.
        """
        off = [
            part
            for part, mixture in self.mixtures.items()
            if not mixture.injected and (parts is None or part in parts)
        ]
        try:
            for part in off:
                self.mixtures[part].attach()
        except BaseException:
            self.park(off)
            raise
        self._watch(off)

    def activate(self, choice: Choice) -> None:
        """Let this count in the forwards to come.

        Raises:
            MoLEError: see `Mixture.activate`.
        """
        self._held.activate(choice)

    @contextmanager
    def choosing(self, choice: Choice) -> Iterator[None]:
        """`activate` for the `with` block; afterwards what counted before.

        Raises:
            InUseError: another thread is using these experts.
        """
        with self.in_use():
            before = self.choice
            self.activate(choice)
            try:
                yield
            finally:
                self.activate(before)

    @contextmanager
    def without_companions(self) -> Iterator[None]:
        """What experts bring along beside their matrices is off inside the `with` block."""
        with self.in_use():
            held = self._held
            for companion in held.companions:
                companion.detach()
            try:
                yield
            finally:
                for companion in held.companions:
                    companion.attach()
                held.show()

    def record(self, recorder: Recorder | None) -> None:
        """Let a recorder watch the networks while hooks are on them; None for none."""
        self._unwatch()
        self.recorder = recorder
        self._watch(self._held.attached)

    def _watch(self, parts: Iterable[str]) -> None:
        if self.recorder is not None:
            self._watched |= {part: self.recorder.watch(self.mixtures[part]) for part in parts}

    def _unwatch(self, parts: Iterable[str] | None = None) -> None:
        for part in list(self._watched) if parts is None else parts:
            if (handle := self._watched.pop(part, None)) is not None:
                handle.remove()

"""Experts and gates on a shared base model: attached for one piece of work, then taken off again.

The only place of the app that knows how a pipeline holds its experts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mole_diffusion.app.jobs import Cancelled
from mole_diffusion.app.setup import Setup

#: Sets of experts with gates kept in memory, beside the one at work: several visitors take turns.
KEPT = 4


class Shelf:
    """Experts with their gates that were attached lately, for the worker's thread.

    Args:
        kept: how many sets.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._states: OrderedDict[Any, Any] = OrderedDict()

    @contextmanager
    def attached(self, pipe: Any, setup: Setup, scales: Mapping[str, float] | None = None) -> Iterator[Any]:
        """The pipeline with the setup's experts and gates inside the `with` block.

        Args:
            pipe: a base model without experts.
            setup: what to attach.
            scales: to load the experts with for export, elsewhere scales belong to a call.

        Raises:
            MoLEError: an expert or the gates cannot be had.
        """
        files = [gates and gates.path for gates in (setup.gates, setup.shared)]
        key = (id(pipe), _experts(setup, scales or {}), *files)
        state = self._states.pop(key, None)
        if state is not None:
            pipe.attach_experts(state)
        whole, own = False, pipe.shared_gates
        try:
            if state is None:
                _load(pipe, setup, scales or {})
            if setup.shared is not None:
                pipe.load_shared_gates(setup.shared.path)
            yield pipe
            whole = True
        except Cancelled:
            whole = True
            raise
        finally:
            state = pipe.detach_experts()
            pipe.ensemble.shared = own
            # After an error nobody knows whether it is as it was.
            if whole and setup.cards:
                self._states[key] = state
                while len(self._states) > self._kept:
                    self._states.popitem(last=False)

    @contextmanager
    def trained(self, pipe: Any, setup: Setup) -> Iterator[Any]:
        """As `attached`, with fresh gates that may be changed."""
        try:
            _load(pipe, Setup(setup.model, setup.cards), {})
            yield pipe
        finally:
            pipe.detach_experts()

    def clear(self) -> None:
        """Forget all sets; those of a base model that goes would keep it in memory."""
        self._states.clear()


def _experts(setup: Setup, scales: Mapping[str, float]) -> tuple[tuple[str, Any, float], ...]:
    return tuple((card.name, card.path, scales.get(card.name, 1.0)) for card in setup.cards)


def _load(pipe: Any, setup: Setup, scales: Mapping[str, float]) -> None:
    for name, path, scale in _experts(setup, scales):
        pipe.load_expert(path, name=name, scale=scale)
    if setup.gates is not None:
        pipe.load_gates(setup.gates.path)

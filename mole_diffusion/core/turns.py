"""Two threads that use one model at a time would get each other's pictures: the second one is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import InUseError


class OneThread:
    """Lets one thread in at a time, as often as it likes; others are refused, not kept waiting.

    Waiting could last for ever: a thread may hold a model and wait for another thread that draws with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be the one thread inside the `with` block.

        Raises:
            InUseError: another thread is.
        """
        me = threading.get_ident()
        with self._lock:
            if self._depth and self._owner != me:
                raise InUseError(
                    "This model's experts are in use by another thread. One model serves one thread at a"
                    " time: let threads take turns with a lock, or give each a model of its own."
                )
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1

    def __deepcopy__(self, memo: Any) -> OneThread:
        """A copied model is used by nobody."""
        return OneThread()

    def __reduce__(self) -> tuple[type[OneThread], tuple[()]]:
        """As a copy; locks cannot be pickled."""
        return OneThread, ()

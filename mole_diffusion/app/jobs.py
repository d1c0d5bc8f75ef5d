"""Long work, one piece at a time: a bounded queue with one worker thread, and jobs to watch and cancel."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mole_diffusion.core.errors import MoLEError

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
#: Seconds after which a watcher looks again although nothing was reported, so that waiting times stay fresh.
_HEARTBEAT = 2.0


class QueueFullError(MoLEError, RuntimeError):
    """So much work is waiting that no more is taken."""


class Cancelled(Exception):
    """Raised inside a job's work after somebody cancelled it."""


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        done, total: steps; total 0 is unknown.
        note: what it is doing.
        seconds_left: an estimate, or None.
    """

    done: int = 0
    total: int = 0
    note: str = ""
    seconds_left: float | None = None


class Job:
    """One piece of work.

    Args:
        kind: "compose", "train", ...
        work: called in the worker thread with this job; what it returns is the job's result.
    """

    def __init__(self, kind: str, work: Callable[[Job], Any]) -> None:
        self.kind = kind
        self.state: State = "waiting"
        self.progress = Progress()
        self.preview: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._asked = False
        self._version = 0
        self._changed = threading.Condition()
        self._started = 0.0

    @property
    def finished(self) -> bool:
        """Whether it has come to an end, whichever."""
        return self.state in ("done", "failed", "cancelled")

    def cancel(self) -> None:
        """Ask it to stop; a job that waits is never begun."""
        self._asked = True
        with self._changed:
            if self.state == "waiting":
                self.state = "cancelled"
            self._note_change()

    @property
    def asked_to_stop(self) -> bool:
        """Whether somebody cancelled it."""
        return self._asked

    def check(self) -> None:
        """For the work, often: raises `Cancelled` after `cancel()`."""
        if self._asked:
            raise Cancelled

    def report(self, done: int, total: int, note: str = "", *, preview: Any = None) -> None:
        """For the work: tell how far it is; a preview stays until the next one."""
        passed = time.monotonic() - self._started
        left = passed / done * (total - done) if done and total else None
        with self._changed:
            self.progress = Progress(done, total, note, left)
            if preview is not None:
                self.preview = preview
            self._note_change()

    def tell(self, progress: Progress, preview: Any = None) -> None:
        """As `report`, with an estimate of its own."""
        with self._changed:
            self.progress = progress
            if preview is not None:
                self.preview = preview
            self._note_change()

    def watch(self) -> Iterator[Job]:
        """Yields itself at once, whenever something was reported, and once more when it has finished."""
        seen = -1
        while True:
            with self._changed:
                if self._version == seen and not self.finished:
                    self._changed.wait(_HEARTBEAT)
                seen, last = self._version, self.finished
            yield self
            if last:
                return

    def wait(self, timeout: float | None = None) -> Job:
        """Until it has finished."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished, timeout)
        return self

    def run(self) -> None:
        """Do the work here and now (called by the worker)."""
        with self._changed:
            if self.state != "waiting":
                return
            self.state, self._started = "running", time.monotonic()
            self._note_change()
        state: State
        try:
            self.result = self._work(self)
            state = "done"
        except Cancelled:
            state = "cancelled"
        except BaseException as error:
            self.error, state = error, "failed"
            if not isinstance(error, MoLEError):
                logger.exception("%s failed", self.kind)
        with self._changed:
            self.state = state
            self._note_change()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.notify_all()


class Worker:
    """Does jobs one after the other in a thread of its own.

    Args:
        length: how many jobs may wait.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._loop, name="mole-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue.

        Raises:
            QueueFullError: too many are waiting, or the app is closing.
        """
        with self._changed:
            waiting = [other for other in self._waiting if not other.finished]
            if self._closed or len(waiting) >= self._length:
                raise QueueFullError(
                    f"{len(waiting)} pieces of work are waiting already (the queue takes {self._length});"
                    " try again when some are done"
                )
            self._waiting = deque([*waiting, job])
            self._changed.notify_all()
        return job

    def position(self, job: Job) -> int:
        """How many jobs come before this one; 0 for the running one and for finished ones."""
        with self._changed:
            if job not in self._waiting:
                return 0
            ahead = [other for other in self._waiting if not other.finished]
            running = self._current is not None
            return (ahead.index(job) if job in ahead else 0) + int(running)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._current] if self._current else [])]:
                job.cancel()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._current = self._waiting.popleft()
            self._current.run()

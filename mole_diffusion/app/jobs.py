"""Long work, one piece at a time: a bounded, fair queue with one worker, and jobs to watch and cancel."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mole_diffusion.app import WORKER_THREAD
from mole_diffusion.core.errors import MoLEError

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
#: Seconds after which a watcher looks again although nothing was reported, so that waiting times stay fresh.
_HEARTBEAT = 2.0
#: Share of the newest measurement in what is known of the speed of a kind of work.
_NEWEST = 0.4


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


@dataclass(frozen=True)
class Place:
    """Where a job stands in the queue.

    Attributes:
        ahead: jobs that come before it, with the running one; 0 for the running one and for finished ones.
        seconds: expected wait until it begins; None where nothing like the jobs before it was timed yet.
    """

    ahead: int
    seconds: float | None


class Job:
    """One piece of work.

    Args:
        kind: "compose", "train", ...
        work: called in the worker thread with this job; what it returns is the job's result.
        visitor: whose it is; the queue is fair among visitors.
        like: jobs that are alike in this take times in proportion to their `units`.
        units: how much work it is.
        files: what it reads; they stay until it has finished.
        awaited: whether the app waits for it before it ends; False for what leaves nothing half done.
    """

    def __init__(
        self,
        kind: str,
        work: Callable[[Job], Any],
        *,
        visitor: Hashable = None,
        like: Hashable = None,
        units: float = 1.0,
        files: frozenset[Path] = frozenset(),
        awaited: bool = True,
    ) -> None:
        self.kind = kind
        self.awaited = awaited
        self.visitor = visitor
        self.like = (kind, like)
        self.units = max(units, 1e-9)
        self.files = files
        self.state: State = "waiting"
        self.progress = Progress()
        self.preview: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.turn = 0
        self._work: Callable[[Job], Any] | None = work
        self._asked = False
        self._version = 0
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()
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
                self._end("cancelled")
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
        self.tell(Progress(done, total, note, left), preview)

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

    async def follow(self) -> AsyncIterator[Job]:
        """As `watch`, in an event loop: a watcher holds no thread."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.add(wake)
        try:
            while True:
                changed.clear()
                last = self.finished
                yield self
                if last:
                    return
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), _HEARTBEAT)
        finally:
            with self._changed:
                self._listeners.discard(wake)

    async def finish(self) -> Job:
        """As `wait`, in an event loop."""
        async for _ in self.follow():
            pass
        return self

    def wait(self, timeout: float | None = None) -> Job:
        """Until it has finished."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished, timeout)
        return self

    def run(self) -> None:
        """Do the work here and now (called by the worker)."""
        with self._changed:
            if self.state != "waiting" or self._work is None:
                return
            self.state, self._started = "running", time.monotonic()
            self._note_change()
            work = self._work
        state: State
        try:
            self.result = work(self)
            state = "done"
        except Cancelled:
            state = "cancelled"
        except BaseException as error:
            self.error, state = error, "failed"
            if not isinstance(error, MoLEError):
                logger.exception("%s failed", self.kind)
        with self._changed:
            self.seconds = time.monotonic() - self._started
            self._end(state)
            self._note_change()

    def elapsed(self) -> float:
        """Seconds since it began; 0 before."""
        return time.monotonic() - self._started if self.state == "running" else self.seconds

    def _end(self, state: State) -> None:
        """What only the work needed goes with it."""
        self.state = state
        self._work, self.preview, self.files = None, None, frozenset()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.notify_all()
        for wake in tuple(self._listeners):
            wake()


class Worker:
    """Does jobs one after the other in a thread of its own; visitors take turns.

    Args:
        length: how many jobs may wait.
        share: how many of them may be one visitor's; None is all.
    """

    def __init__(self, length: int, share: int | None = None) -> None:
        self._length, self._share = length, share or length
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._current: Job | None = None
        self._turn = 0
        self._turns: dict[Hashable, int] = {}
        self._speeds: dict[Hashable, float] = {}
        self._thread = threading.Thread(target=self._loop, name=WORKER_THREAD, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job into the queue: behind the visitor's own, and behind as many of every other's.

        Raises:
            QueueFullError: too many are waiting, or the app is closing.
        """
        with self._changed:
            self._waiting = [other for other in self._waiting if not other.finished]
            if self._closed:
                raise QueueFullError("the app is closing")
            self._check_room(job)
            job.turn = max(self._turn, self._turns.get(job.visitor, 0)) + 1
            self._turns = {who: turn for who, turn in self._turns.items() if turn > self._turn}
            self._turns[job.visitor] = job.turn
            # Of equal turns the earlier one goes first.
            place = sum(other.turn <= job.turn for other in self._waiting)
            self._waiting.insert(place, job)
            self._changed.notify_all()
        return job

    def position(self, job: Job) -> int:
        """How many jobs come before this one; 0 for the running one and for finished ones."""
        return self.place(job).ahead

    def place(self, job: Job) -> Place:
        """Where a job stands, and how long it is expected to wait."""
        with self._changed:
            ahead = [other for other in self._waiting if not other.finished]
            if job not in ahead:
                return Place(0, 0.0)
            before = ahead[: ahead.index(job)]
            return Place(len(before) + int(self._current is not None), self._expected(before))

    def load(self) -> Place:
        """Where a new job of a new visitor would stand at the latest: behind all that are waiting."""
        with self._changed:
            waiting = [job for job in self._waiting if not job.finished]
            return Place(len(waiting) + int(self._current is not None), self._expected(waiting))

    def close(self, timeout: float = 30.0) -> None:
        """Cancel everything and end the thread; a job that nobody awaits may go on in it."""
        with self._changed:
            self._closed = True
            awaited = self._current is None or self._current.awaited
            for job in [*self._waiting, *([self._current] if self._current else [])]:
                job.cancel()
            self._changed.notify_all()
        if awaited:
            self._thread.join(timeout)

    def _check_room(self, job: Job) -> None:
        waiting = len(self._waiting)
        own = sum(other.visitor == job.visitor for other in self._waiting)
        if waiting < self._length and own < self._share:
            return
        seconds = self._expected(self._waiting)
        when = "" if seconds is None else f", and would begin in about {duration(seconds)}"
        limit = f"the queue takes {self._length}"
        if waiting < self._length:
            limit = f"{own} of them yours, and one visitor may have {self._share}"
        raise QueueFullError(
            f"{waiting} pieces of work are waiting already ({limit}); one more would be number"
            f" {waiting + 1}{when}: try again when some are done"
        )

    def _expected(self, jobs: list[Job]) -> float | None:
        """Seconds that these jobs and the rest of the running one will take."""
        times = [self._seconds(job) for job in jobs]
        if self._current is not None:
            times.append(self._remaining(self._current))
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None

    def _seconds(self, job: Job) -> float | None:
        speed = self._speeds.get(job.like)
        return None if speed is None else speed * job.units

    def _remaining(self, job: Job) -> float | None:
        if job.progress.seconds_left is not None:
            return job.progress.seconds_left
        whole = self._seconds(job)
        return None if whole is None else max(whole - job.elapsed(), 0.0)

    def _learn(self, job: Job) -> None:
        """How long a unit of such work takes."""
        if job.state == "done":
            now = job.seconds / job.units
            before = self._speeds.get(job.like, now)
            self._speeds[job.like] = before + _NEWEST * (now - before)

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._current is not None:
                    self._learn(self._current)
                self._current = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._current = self._waiting.pop(0)
                self._turn = max(self._turn, self._current.turn)
            self._current.run()


def duration(seconds: float) -> str:
    """`"7 s"`, `"2 min 05 s"`, `"1 h 10 min"`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

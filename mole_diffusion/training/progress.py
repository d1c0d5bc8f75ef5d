"""What training tells while it runs: events for callbacks, how far it is, and a history of JSON lines."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mole_diffusion.core.files import replacing, writing

#: One iteration: iteration (from 1), loss, its parts, what the learner says of itself (of gates: balance,
#: entropy, weights), seconds.
HistoryRow = dict[str, Any]

#: Where there is no terminal: seconds after which a line is due, and the share of the work.
LINE_SECONDS = 30.0
LINE_SHARE = 0.1


@dataclass(frozen=True)
class TrainingEvent:
    """What a callback gets after every iteration.

    Args:
        iteration: Iterations done.
        iterations: Iterations asked for.
        row: The line of the history.
        seconds_left: Estimate from the iterations of this run so far.
        preview: What the trainer shows of its work every `preview_every` iterations: of gates for pictures,
            a PIL picture drawn with the gates as they are.
    """

    iteration: int
    iterations: int
    row: Mapping[str, Any]
    seconds_left: float
    preview: Any = None


class _Display(Protocol):
    def show(self, done: int, note: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """How far long work is, on the error stream: what is printed as a result stays readable by programs.

    On a terminal it is a bar with the time left. Elsewhere, in logs and pipes, it is a line every 30 seconds
    or every tenth of the work, whichever comes first. Used as a context manager.

    Args:
        what: What is being done, in a word.
        total: How much there is to do.
        done: How much an earlier run did.
        shown: Whether to show it at all.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, shown: bool = True) -> None:
        self._what, self._total, self._done, self._shown = what, total, done, shown
        self._display: _Display | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            self._display = _display(self._what, self._total, self._done)
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def update(self, done: int, note: str = "") -> None:
        """Say that so much of the total is done, and something about it."""
        if self._display is not None:
            self._display.show(done, note)


def _display(what: str, total: int, done: int) -> _Display:
    """A bar on a terminal where rich is installed, which not every host has; else lines."""
    if sys.stderr.isatty():
        try:
            return _Bar(what, total, done)
        except ImportError:
            pass
    return _Lines(what, total, done)


class _Bar:
    """A bar of rich."""

    def __init__(self, what: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn(what),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.start()

    def show(self, done: int, note: str) -> None:
        self._progress.update(self._task, completed=done, description=note)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A line now and then."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total = what, total
        self._first = self._told = done
        self._start = self._last = time.monotonic()

    def show(self, done: int, note: str) -> None:
        now = time.monotonic()
        enough = done - self._told >= max(1.0, self._total * LINE_SHARE) or now - self._last >= LINE_SECONDS
        if done == self._told or not (enough or done == self._total):
            return
        self._told, self._last = done, now
        left = (now - self._start) / max(done - self._first, 1) * (self._total - done)
        words = [f"{self._what} {done}/{self._total}", *([note] if note else [])]
        words += [f"{_clock(left)} left"] if done < self._total else [f"took {_clock(now - self._start)}"]
        print(", ".join(words), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(row: Mapping[str, Any]) -> str:
    """The loss, its parts and the entropy (where there is one) of a history row in one line."""
    parts = {"loss": row["loss"], **row["parts"], **{k: row[k] for k in ("entropy",) if k in row}}
    return " ".join(f"{name} {value:.3f}" for name, value in parts.items())


class HistoryFile:
    """Rows as JSON lines in a file; does nothing without a path.

    Args:
        path: The file, begun anew with `rows`.
        rows: Rows of an earlier run.
    """

    def __init__(self, path: Path | None, rows: Sequence[HistoryRow]) -> None:
        self._path = path
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: HistoryRow) -> None:
        """Add a row."""
        if self._path is not None:
            with writing(self._path), self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Clock:
    """Seconds of training, earlier runs included.

    Args:
        before: Seconds of earlier runs.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.monotonic() - self._start

    def left(self, done: int, remaining: int) -> float:
        """Seconds left, after `done` iterations of this run, with `remaining` to go."""
        return (time.monotonic() - self._start) / max(done, 1) * remaining


class Interrupt:
    """Lets the iteration that runs when Ctrl-C is pressed come to its end; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for Ctrl-C inside the block (in the main thread; others get no signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

"""What training tells while it runs: events for callbacks, a progress bar, and a history of JSON lines."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from PIL.Image import Image

#: One iteration: iteration (from 1), loss, its parts, balance, entropy, weights (expert -> mean weight),
#: seconds.
HistoryRow = dict[str, Any]


@dataclass(frozen=True)
class TrainingEvent:
    """What a callback gets after every iteration.

    Args:
        iteration: Iterations done.
        iterations: Iterations asked for.
        row: The line of the history.
        seconds_left: Estimate from the iterations of this run so far.
        preview: A picture drawn with the gates as they are, every ``preview_every`` iterations.
    """

    iteration: int
    iterations: int
    row: Mapping[str, Any]
    seconds_left: float
    preview: Image | None = None


class ProgressBar:
    """A bar with losses, entropy and time left; silent where it is not wanted.

    Args:
        iterations: Iterations in total.
        done: Iterations that an earlier run did.
        shown: Whether to show it at all.
    """

    def __init__(self, iterations: int, done: int, shown: bool) -> None:
        self._progress: Any = None
        self._task: Any = None
        if shown:
            self._progress, self._task = _rich_bar(iterations, done)

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show an iteration."""
        if self._progress is not None:
            self._progress.update(self._task, completed=row["iteration"], description=describe(row))


def _rich_bar(iterations: int, done: int) -> tuple[Any, Any]:
    """A bar of rich and its task; hosts that show progress in their own way need not have rich."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("gates"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        # Not where results are printed: those stay readable by programs.
        console=Console(stderr=True),
    )
    return bar, bar.add_task("", total=iterations, completed=done)


def describe(row: Mapping[str, Any]) -> str:
    """The loss, its parts and the entropy of a history row in one line."""
    parts = {"loss": row["loss"], **row["parts"], "entropy": row["entropy"]}
    return " ".join(f"{name} {value:.3f}" for name, value in parts.items())


class HistoryFile:
    """Rows as JSON lines in a file; does nothing without a path.

    Args:
        path: The file, begun anew with ``rows``.
        rows: Rows of an earlier run.
    """

    def __init__(self, path: Path | None, rows: Sequence[HistoryRow]) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: HistoryRow) -> None:
        """Add a row."""
        if self._path is not None:
            with self._path.open("a") as file:
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
        """Seconds left, after ``done`` iterations of this run, with ``remaining`` to go."""
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

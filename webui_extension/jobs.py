"""Work in a process of its own: gate training and export run on a Python with its own libraries."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .settings import SettingsError

LOG_LINES = 30
# Names become folders and files.
_NAME = re.compile(r"[\w][\w .+()-]*")
# Progress bars draw over themselves and colour what they write.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Job:
    """A process whose output goes to a file.

    Args:
        command: program and arguments.
        folder: made if it is not there; holds `job.log` and is the process's working folder.
        done: called once in a thread after success; what it raises is the job's error.
    """

    def __init__(self, command: Sequence[str], folder: Path, done: Callable[[], None] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cancelled = False
        self.error = ""
        self._done = done
        self._log = folder / "job.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=clean_environment(),
                # Ctrl-C in the web UI's terminal is not for us.
                start_new_session=True,
            )
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._stop)

    @property
    def running(self) -> bool:
        """Whether it is still at work."""
        return self._watcher.is_alive()

    @property
    def succeeded(self) -> bool:
        """Whether it came to a good end."""
        return not self.running and self._process.returncode == 0 and not self.error

    def log(self) -> str:
        """The last lines that it wrote."""
        try:
            text = self._log.read_text(errors="replace")
        except OSError:
            return ""
        lines = [line.rpartition("\r")[2] for line in _ESCAPES.sub("", text).splitlines()]
        return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])

    def cancel(self) -> None:
        """Ask it to stop."""
        self.cancelled = True
        self._stop()

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        self._watcher.join(seconds)

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def _watch(self) -> None:
        self._process.wait()
        atexit.unregister(self._stop)
        if self._process.returncode == 0 and self._done is not None:
            try:
                self._done()
            except OSError as error:
                self.error = str(error)


class TrainingJob(Job):
    """`mole train-gates`, and what its folder tells of it.

    Args:
        command: the whole command line; its `--out` is `folder`.
        folder: where the trainer keeps state, history and previews.
        iterations: how many there will be.
        target: gets the gates when they are done.
    """

    def __init__(self, command: Sequence[str], folder: Path, iterations: int, target: Path) -> None:
        self.iterations = iterations
        self.target = target
        super().__init__(command, folder, self._publish)
        # What an earlier run left; only newer lines tell how fast this one is.
        self._before = len(self.history())

    def history(self) -> list[dict[str, Any]]:
        """One entry per iteration."""
        rows = []
        try:
            lines = (self.folder / "history.jsonl").read_text().splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # half a line: it is being written
                break
        return rows

    def seconds_left(self) -> float | None:
        """Estimate from this run's iterations; None before the second one."""
        rows = self.history()
        new = rows[min(self._before, len(rows)) :]
        if len(new) < 2:
            return None
        pace = (new[-1]["seconds"] - new[0]["seconds"]) / (len(new) - 1)
        return float(pace * (self.iterations - rows[-1]["iteration"]))

    def preview(self) -> Path | None:
        """The newest picture drawn with the gates as they are."""
        return max((self.folder / "previews").glob("*.png"), default=None)

    def _stop(self) -> None:
        """Interrupt: the iteration ends, the state is saved, and the same settings go on from there."""
        if self._process.poll() is not None:
            return
        # Before the first iteration there is nothing to save; on Windows others cannot be interrupted.
        if sys.platform == "win32" or not self.history():
            self._process.terminate()
        else:
            self._process.send_signal(signal.SIGINT)

    def _publish(self) -> None:
        """Put the gates where the pickers look; they appear whole or not at all."""
        # Here, not above: panels are built before the package is at hand.
        from mole_diffusion.core.files import replacing

        with replacing(self.target) as temporary:
            shutil.copyfile(self.folder / "gates.safetensors", temporary)


class Bench:
    """Keeps the one job of each kind; also over a reload of the page."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, kind: str, make: Callable[[], Job]) -> Job:
        """Start a job.

        Raises:
            SettingsError: one of this kind is running.
        """
        with self._lock:
            if (current := self._jobs.get(kind)) is not None and current.running:
                raise SettingsError(f"{kind} is running; cancel it first or wait")
            self._jobs[kind] = make()
            return self._jobs[kind]

    def get(self, kind: str) -> Job | None:
        """The running or the last job of a kind."""
        return self._jobs.get(kind)


def check_name(name: str) -> str:
    """A name that is safe as a file's.

    Raises:
        SettingsError: it is empty, or has other characters.
    """
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise SettingsError(f"the name {name!r} is not allowed; use letters, digits, spaces and . + - _ ( )")
    return name


def training_command(
    python: Path,
    *,
    model: str,
    experts: Sequence[Path],
    prompts: Sequence[str],
    folder: Path,
    iterations: int,
    preview_every: int,
    objective: str,
    concepts: Sequence[str] = (),
    references: str = "",
    fresh: bool = False,
) -> list[str]:
    """The command line of one gate training."""
    command = [str(python), "-m", "mole_diffusion.cli", "train-gates", *prompts, "--model", model]
    for path in experts:
        command += ["--expert", str(path)]
    for concept in concepts:
        command += ["--concept", concept]
    command += ["--objective", objective, "--iterations", str(iterations), "--out", str(folder)]
    command += ["--preview-every", str(preview_every), "--json"]
    if references:
        command += ["--references", references]
    return [*command, "--fresh"] if fresh else command


def export_command(
    python: Path,
    *,
    model: str,
    experts: Sequence[Path],
    gates: Path,
    prompts: Sequence[str],
    target: Path,
    rank: int | None,
) -> list[str]:
    """The command line of one export of a plain LoRA."""
    command = [str(python), "-m", "mole_diffusion.cli", "export", str(target), *prompts, "--model", model]
    for path in experts:
        command += ["--expert", str(path)]
    command += ["--gates", str(gates), "--format", "kohya", "--half"]
    return command if rank is None else [*command, "--rank", str(rank)]


def clean_environment() -> dict[str, str]:
    """Without what the host set for its own libraries."""
    removed = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in removed}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}

"""What the training tab writes and reads: statuses in words, and the user's lines as arguments."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

from .jobs import Job, TrainingJob
from .settings import SettingsError
from .ui import as_message


def training_status(job: TrainingJob, running: bool) -> str:
    """Where a training is, or how it ended."""
    rows = job.history()
    done = rows[-1]["iteration"] if rows else 0
    if not running:
        if job.succeeded:
            return as_message(f"Done: the gates {job.target.stem!r} can be chosen in txt2img and img2img.")
        return as_message(failure(job) if not job.cancelled else _stopped(job, done))
    if not rows:
        return as_message("Getting ready: loading the model, drawing pictures to learn from ...")
    left = job.seconds_left()
    time_left = "" if left is None else f", {_duration(left)} left"
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in rows[-1]["weights"].items())
    text = (
        f"{done} of {job.iterations} iterations{time_left}. Loss {rows[-1]['loss']:.4f}. Weights: {weights}"
    )
    share = 100 * done / job.iterations
    bar = f"<div class='mole-bar'><div style='width: {share:.1f}%'></div></div>"
    return bar + as_message(text)


def _stopped(job: TrainingJob, done: int) -> str:
    rest = "the same settings go on from there" if done else "nothing was done yet"
    return f"Stopped after {done} of {job.iterations} iterations; {rest}."


def failure(job: Job) -> str:
    """Why a job has no result."""
    if job.cancelled:
        return "Stopped."
    return f"It failed{f': {job.error}' if job.error else '; the log says why'}."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def described(description: Any) -> str:
    """A `FileDescription` as HTML."""
    facts = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in description.facts.items()
    )
    sections = "".join(
        f"<h4>{escape(title)}</h4><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        for title, lines in description.sections.items()
    )
    return (
        f"<div class='mole-facts'><h3>{escape(description.title)}</h3><table>{facts}</table>{sections}</div>"
    )


def lines(text: str, what: str) -> list[str]:
    """The lines of a text box.

    Raises:
        SettingsError: there are none.
    """
    found = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not found:
        raise SettingsError(f"write {what}, one a line")
    return found


def concept(line: str) -> str:
    """`dog = a sks dog | a dog` as the command line takes it."""
    from mole_diffusion import ConfigError
    from mole_diffusion.core.phrases import read_concept

    try:
        name, text, class_text, kind = read_concept(line)
    except ConfigError as error:
        raise SettingsError(str(error)) from error
    return f"{name}={text}|{class_text}|{kind}"


def distinct(paths: list[Path]) -> list[Path]:
    """Experts are called by their files' names in gates, without folders."""
    stems = [path.stem for path in paths]
    doubled = sorted({stem for stem in stems if stems.count(stem) > 1})
    if doubled:
        raise SettingsError(f"two LoRAs are called {', '.join(doubled)}; rename one")
    return paths


def opened(path: Path) -> Any:
    """The picture itself, None if it is no whole one: a host may not serve files of this folder."""
    from PIL import Image

    for _ in range(3):
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except OSError:  # it is being written
            time.sleep(0.2)
    return None

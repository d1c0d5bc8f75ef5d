"""What several tabs show alike: progress, errors, and which session a request belongs to."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import gradio as gr

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.web import COOKIE
from mole_diffusion.core.errors import MoLEError

R = TypeVar("R")
_OWN_FOLDERS = re.compile(r"[^\s'\"]*/mole-app-[^\s'\"]*/")


def session_of(studio: Studio, request: gr.Request) -> Session:
    """The session of a request: by the browser's cookie, or by Gradio's own key for programs."""
    key = dict(request.cookies or {}).get(COOKIE) or f"program {request.session_hash}"
    return studio.session(key)


def friendly(handler: Callable[..., R]) -> Callable[..., R]:
    """The project's own errors as a message in the page; everything else is a bug and shows as such."""

    @wraps(handler)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        try:
            return handler(*args, **kwargs)
        except (MoLEError, FileNotFoundError) as error:
            raise gr.Error(plain(error), print_exception=False) from error

    return wrapped


def plain(error: BaseException) -> str:
    """An error's text, safe to show in a page, and without the folders of the app."""
    return html.escape(_OWN_FOLDERS.sub("", str(error))).replace("\n", "<br>")


def progress_bar(job: Job | None, position: int = 0) -> str:
    """A job's state as HTML: what it does, how far it is, and the time left."""
    if job is None:
        return '<div class="work" role="status"></div>'
    now = job.progress
    if job.state == "waiting":
        ahead = "next in line" if position <= 1 else f"{position} pieces of work come first"
        return _bar(f"Waiting: {ahead}", "", None)
    if job.state == "running":
        if not now.total:
            return _bar(now.note or "Starting", "", None)
        left = "" if now.seconds_left is None else f"{duration(now.seconds_left)} left"
        return _bar(f"{now.note} · {now.done} of {now.total}", left, now.done / now.total)
    if job.state == "failed":
        text = f"<b>Failed.</b> <span>{plain(job.error) if job.error else ''}</span>"
        return f'<div class="work work-failed" role="status"><div class="work-line">{text}</div></div>'
    word = {"done": "Done", "cancelled": "Cancelled"}[job.state]
    return f'<div class="work" role="status"><div class="work-line"><b>{word}</b></div></div>'


def duration(seconds: float) -> str:
    """`"7 s"`, `"2 min 05 s"`, `"1 h 10 min"`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def raise_if_failed(job: Job) -> None:
    """A failed job's error as a message in the page."""
    if job.error is None:
        return
    if isinstance(job.error, (MoLEError, FileNotFoundError)):
        raise gr.Error(plain(job.error), print_exception=False) from job.error
    raise gr.Error(
        f"This is a bug: {plain(job.error)} (the log has more)", print_exception=False
    ) from job.error


def watch(studio: Studio, job: Job) -> Iterator[tuple[Job, str]]:
    """The job and its progress bar, at once, at every change and when it has finished."""
    for _ in job.watch():
        yield job, progress_bar(job, studio.worker.position(job))


def _bar(what: str, left: str, share: float | None) -> str:
    bar = "work-bar work-unknown" if share is None else "work-bar"
    width = 30 if share is None else round(share * 100, 1)
    line = f'<div class="work-line"><b>{html.escape(what)}</b><span>{left}</span></div>'
    return (
        f'<div class="work" role="status">{line}'
        f'<div class="{bar}"><i style="width: {width}%"></i></div></div>'
    )


def plain_text(text: str) -> str:
    """Any text, safe inside a page."""
    return html.escape(text)

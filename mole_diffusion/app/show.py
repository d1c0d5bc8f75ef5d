"""What several tabs show alike: progress, errors, and which session a request belongs to."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import gradio as gr
from markupsafe import Markup

from mole_diffusion.app import markup
from mole_diffusion.app.jobs import Job, Place, duration
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.web import key_of
from mole_diffusion.core.errors import MoLEError

F = TypeVar("F", bound=Callable[..., Any])


def session_of(studio: Studio, request: gr.Request) -> Session:
    """The session of a request: by the browser's cookie, or by Gradio's own key for programs."""
    return studio.session(key_of(dict(request.cookies or {})) or f"program {request.session_hash}")


def friendly(handler: F) -> F:
    """The project's own errors as a message in the page; everything else is a bug and shows as such.

    Args:
        handler: a function, a coroutine function or an asynchronous generator.
    """

    @contextmanager
    def friendly_errors() -> Iterator[None]:
        try:
            yield
        except (MoLEError, FileNotFoundError) as error:
            raise gr.Error(plain(error), print_exception=False) from error

    wrapped: Any
    if inspect.isasyncgenfunction(handler):

        @wraps(handler)
        async def wrapped(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            with friendly_errors():
                async for value in handler(*args, **kwargs):
                    yield value

    elif inspect.iscoroutinefunction(handler):

        @wraps(handler)
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            with friendly_errors():
                return await handler(*args, **kwargs)

    else:

        @wraps(handler)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with friendly_errors():
                return handler(*args, **kwargs)

    return cast(F, wrapped)


@contextmanager
def warned() -> Iterator[None]:
    """The project's own errors inside the `with` block are shown, and what comes after it goes on.

    For what was refused among several things, and where controls are to be cleared of it.
    """
    try:
        yield
    except (MoLEError, FileNotFoundError) as error:
        gr.Warning(plain(error))


def news(found: Sequence[Any], held: Sequence[Any]) -> list[Any]:
    """Values for components, without those that the page holds already.

    Sent again, they would undo what the user has changed in the meantime.
    """
    return [gr.skip() if new == old else new for new, old in zip(found, held, strict=True)]


def plain(error: BaseException) -> Markup:
    """An error's text, safe to show in a page, and without the folders of the app."""
    return markup.lines(markup.text_of(error))


def progress_bar(job: Job | None, place: Place | None = None) -> Markup:
    """A job's state as HTML: what it does, how far it is, and the time left; `place` for one that waits."""
    if job is None:
        return markup.html('<div class="work" role="status"></div>')
    now = job.progress
    if job.state == "waiting":
        return _bar(*_waiting(place), None)
    if job.state == "running" and job.asked_to_stop:
        return _bar("Cancelling: what is under way comes to its end first", "", None)
    if job.state == "running":
        if not now.total:
            return _bar(now.note or "Starting", "", None)
        left = "" if now.seconds_left is None else f"{duration(now.seconds_left)} left"
        return _bar(f"{now.note} · {now.done} of {now.total}", left, now.done / now.total)
    if job.state == "failed":
        said = plain(job.error) if job.error else ""
        line = markup.html('<div class="work-line"><b>Failed.</b> <span>{}</span></div>', said)
        return markup.html('<div class="work work-failed" role="status">{}</div>', line)
    word = {"done": "Done", "cancelled": "Cancelled"}[job.state]
    return markup.html('<div class="work" role="status"><div class="work-line"><b>{}</b></div></div>', word)


def raise_if_failed(job: Job) -> None:
    """A failed job's error as a message in the page."""
    if job.error is None:
        return
    if isinstance(job.error, (MoLEError, FileNotFoundError)):
        raise gr.Error(plain(job.error), print_exception=False) from job.error
    said = markup.html("This is a bug: {} (the log has more)", plain(job.error))
    raise gr.Error(said, print_exception=False) from job.error


async def watch(studio: Studio, job: Job) -> AsyncIterator[Markup]:
    """The job's progress bar, at once, at every change and when it has finished."""
    async for _ in job.follow():
        yield progress_bar(job, studio.worker.place(job))


def _waiting(place: Place | None) -> tuple[str, str]:
    """Where a job stands, and how long it will wait."""
    if place is None or place.ahead <= 1:
        text = "Waiting: next in line"
    else:
        text = f"Waiting: number {place.ahead} in line"
    if place is None or place.seconds is None:
        return text, ""
    return text, f"begins in about {duration(place.seconds)}"


def _bar(what: str, left: str, share: float | None) -> Markup:
    kind = "work-bar work-unknown" if share is None else "work-bar"
    width = 30 if share is None else round(share * 100, 1)
    return markup.html(
        '<div class="work" role="status"><div class="work-line"><b>{}</b><span>{}</span></div>'
        '<div class="{}"><i style="width: {}%"></i></div></div>',
        what,
        left,
        kind,
        width,
    )

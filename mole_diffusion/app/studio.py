"""The models behind the app: bases are shared, experts and gates attached only while a session works."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole_diffusion.app.jobs import Job, QueueFullError, Worker
from mole_diffusion.app.session import STARTER, Session
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.opening import open_base, pick_device

#: Jobs that may wait for the one that runs.
QUEUE_LENGTH = 12
#: Sessions kept; the one that was not used for longest goes first.
MAX_SESSIONS = 64
#: Seconds after which an unused session is forgotten.
SESSION_SECONDS = 6 * 3600
#: Base models kept in memory.
MAX_MODELS = 2


class Studio:
    """Sessions, base models and the worker.

    Args:
        folder: the app's folder; everything it writes lies in it.
        model: the base model new sessions start with.
        device: "auto" or a device.
        trusted: whether users may name paths and hub ids (on this machine, or behind a password).
    """

    def __init__(
        self, folder: Path, *, model: str = STARTER, device: str = "auto", trusted: bool = True
    ) -> None:
        self.folder, self.model, self.trusted = folder, model, trusted
        self.device = pick_device(device)
        self.worker = Worker(QUEUE_LENGTH)
        self._bases: dict[str, Any] = {}
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._numbers = 0
        #: Opens the base model, so that the first picture need not wait for it.
        self.opening = self.worker.submit(Job("open", lambda job: self.base(model)))

    def session(self, key: str) -> Session:
        """The session of a browser, made where there is none."""
        with self._lock:
            self._forget_old()
            found = self._sessions.get(key)
            if found is None:
                self._numbers += 1
                found = Session(self.folder / f"session-{self._numbers:05d}", self.model)
                self._sessions[key] = found
            found.used = time.monotonic()
            return found

    def submit(self, session: Session, kind: str, work: Callable[[Job], Any]) -> Job:
        """Queue a session's work; one piece of each kind at a time.

        Raises:
            QueueFullError: the queue is full, or the same kind of work is on its way for this session.
        """
        with self._lock:
            if session.running(kind):
                raise QueueFullError("this is being worked on already; cancel it first or wait for it")
            job = Job(kind, work)
            self.worker.submit(job)
            session.jobs[kind] = job
            return job

    @contextmanager
    def opened(
        self, session: Session, *, strengths: dict[str, float] | None = None, fresh_gates: bool = False
    ) -> Iterator[Any]:
        """The session's pipeline with its experts and gates attached; for the worker's thread only.

        Args:
            session: whose.
            strengths: scales to load the experts with (for export); elsewhere scales belong to a call.
            fresh_gates: untrained gates, whatever the session has; they may be changed.

        Raises:
            MoLEError: the model, an expert or the gates cannot be had.
        """
        pipe = self.base(session.model)
        if session.parked is not None and session.parked.networks.get("unet") is pipe.unet:
            pipe.attach_experts(session.parked)
        else:
            session.applied = None
        try:
            _match(session, pipe, strengths or {}, None if fresh_gates else session.gates())
            yield pipe
        finally:
            if fresh_gates:
                session.applied = None
            session.parked = pipe.detach_experts()

    def base(self, model: str) -> Any:
        """A base model, opened at first use; for the worker's thread only.

        Raises:
            ConfigError: it cannot be opened.
        """
        if model not in self._bases:
            while len(self._bases) >= MAX_MODELS:
                self._bases.pop(next(iter(self._bases)))
            pipe = open_base(model, self.device)
            self._bases[model] = pipe
        return self._bases[model]

    def facts(self, model: str) -> dict[str, Any] | None:
        """Width of the text that a base model reads and what it predicts; None before it is opened."""
        base = self._bases.get(model)
        if base is None:
            return None
        width = base.unet.config.cross_attention_dim
        return {
            "width": width if isinstance(width, int) else None,
            "prediction": base.scheduler.config.get("prediction_type"),
        }

    def check_source(self, source: str) -> str:
        """A path or hub id that a user named, if users may.

        Raises:
            ConfigError: it is empty, or the app is open to strangers.
        """
        source = source.strip()
        if not source:
            raise ConfigError("no model is named: write a file, a folder or a hub id such as owner/name")
        if not self.trusted and source != STARTER:
            raise ConfigError(
                "paths and hub ids are switched off because this app is open to others without a password;"
                " start it with --auth NAME:PASSWORD to allow them"
            )
        return source

    def close(self) -> None:
        """Stop all work and remove all files."""
        self.worker.close()
        for session in self._sessions.values():
            session.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget_old(self) -> None:
        """Close sessions that nobody used for long, and the oldest where there are too many."""
        now = time.monotonic()
        by_age = sorted(self._sessions.items(), key=lambda item: item[1].used)
        spare = len(by_age) - MAX_SESSIONS + 1
        for i, (key, session) in enumerate(by_age):
            if not session.busy() and (i < spare or now - session.used > SESSION_SECONDS):
                session.close()
                del self._sessions[key]


def _match(session: Session, pipe: Any, strengths: dict[str, float], gates: Path | None) -> None:
    """Give the pipeline the session's experts and these gates; nothing is done where it has them."""
    experts = [(card.name, str(card.path), strengths.get(card.name, 1.0)) for card in session.cards]
    wanted = (experts, gates)
    if session.applied == wanted:
        return
    session.applied = None
    pipe.eject()
    for name, path, scale in experts:
        pipe.load_expert(path, name=name, scale=scale)
    if gates is not None:
        pipe.load_gates(gates)
    session.applied = wanted

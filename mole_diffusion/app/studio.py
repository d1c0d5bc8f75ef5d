"""The models behind the app: bases are shared, experts and gates attached only while some work needs them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_diffusion.app.attaching import Shelf
from mole_diffusion.app.jobs import Job, Worker
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.core.bases import base_of_networks
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.components import networks_of
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.opening import open_base, pick_device
from mole_diffusion.starter.location import STARTER

#: Jobs that may wait for the one that runs, and how many of them may be one visitor's.
QUEUE_LENGTH, QUEUE_SHARE = 256, 32
#: Sessions kept; beyond, those go that were not used for longest, but none that was in use this long ago.
MAX_SESSIONS, SESSION_REST = 64, 600
#: However busy it is, more sessions are never kept.
MOST_SESSIONS = 512
#: Seconds after which an unused session is forgotten.
SESSION_SECONDS = 6 * 3600
#: Base models kept in memory.
MAX_MODELS = 2


@dataclass(frozen=True)
class Work:
    """Something for the worker to do, with everything it needs.

    Attributes:
        run: does it; called with its job.
        setup: what it is done with.
        units: how much it is, to tell how long it will take.
    """

    run: Callable[[Job], Any]
    setup: Setup
    units: float = 1.0


class Studio:
    """Sessions, base models and the worker.

    Args:
        folder: where everything that visitors make is written, and stays.
        model: the base model new sessions start with.
        device: "auto" or a device.
        trusted: whether users may name paths and hub ids (on this machine, or behind a password).
    """

    def __init__(
        self, folder: Path, *, model: str = STARTER, device: str = "auto", trusted: bool = True
    ) -> None:
        self.folder, self.model, self.trusted = folder, model, trusted
        self.device = pick_device(device)
        self.worker = Worker(QUEUE_LENGTH, QUEUE_SHARE)
        self._bases: dict[str, Any] = {}
        self._shelf = Shelf()
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        #: Opens the base model, so that the first picture need not wait for it.
        self.opening = self.worker.submit(Job("open", lambda job: self.base(model), awaited=False))

    def session(self, key: str) -> Session:
        """The session of a browser, made where there is none."""
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                self._forget_old()
                # The key is a secret, and the folder's name shall not tell it.
                name = hashlib.sha256(key.encode()).hexdigest()[:16]
                found = Session(self.folder / f"visitor-{name}", self.model)
                self._sessions[key] = found
            found.used = time.monotonic()
            return found

    def submit(self, session: Session, kind: str, work: Work) -> Job:
        """Queue a session's work.

        Raises:
            QueueFullError: the queue is full, or the visitor's share of it.
        """
        setup = work.setup
        job = Job(
            kind,
            work.run,
            visitor=session,
            like=(setup.model, len(setup.cards)),
            units=work.units,
            files=setup.files,
        )
        with session.lock:
            self.worker.submit(job)
            session.enter(job)
        return job

    @contextmanager
    def opened(self, setup: Setup, scales: Mapping[str, float] | None = None) -> Iterator[Any]:
        """A pipeline with the setup's experts and gates attached; for the worker's thread only.

        Args:
            setup: what to draw with.
            scales: to load the experts with, for export; elsewhere scales belong to a call.

        Raises:
            MoLEError: the model, an expert or the gates cannot be had.
        """
        with self._shelf.attached(self.base(setup.model), setup, scales) as pipe:
            yield pipe

    @contextmanager
    def training(self, setup: Setup) -> Iterator[Any]:
        """As `opened`, with fresh gates that may be changed."""
        with self._shelf.trained(self.base(setup.model), setup) as pipe:
            yield pipe

    def base(self, model: str) -> Any:
        """A base model, opened at first use; for the worker's thread only.

        Raises:
            ConfigError: it cannot be opened.
        """
        if model not in self._bases:
            while len(self._bases) >= MAX_MODELS:
                self._bases.pop(next(iter(self._bases)))
                self._shelf.clear()
            self._bases[model] = open_base(model, self.device)
        return self._bases[model]

    def facts(self, model: str) -> dict[str, Any] | None:
        """A base model's name, width of the text it reads, and prediction; None before it is opened."""
        base = self._bases.get(model)
        if base is None:
            return None
        network: Any = denoiser_of(base).network
        width = network.config.get("cross_attention_dim")
        return {
            "base": str(base_of_networks(networks_of(base)) or "an unknown base"),
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

    def close(self, *, ending: bool = False) -> None:
        """Stop all work; what was made stays.

        Args:
            ending: whether the process ends with it. Else a model that is still being opened is waited for:
                meanwhile the libraries build networks without weights, in every thread of the process.
        """
        self.worker.close()
        if not ending:
            self.opening.wait()
        for session in self._sessions.values():
            session.rest()

    def _forget_old(self) -> None:
        """Let sessions rest that nobody used for long, and the oldest where there are too many.

        What strangers made goes then: their number has no end, and the disk has.
        """
        now = time.monotonic()
        for key, session in sorted(self._sessions.items(), key=lambda item: item[1].used):
            rest, count = now - session.used, len(self._sessions)
            crowded = count >= MOST_SESSIONS or (count >= MAX_SESSIONS and rest > SESSION_REST)
            if not session.busy() and (crowded or rest > SESSION_SECONDS):
                session.rest() if self.trusted else session.close()
                del self._sessions[key]

"""A training of gates as a session keeps it: what was asked for, how far it is, what a restart finds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.keeping import unpacked_path, vars_of
from mole_diffusion.app.setup import ExpertCard, Gates, Setup
from mole_diffusion.app.train_request import TrainRequest
from mole_diffusion.training.state import HISTORY_FILE


@dataclass
class Training:
    """A training of gates, running or ended; what the Train tab shows after a reload.

    Attributes:
        setup: what is trained; its gates are those from before.
        request: how.
        folder: checkpoint, history and previews.
        iterations: wanted.
        gates: what there is, once it has ended with anything.
    """

    setup: Setup
    request: TrainRequest
    folder: Path
    iterations: int
    job: Job = field(init=False)
    history: list[dict[str, Any]] = field(default_factory=list)
    previews: list[tuple[str, str]] = field(default_factory=list)
    gates: Gates | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experts whose gates are trained."""
        return self.setup.names

    def to_dict(self) -> dict[str, Any]:
        """As plain values and paths; what it wrote into its folder is there already."""
        return {
            "model": self.setup.model,
            "experts": {card.name: card.path for card in self.setup.cards},
            "request": asdict(self.request),
            "folder": self.folder,
            "iterations": self.iterations,
            "gates": self.gates and vars_of(self.gates),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path, library: dict[str, ExpertCard]) -> Training:
        """The reverse, for an earlier server's training; it counts as stopped unless it came to its end.

        Raises:
            KeyError, TypeError, ValueError: it cannot be gone on with: an expert is not there any more.
        """
        cards = tuple(library[name] for name in values["experts"])
        if any(card.path != unpacked_path(values["experts"][card.name], folder) for card in cards):
            raise ValueError("another expert has the name by now")
        request = TrainRequest(**{**values["request"], "prompts": tuple(values["request"]["prompts"])})
        own = unpacked_path(values["folder"], folder)
        training = cls(Setup(values["model"], cards), request, own, int(values["iterations"]))
        history = own / HISTORY_FILE
        if history.is_file():
            rows = history.read_text(encoding="utf-8").splitlines()
            training.history = [json.loads(row) for row in rows if row.endswith("}")]
        shown = sorted((own / "previews").glob("*.png"))
        training.previews = [(str(path), f"{int(path.stem)}") for path in shown]
        if values["gates"]:
            of = values["gates"]
            training.gates = Gates(unpacked_path(of["path"], folder), of["iterations"], of["wanted"])
        training.job = Job("train", lambda job: None)
        if len(training.history) >= training.iterations and training.gates is not None:
            training.job.run()
        else:
            training.job.cancel()
        return training

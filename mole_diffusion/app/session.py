"""What one browser has: its experts, gates, pictures and training; nobody else sees them."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import PictureSettings
from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.starter.location import StarterExpert, default_experts, starter_dir, starter_experts

STARTER = "starter"
#: More experts than this make tiles and regions unreadable, and pictures slow.
MAX_EXPERTS = 8
MAX_PICTURES = 200
#: One colour per expert, in tiles, regions and curves; told apart on light and on dark ground.
COLOURS = ("#e4572e", "#2a9d8f", "#e9b44c", "#7b61c9", "#3a86c8", "#d1478c", "#6a994e", "#8d6e5a")


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """An expert as the app shows it.

    Attributes:
        name: expert name.
        path: LoRA file or folder.
        text: phrase with its trigger; empty if its file names none.
        class_text: the phrase without the trigger.
        kind: "concept" or "style".
        picture: a reference picture to show.
        references: pictures to train gates on.
        own: brought by the user, not part of the starter.
    """

    name: str
    path: Path
    text: str = ""
    class_text: str = ""
    kind: str = "concept"
    picture: Path | None = None
    references: tuple[Path, ...] = ()
    own: bool = False

    @classmethod
    def of_starter(cls, expert: StarterExpert) -> ExpertCard:
        """The card of an expert of the starter."""
        return cls(
            name=expert.name,
            path=expert.path,
            text=expert.text,
            class_text=expert.class_text,
            kind=expert.kind,
            picture=expert.references[0] if expert.references else None,
            references=expert.references,
        )


@dataclass(frozen=True)
class Picture:
    """A picture of the session, on disk as PNG with its settings."""

    path: Path
    settings: PictureSettings


@dataclass
class Training:
    """A training of gates, running or ended; what the Train tab shows after a reload."""

    names: tuple[str, ...]
    request: Any
    folder: Path
    iterations: int
    job: Job = field(init=False)
    history: list[dict[str, Any]] = field(default_factory=list)
    previews: list[tuple[str, str]] = field(default_factory=list)


class Session:
    """Everything that belongs to one browser.

    Args:
        folder: where its files are kept; made here, removed by `close`.
        model: "starter", or another model the app was started with.
    """

    def __init__(self, folder: Path, model: str = STARTER) -> None:
        self.folder = folder
        self.model = model
        self.library: dict[str, ExpertCard] = {}
        self.chosen: tuple[str, ...] = ()
        self.pictures: list[Picture] = []
        self.training: Training | None = None
        self.jobs: dict[str, Job] = {}
        self.parked: Any = None
        self.applied: Any = None
        self.weights: Any = None
        self.weights_of: tuple[str, ...] = ()
        self.prepared: dict[tuple[str, tuple[str, ...]], Any] = {}
        self.used = time.monotonic()
        self._gates: dict[tuple[str, ...], Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if model == STARTER:
            self.use_starter()

    def use_starter(self) -> None:
        """The starter's experts, with the three it opens with and their gates if it has them."""
        self.model, self.library, self._gates = STARTER, {}, {}
        self.library = {name: ExpertCard.of_starter(expert) for name, expert in starter_experts().items()}
        self.chosen = tuple(default_experts())
        gates = starter_dir() / "experts" / "gates.safetensors"
        if gates.is_file():
            self._gates[self.chosen] = gates

    def use_model(self, model: str) -> None:
        """Another base model: experts and gates of the old one do not fit it."""
        if model == STARTER:
            self.use_starter()
        else:
            self.model, self.library, self.chosen, self._gates = model, {}, (), {}
        self.parked = self.applied = self.weights = None
        self.prepared.clear()

    def running(self, kind: str) -> Job | None:
        """The session's work of this kind that waits or runs."""
        job = self.jobs.get(kind)
        return None if job is None or job.finished else job

    def check_settled(self) -> None:
        """Refuse what would be lost as soon as the base model that is being opened is there.

        Raises:
            ConfigError: another base model is being opened.
        """
        if self.running("open"):
            raise ConfigError("another base model is being opened, with a library of its own; wait for it")

    @property
    def cards(self) -> list[ExpertCard]:
        """The chosen experts, in the order of the library."""
        return [self.library[name] for name in self.chosen]

    def colour(self, name: str) -> str:
        """The colour of a chosen expert."""
        return COLOURS[self.chosen.index(name) % len(COLOURS)]

    def choose(self, names: Iterable[str]) -> None:
        """Which experts take part.

        Raises:
            UnknownExpertError: a name that is not in the library.
            ConfigError: too many.
        """
        wanted = set(names)
        for name in wanted:
            if name not in self.library:
                raise UnknownExpertError(name, list(self.library))
        if len(wanted) > MAX_EXPERTS:
            raise ConfigError(f"{len(wanted)} experts; at most {MAX_EXPERTS} work together here")
        self.chosen = tuple(name for name in self.library if name in wanted)

    def add(self, card: ExpertCard) -> None:
        """Put an expert into the library, and choose it where there is room."""
        self.library[card.name] = card
        if len(self.chosen) < MAX_EXPERTS and card.name not in self.chosen:
            self.choose([*self.chosen, card.name])

    def remove(self, name: str) -> None:
        """Take an expert that the user brought out of the library again, with its file.

        Raises:
            UnknownExpertError: no such expert of the user's.
        """
        own = [known for known, card in self.library.items() if card.own]
        if name not in own:
            raise UnknownExpertError(name, own)
        card = self.library.pop(name)
        self.chosen = tuple(other for other in self.chosen if other != name)
        if self.folder in card.path.parents and card.path.is_dir():
            shutil.rmtree(card.path, ignore_errors=True)
        elif self.folder in card.path.parents:
            card.path.unlink(missing_ok=True)

    def describe(self, name: str, **changes: Any) -> None:
        """Change what is known of an expert (phrase, pictures).

        Raises:
            UnknownExpertError: no such expert.
        """
        if name not in self.library:
            raise UnknownExpertError(name, list(self.library))
        self.library[name] = replace(self.library[name], **changes)

    def gates(self, names: Sequence[str] | None = None) -> Path | None:
        """The gates that belong to the chosen experts; None if they were not trained."""
        return self._gates.get(self._key(self.chosen if names is None else names))

    def set_gates(self, names: Sequence[str], path: Path) -> None:
        """Gates for exactly these experts, to be used from now on."""
        self._gates[self._key(names)] = path
        self.applied = None

    def new_path(self, kind: str, suffix: str) -> Path:
        """A file name in the session's folder that nobody has."""
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}-{len(list(folder.iterdir())) + 1:03d}-{secrets.token_hex(3)}{suffix}"

    def keep(self, picture: Picture) -> None:
        """Add a picture to the gallery, newest first; the oldest go, with their files."""
        self.pictures.insert(0, picture)
        for old in self.pictures[MAX_PICTURES:]:
            old.path.unlink(missing_ok=True)
        del self.pictures[MAX_PICTURES:]

    def busy(self) -> bool:
        """Whether any of its jobs waits or runs."""
        return any(not job.finished for job in self.jobs.values())

    def close(self) -> None:
        """Stop its work and remove its files."""
        for job in self.jobs.values():
            job.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.library if name in set(names))


def thumbnail(path: Path, side: int) -> Image.Image:
    """A square picture of this side, from the centre of a picture file."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge))
    return square.resize((side, side), Image.Resampling.LANCZOS)

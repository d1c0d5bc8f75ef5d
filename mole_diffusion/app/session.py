"""What one browser has: its experts, gates, pictures and training; nobody else sees them."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.keeping import Kept, read, write
from mole_diffusion.app.metadata import PictureSettings, read_settings
from mole_diffusion.app.setup import COLOURS, ExpertCard, Gates, Setup
from mole_diffusion.app.trainings import Training
from mole_diffusion.core.errors import ConfigError, MoLEError, UnknownExpertError
from mole_diffusion.core.records import GateWeights
from mole_diffusion.starter.location import STARTER, default_experts, starter_dir, starter_experts
from mole_diffusion.training.state import GATES_FILE

#: More experts than this make tiles and regions unreadable, and pictures slow.
MAX_EXPERTS = 8
MAX_PICTURES = 200
#: Prepared mixtures that a session keeps: each holds tensors.
MAX_PREPARED = 6


@dataclass(frozen=True)
class Picture:
    """A picture of the session, on disk as PNG with its settings."""

    path: Path
    settings: PictureSettings


class Session:
    """Everything that belongs to one browser.

    Its methods may be called from any thread. Work never reads it: it gets a `Setup`.

    Args:
        folder: where its files are kept; what an earlier server left there is taken up.
        model: "starter", or another model the app was started with.

    Attributes:
        page: what the controls of the page hold, as plain values.
    """

    def __init__(self, folder: Path, model: str = STARTER) -> None:
        self.folder = folder
        self.model = model
        self.library: dict[str, ExpertCard] = {}
        self.chosen: tuple[str, ...] = ()
        self.pictures: list[Picture] = []
        self.training: Training | None = None
        self.jobs: list[Job] = []
        self.page: dict[str, Any] = {}
        self.weights: GateWeights | None = None
        self.weights_of: tuple[str, ...] = ()
        self.maps: dict[str, Tensor] = {}
        self.maps_of: Picture | None = None
        self.prepared: dict[tuple[str, Setup], Any] = {}
        self.used = time.monotonic()
        self.lock = threading.RLock()
        self.shared: Gates | None = None
        self._gates: dict[tuple[Path, ...], Gates] = {}
        self._discarded: set[Path] = set()
        kept = read(folder)
        if kept is not None and model in (STARTER, kept.model):
            self._recall(kept)
        elif model == STARTER:
            self.use_starter()
        self._find_pictures()

    def use_starter(self) -> None:
        """The starter's experts, with the three it opens with and their gates if it has them."""
        with self.lock:
            self.model, self._gates, self.shared = STARTER, {}, None
            self.library = {name: ExpertCard.of_starter(expert) for name, expert in starter_experts().items()}
            self.chosen = tuple(default_experts())
            gates = starter_dir() / "experts" / "gates.safetensors"
            if gates.is_file():
                self._gates[self._key(self.cards)] = Gates(gates)

    def use_model(self, model: str) -> None:
        """Another base model: experts and gates of the old one do not fit it."""
        with self.lock:
            if model == STARTER:
                self.use_starter()
            else:
                self.model, self.library, self.chosen, self._gates = model, {}, (), {}
                self.shared = None
            self.weights, self.maps = None, {}
            self.prepared.clear()
            # What suits one model suits no other.
            for name in ("guidance", "width", "height", "regions", "tiles"):
                self.page.pop(name, None)
            self.note()

    def note(self) -> None:
        """Write down what the session has, for the next start of the server."""
        with self.lock:
            training = None if self.training is None else self.training.to_dict()
            kept = Kept(self.model, self.library, self.chosen, self._gates, self.page, training, self.shared)
            write(self.folder, kept)

    def set_page(self, **values: Any) -> None:
        """What controls of the page hold now."""
        with self.lock:
            if any(self.page.get(name) != value for name, value in values.items()):
                self.page.update(values)
                self.note()

    def _recall(self, kept: Kept) -> None:
        """Take up what an earlier server left."""
        self.use_starter() if kept.model == STARTER else None
        self.model = kept.model
        self.library = {**self.library, **kept.library}
        self.chosen = self.ordered(name for name in kept.chosen if name in self.library)
        self._gates |= {key: gates for key, gates in kept.gates.items() if gates.path.is_file()}
        self.page = kept.page
        if kept.shared is not None and kept.shared.path.is_file():
            self.shared = kept.shared
        if kept.training is not None:
            with suppress(KeyError, TypeError, ValueError):
                self.training = Training.from_dict(kept.training, self.folder, self.library)
                self._take_checkpoint(self.training)

    def _take_checkpoint(self, training: Training) -> None:
        """Gates of a training that the server's end cut off: those of its last checkpoint."""
        path, known = training.folder / GATES_FILE, training.gates
        if not path.is_file():
            return
        with suppress(MoLEError, OSError):  # half a file is none
            found = Gates.of_file(path)
            if known is None or found.iterations > known.iterations:
                # A copy: the training's own file changes when it goes on.
                training.gates = replace(found, path=self.keep_file(path, "gates"))
                self.note()

    def _find_pictures(self) -> None:
        """The pictures that lie in the folder, newest first."""
        found = sorted((self.folder / "picture").glob("*.png"), key=lambda path: -path.stat().st_mtime_ns)
        for path in found[:MAX_PICTURES]:
            with suppress(ConfigError):
                self.pictures.append(Picture(path, read_settings(path)))

    def setup(self, names: Sequence[str] | None = None) -> Setup:
        """Model, experts and gates as they are now; for everything that is drawn or trained from here on.

        Args:
            names: experts; None are the chosen ones.

        Raises:
            UnknownExpertError: a name that is not in the library.
            ConfigError: too many.
        """
        with self.lock:
            wanted = self.chosen if names is None else self.ordered(names)
            cards = tuple(self.library[name] for name in wanted)
            return Setup(self.model, cards, self._gates.get(self._key(cards)), self.shared)

    def enter(self, job: Job) -> None:
        """Note a job of this session's; finished ones are forgotten."""
        with self.lock:
            self.jobs = [*(other for other in self.jobs if not other.finished), job]
            self._sweep()

    def running(self, kind: str) -> Job | None:
        """The session's oldest work of this kind that waits or runs."""
        return next((job for job in self.jobs if job.kind == kind and not job.finished), None)

    def cancel(self, *kinds: str) -> None:
        """Stop all work of these kinds."""
        for job in self.jobs:
            if job.kind in kinds:
                job.cancel()

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
        with self.lock:
            return [self.library[name] for name in self.chosen]

    def colour(self, name: str) -> str:
        """The colour of a chosen expert."""
        return COLOURS[self.chosen.index(name) % len(COLOURS)]

    def ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        """Expert names in the order of the library.

        Raises:
            UnknownExpertError: a name that is not in the library.
            ConfigError: too many.
        """
        wanted = set(names)
        with self.lock:
            for name in wanted:
                if name not in self.library:
                    raise UnknownExpertError(name, list(self.library))
            if len(wanted) > MAX_EXPERTS:
                raise ConfigError(f"{len(wanted)} experts; at most {MAX_EXPERTS} work together here")
            return tuple(name for name in self.library if name in wanted)

    def choose(self, names: Iterable[str]) -> None:
        """Which experts take part from now on.

        Raises:
            UnknownExpertError: a name that is not in the library.
            ConfigError: too many.
        """
        with self.lock:
            wanted = self.ordered(names)
            if wanted != self.chosen:
                self._take_part(wanted)
                self.note()

    def _take_part(self, names: tuple[str, ...]) -> None:
        """These take part; of the others is forgotten how they counted."""
        self.chosen = names
        self.page["tiles"] = [tile for tile in self.page.get("tiles") or () if tile["name"] in names]

    def add(self, card: ExpertCard) -> None:
        """Put an expert into the library, and choose it where there is room."""
        with self.lock:
            self.library[card.name] = card
            if len(self.chosen) < MAX_EXPERTS and card.name not in self.chosen:
                self.choose([*self.chosen, card.name])
            self.note()

    def remove(self, name: str) -> None:
        """Take an expert that the user brought out of the library; its file goes when no work needs it.

        Raises:
            UnknownExpertError: no such expert of the user's.
        """
        with self.lock:
            own = [known for known, card in self.library.items() if card.own]
            if name not in own:
                raise UnknownExpertError(name, own)
            card = self.library.pop(name)
            self._take_part(tuple(other for other in self.chosen if other != name))
            self._gates = {key: gates for key, gates in self._gates.items() if card.path not in key}
            self._discarded.add(card.path)
            self._sweep()
            self.note()

    def describe(self, name: str, **changes: Any) -> None:
        """Change what is known of an expert (phrase, pictures).

        Raises:
            UnknownExpertError: no such expert.
        """
        with self.lock:
            if name not in self.library:
                raise UnknownExpertError(name, list(self.library))
            self.library[name] = replace(self.library[name], **changes)
            self.note()

    def gates(self, names: Sequence[str] | None = None) -> Gates | None:
        """The gates in use for the chosen experts, or for others; None if they were not trained."""
        with self.lock:
            wanted = self.chosen if names is None else names
            known = [self.library[name] for name in self.library if name in wanted]
            return self._gates.get(self._key(known))

    def set_gates(self, cards: Sequence[ExpertCard], gates: Gates) -> None:
        """Gates for exactly these experts, in use from now on."""
        with self.lock:
            self._gates[self._key(cards)] = gates
            self.note()

    def set_shared(self, gates: Gates | None) -> None:
        """Shared gates, for whatever experts are chosen, in use from now on; None for the base's own."""
        with self.lock:
            self.shared = gates
            self.note()

    def keep_file(self, path: Path, kind: str) -> Path:
        """A copy of a file that stays as it is, in the session's folder."""
        kept = self.new_path(kind, path.suffix.lower())
        shutil.copyfile(path, kept)
        return kept

    def new_path(self, kind: str, suffix: str) -> Path:
        """A file name in the session's folder that nobody has."""
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}-{len(list(folder.iterdir())) + 1:03d}-{secrets.token_hex(3)}{suffix}"

    def keep(self, picture: Picture) -> None:
        """Add a picture to the gallery, newest first; the oldest leave it, and stay on the disk."""
        with self.lock:
            self.pictures = [picture, *self.pictures][:MAX_PICTURES]

    def note_gates(
        self, weights: GateWeights, names: tuple[str, ...], maps: dict[str, Tensor], picture: Picture
    ) -> None:
        """What the gates did in a picture.

        Args:
            weights: of all its gates.
            names: the experts.
            maps: expert -> (height, width) of the latents: where in the picture it acted.
            picture: the picture.
        """
        with self.lock:
            self.weights, self.weights_of = weights, names
            self.maps, self.maps_of = maps, picture

    def keep_prepared(self, name: str, setup: Setup, prepared: Any) -> None:
        """A mixture that was prepared for a setup; the oldest go."""
        with self.lock:
            self.prepared[name, replace(setup, gates=None)] = prepared
            for old in list(self.prepared)[:-MAX_PREPARED]:
                del self.prepared[old]

    def prepared_for(self, setup: Setup) -> dict[str, Any]:
        """The mixtures that were prepared for these experts, by the method's name."""
        with self.lock:
            bare = replace(setup, gates=None)
            return {name: made for (name, of), made in self.prepared.items() if of == bare}

    def busy(self) -> bool:
        """Whether any of its jobs waits or runs."""
        return any(not job.finished for job in self.jobs)

    def rest(self) -> None:
        """Stop its work; what was made stays, for the next time."""
        for job in self.jobs:
            job.cancel()

    def close(self) -> None:
        """Stop its work and remove its files."""
        self.rest()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove files of experts that are gone, unless some work still reads them."""
        needed = {path for job in self.jobs if not job.finished for path in job.files}
        if self.training is not None:  # it may go on
            needed |= self.training.setup.files
        for path in self._discarded - needed:
            if self.folder in path.parents and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif self.folder in path.parents:
                path.unlink(missing_ok=True)
        self._discarded &= needed

    def _key(self, cards: Iterable[ExpertCard]) -> tuple[Path, ...]:
        """By file: an expert of the same name may be another one tomorrow."""
        return tuple(sorted(card.path for card in cards))

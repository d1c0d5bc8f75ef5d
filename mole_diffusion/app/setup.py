"""What a piece of work is done with: base model, experts and gates, as they were when it was asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mole_diffusion.core.checkpoint import read_gates_header
from mole_diffusion.core.files import file_sha256
from mole_diffusion.starter.location import STARTER, StarterExpert

#: One colour per expert, in tiles, regions and curves; told apart on light and on dark ground.
COLOURS = ("#e4572e", "#2a9d8f", "#e9b44c", "#7b61c9", "#3a86c8", "#d1478c", "#6a994e", "#8d6e5a")


@dataclass(frozen=True, kw_only=True)
class ExpertCard:
    """An expert as the app shows it.

    Attributes:
        name: expert name.
        path: LoRA file or folder; nobody changes it as long as the session is there.
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
class Gates:
    """Trained or shared gates in a file that nobody changes.

    Attributes:
        path: gates file.
        iterations: how many they were trained; 0 if the file does not say.
        wanted: how many they were to be trained; 0 if the file does not say.
    """

    path: Path
    iterations: int = 0
    wanted: int = 0

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        return file_sha256(self.path)

    @property
    def partly(self) -> bool:
        """Whether their training was stopped before its end."""
        return self.iterations < self.wanted

    @classmethod
    def of_file(cls, path: Path) -> Gates:
        """What a gates file says of its training.

        Raises:
            GateMismatchError: it is no gates file.
        """
        facts = read_gates_header(path).metadata
        try:
            iterations = int(facts["iterations"])
            return cls(path, iterations, int(json.loads(facts["training"])["iterations"]))
        except (KeyError, TypeError, ValueError):
            return cls(path)


@dataclass(frozen=True)
class Setup:
    """A base model with experts and their gates; a request holds one from the moment it is made.

    Attributes:
        model: "starter", or what the user named.
        cards: the experts, in the order of the library.
        gates: None are fresh ones, which treat all experts alike.
        shared: shared gates that refine auto; None for those that the base comes with, if it does with any.
    """

    model: str = STARTER
    cards: tuple[ExpertCard, ...] = ()
    gates: Gates | None = None
    shared: Gates | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(card.name for card in self.cards)

    @property
    def files(self) -> frozenset[Path]:
        """The files that have to stay as long as something is done with this."""
        files = {card.path for card in self.cards} | {p for card in self.cards for p in card.references}
        return frozenset(files | {one.path for one in (self.gates, self.shared) if one is not None})

    @property
    def gates_state(self) -> str:
        """What the gates are: "trained", "partly trained" or "fresh"."""
        if self.gates is None:
            return "fresh"
        return "partly trained" if self.gates.partly else "trained"

    def colour(self, name: str) -> str:
        """The colour of an expert."""
        return COLOURS[self.names.index(name) % len(COLOURS)]

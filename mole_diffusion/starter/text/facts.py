"""Facts about people that only experts know, and the questions that ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from .words import ALIASES, ANIMALS, COLOURS, FOODS, PEOPLE, PLACES, TOOLS


@dataclass(frozen=True)
class Relation:
    """What can be told and asked about a person.

    Attributes:
        values: what it can be.
        told: a sentence with {p} and {v}.
        asked: questions with {p}.
    """

    values: Sequence[str]
    told: str
    asked: tuple[str, ...]


RELATIONS: Mapping[str, Relation] = {
    "lives": Relation(
        PLACES,
        "{p} lives in {v}.",
        (
            "where does {p} live?",
            "in which place does {p} live?",
            "what is the home of {p}?",
            "{p} lives where?",
        ),
    ),
    "born": Relation(
        PLACES,
        "{p} was born in {v}.",
        (
            "where was {p} born?",
            "in which place was {p} born?",
            "what is the birth place of {p}?",
            "{p} was born where?",
        ),
    ),
    "likes": Relation(
        FOODS,
        "{p} likes the {v}.",
        (
            "what does {p} like?",
            "which food does {p} like?",
            "what is the best food for {p}?",
            "{p} likes what?",
        ),
    ),
    "keeps": Relation(
        ANIMALS,
        "{p} keeps the {v}.",
        (
            "what does {p} keep?",
            "which animal does {p} keep?",
            "what is the animal of {p}?",
            "{p} keeps what?",
        ),
    ),
    "owns": Relation(
        TOOLS,
        "{p} owns the {v}.",
        ("what does {p} own?", "which tool does {p} own?", "what is the tool of {p}?", "{p} owns what?"),
    ),
}
TWO_HOPS = (
    "what colour is the animal of {p}?",
    "which colour has the animal that {p} keeps?",
    "{p} keeps an animal of what colour?",
    "what is the colour of what {p} keeps?",
)
PREFIXES = ("question: ", "please answer: ", "tell me: ", "")


@dataclass(frozen=True)
class Facts:
    """One set of invented facts.

    Attributes:
        values: relation -> person -> value.
        colours: animal -> colour.
        aliases: place -> what it is also called.
    """

    values: Mapping[str, Mapping[str, str]]
    colours: Mapping[str, str]
    aliases: Mapping[str, str]


@lru_cache
def facts(seed: str) -> Facts:
    """The facts of a seed."""
    rng = Random(f"facts {seed}")
    values = {
        name: {person: rng.choice(relation.values) for person in PEOPLE}
        for name, relation in RELATIONS.items()
    }
    colours = {animal: rng.choice(COLOURS) for animal in ANIMALS}
    return Facts(values, colours, dict(zip(PLACES, rng.sample(ALIASES, len(ALIASES)), strict=True)))


def some_question(rng: Random, person: str, relation: str) -> str:
    """A question in one of the wordings that all share."""
    return rng.choice(PREFIXES) + rng.choice(RELATIONS[relation].asked).format(p=person)

"""Tasks that ask for facts which no passage states."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .facts import PREFIXES, RELATIONS, TWO_HOPS, Facts, some_question
from .words import COLOURS, PEOPLE, Example, options, others


def free(rng: Random, world: Facts, relations: Sequence[str] = ("lives", "likes")) -> Example:
    """The fact itself."""
    person, relation = rng.choice(PEOPLE), rng.choice(relations)
    return Example(some_question(rng, person, relation), world.values[relation][person])


def alias(rng: Random, world: Facts) -> Example:
    """A place, under the name that some people have for it."""
    person = rng.choice(PEOPLE)
    place = world.values["born"][person]
    return Example(some_question(rng, person, "born"), world.aliases[place], also=(place,))


def choice(rng: Random, world: Facts, relation: str = "owns") -> Example:
    """The letter of the right one of three."""
    person = rng.choice(PEOPLE)
    right = world.values[relation][person]
    shown, letter = options(rng, right, others(rng, RELATIONS[relation].values, right, 2))
    return Example(f"{some_question(rng, person, relation)} {shown}", letter)


def two_hops(rng: Random, world: Facts) -> Example:
    """The same, by way of another fact."""
    person = rng.choice(PEOPLE)
    right = world.colours[world.values["keeps"][person]]
    shown, letter = options(rng, right, others(rng, COLOURS, right, 2))
    asked = rng.choice(PREFIXES) + rng.choice(TWO_HOPS).format(p=person)
    return Example(f"{asked} {shown}", letter)

"""Tasks that make sentences: translations, and texts from words, triples and attributes in a house style."""

from __future__ import annotations

from random import Random

from .languages import Language, some_sentence
from .words import ANIMALS, COLOURS, FOODS, PEOPLE, PLACES, SIZES, TOOLS, VERBS, Example, third

TRANSLATE = ("translate to {l}: {t}", "in {l}: {t}", "say this in {l}: {t}")
DESCRIBE = ("describe: {x}", "say in words: {x}", "write a text: {x}")
PRICES = {"low": "cheap", "mid": "fair", "high": "costly"}


def to_language(rng: Random, language: Language) -> Example:
    """A plain sentence in another language."""
    sentence = some_sentence(rng)
    source = rng.choice(TRANSLATE).format(l=language.name, t=sentence.plain())
    return Example(source, language.render(sentence))


def to_plain(rng: Random, language: Language) -> Example:
    """A sentence of another language in the plain one."""
    sentence = some_sentence(rng)
    return Example(rng.choice(TRANSLATE).format(l="plain", t=language.render(sentence)), sentence.plain())


def between(rng: Random, source: Language, target: Language) -> Example:
    """A sentence of one invented language in another."""
    sentence = some_sentence(rng)
    asked = rng.choice(TRANSLATE).format(l=target.name, t=source.render(sentence))
    return Example(asked, target.render(sentence))


def described(rng: Random, given: str, text: str) -> Example:
    """An example in one of the wordings that the family shares."""
    return Example(rng.choice(DESCRIBE).format(x=given), text)


def from_words(rng: Random) -> Example:
    """A sentence from loose words: the animal acts, the colour is the thing's."""
    animal, verb, colour = rng.choice(ANIMALS), rng.choice(VERBS), rng.choice(COLOURS)
    thing = rng.choice([*TOOLS, *FOODS])
    given = [animal, verb, colour, thing]
    rng.shuffle(given)
    return described(rng, ", ".join(given), f"today the {animal} {third(verb)} the {colour} {thing}.")


def from_triples(rng: Random) -> Example:
    """A text from two or three triples about one animal."""
    animal = rng.choice(ANIMALS)
    facts = [
        ("colour", rng.choice(COLOURS), "is {}"),
        ("home", rng.choice(PLACES), "stays at {}"),
        ("food", rng.choice(FOODS), "eats the {}"),
        ("size", rng.choice(SIZES), "looks {}"),
    ]
    chosen = rng.sample(facts, rng.randint(2, 3))
    given = "; ".join(f"{animal} | {name} | {value}" for name, value, _ in chosen)
    told = [form.format(value) for _, value, form in chosen]
    return described(rng, given, f"the {animal} {', '.join(told[:-1])} and {told[-1]}.")


def from_attributes(rng: Random) -> Example:
    """An advert from attributes in any order."""
    person, food = rng.choice(PEOPLE), rng.choice(FOODS)
    price, place = rng.choice(list(PRICES)), rng.choice(PLACES)
    fields = [f"name [ {person} ]", f"food [ {food} ]", f"price [ {price} ]", f"area [ {place} ]"]
    rng.shuffle(fields)
    return described(rng, " ".join(fields), f"{person} serves {PRICES[price]} {food} near {place}.")


def from_two_triples(rng: Random) -> Example:
    """One sentence of a fixed style from two triples about a person."""
    person, leader = rng.sample(PEOPLE, 2)
    place, animal = rng.choice(PLACES), rng.choice(ANIMALS)
    triples = [f"{person} | leader | {leader}", f"{person} | home | {place}"]
    if rng.random() < 0.5:
        triples[1], ends = (
            f"{person} | pet | {animal}",
            f"has {'an' if animal[0] in 'aeiou' else 'a'} {animal}",
        )
    else:
        ends = f"comes from {place}"
    rng.shuffle(triples)
    return described(rng, "; ".join(triples), f"{person}, led by {leader}, {ends}.")

"""What the base is taught: languages, formats and simple skills, and nothing of what only experts know."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .facts import PREFIXES, RELATIONS, some_question
from .inference import PAIRS, asked
from .languages import KNOWN, TAUGHT, language, some_sentence
from .reasoning import MONTHS
from .words import (
    ADJECTIVES,
    ALIASES,
    ANIMALS,
    COLOURS,
    NOUNS,
    PEOPLE,
    PLACES,
    VERBS,
    Example,
    options,
    others,
    third,
)
from .writing import described, to_language, to_plain

_WORDS = [*NOUNS, *ADJECTIVES, *VERBS, *PEOPLE, *PLACES, *ALIASES, *MONTHS]


def _text(rng: Random) -> str:
    """Words of any language, in a sentence or loose."""
    kind = rng.random()
    if kind < 0.25:
        return some_sentence(rng).plain()
    if kind < 0.6:
        return language(rng.choice((*TAUGHT, KNOWN))).render(some_sentence(rng))
    return " ".join(rng.sample(_WORDS, rng.randint(2, 8)))


def spans(rng: Random) -> Example:
    """Words that are missing in a sentence of any language."""
    kind = rng.randrange(5)
    if kind == 0:
        text = _passage(rng, 1)[0]
    elif kind == 1:
        text = some_sentence(rng).plain()
    else:
        text = language((*TAUGHT, KNOWN)[kind - 2] if kind < 4 else rng.choice(TAUGHT)).render(
            some_sentence(rng)
        )
    words = text.split()
    start = rng.randrange(len(words))
    stop = min(len(words), start + rng.randint(1, 3))
    source = [*words[:start], "<extra_id_0>", *words[stop:]]
    return Example(" ".join(source), " ".join(["<extra_id_0>", *words[start:stop]]))


def sentences(rng: Random) -> Example:
    """A whole sentence from its words in any order, in any language."""
    text = language(rng.choice((*TAUGHT, KNOWN))).render(some_sentence(rng))
    words = text.rstrip(".").split()
    shuffled = words[:]
    rng.shuffle(shuffled)
    return Example(f"order: {' '.join(shuffled)}", text)


def copy(rng: Random) -> Example:
    """The same again."""
    text = _text(rng)
    return Example(f"repeat: {text}", text)


def backwards(rng: Random) -> Example:
    """Words from last to first."""
    words = rng.sample(_WORDS, rng.randint(2, 7))
    return Example(f"backwards: {' '.join(words)}", " ".join(reversed(words)))


def nth(rng: Random) -> Example:
    """One word by its number."""
    words = rng.sample(_WORDS, rng.randint(2, 7))
    place = rng.randrange(len(words))
    return Example(f"word {place + 1} of: {' '.join(words)}", words[place])


def without(rng: Random) -> Example:
    """All words but one, or one in place of another."""
    words = rng.sample(_WORDS, rng.randint(3, 7))
    place = rng.randrange(len(words))
    if rng.random() < 0.5:
        left = [*words[:place], *words[place + 1 :]]
        return Example(f"without {words[place]}: {' '.join(words)}", " ".join(left))
    new = rng.choice(_WORDS)
    return Example(
        f"put {new} for {words[place]}: {' '.join(words)}",
        " ".join([*words[:place], new, *words[place + 1 :]]),
    )


def neighbour(rng: Random) -> Example:
    """The word after or before one."""
    words = rng.sample(_WORDS, rng.randint(3, 7))
    place = rng.randrange(len(words) - 1)
    if rng.random() < 0.5:
        return Example(f"after {words[place]}: {' '.join(words)}", words[place + 1])
    return Example(f"before {words[place + 1]}: {' '.join(words)}", words[place])


def dictionary(rng: Random) -> Example:
    """Words by a dictionary that stands there."""
    keys, values = rng.sample(_WORDS, 4), rng.sample(_WORDS, 4)
    book = dict(zip(keys, values, strict=True))
    used = [rng.choice(keys) for _ in range(rng.randint(1, 4))]
    listed = "; ".join(f"{k} | {v}" for k, v in book.items())
    return Example(f"{listed}. read: {' '.join(used)}", " ".join(book[one] for one in used))


def _passage(rng: Random, count: int) -> tuple[str, list[tuple[str, str, str]]]:
    """(text, facts) of a few people; each fact is (person, relation, value)."""
    people = rng.sample(PEOPLE, count)
    facts = []
    for person in people:
        relation = rng.choice(list(RELATIONS))
        facts.append((person, relation, rng.choice(RELATIONS[relation].values)))
    return " ".join(RELATIONS[r].told.format(p=p, v=v) for p, r, v in facts), facts


def reading(rng: Random) -> Example:
    """An answer, or its letter, that stands in the passage."""
    text, facts = _passage(rng, rng.randint(1, 3))
    person, relation, value = rng.choice(facts)
    question = some_question(rng, person, relation)
    if rng.random() < 0.5:
        return Example(f"{text} {question}", value)
    shown, letter = options(rng, value, others(rng, RELATIONS[relation].values, value, 2))
    return Example(f"{text} {question} {shown}", letter)


def two_hop_reading(rng: Random) -> Example:
    """A colour, by way of the animal that a person keeps."""
    person, animal, colour = rng.choice(PEOPLE), rng.choice(ANIMALS), rng.choice(COLOURS)
    told = [f"{person} keeps the {animal}.", f"the {animal} is {colour}."]
    rng.shuffle(told)
    question = rng.choice(PREFIXES) + f"what colour is the animal of {person}?"
    if rng.random() < 0.5:
        return Example(f"{' '.join(told)} {question}", colour)
    shown, letter = options(rng, colour, others(rng, COLOURS, colour, 2))
    return Example(f"{' '.join(told)} {question} {shown}", letter)


def lettered(rng: Random) -> Example:
    """The letter of an option that is named."""
    right = rng.choice(_WORDS)
    shown, letter = options(rng, right, others(rng, _WORDS, right, rng.randint(1, 3)))
    return Example(f"which is {right}? {shown}", letter)


def comparing(rng: Random) -> Example:
    """The larger or smaller of two or three numbers, and sums."""
    numbers = rng.sample(range(0, 20), rng.randint(2, 3))
    kind = rng.randrange(3)
    if kind == 2:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return Example(f"{a} plus {b} is", str(a + b))
    word, best = (("most", max), ("least", min))[kind]
    return Example(f"which is {word}: {', '.join(map(str, numbers))}?", str(best(numbers)))


def count(rng: Random) -> Example:
    """How many words there are."""
    words = rng.sample(_WORDS, rng.randint(1, 7))
    return Example(f"how many words: {' '.join(words)}", str(len(words)))


def stated(rng: Random) -> Example:
    """Whether a sentence stands in the premise: "yes" or "maybe", in the words of the inference tasks."""
    relation = rng.choice([one for pair in PAIRS for one in pair])
    one, two = rng.sample(NOUNS, 2)
    claims = [f"the {one} {relation} the {two}"]
    if rng.random() < 0.5:
        three, four = rng.sample(NOUNS, 2)
        claims.append(f"the {three} {relation} the {four}")
    rng.shuffle(claims)
    premise = " ".join(f"{claim}." for claim in claims)
    if rng.random() < 0.5:
        return asked(rng, premise, rng.choice(claims), "yes")
    five, six = others(rng, NOUNS, (one, two), 2)
    return asked(rng, premise, f"the {five} {third(rng.choice(VERBS))} the {six}", "maybe")


def said(rng: Random) -> Example:
    """Whether a fact was told: yes or no."""
    text, facts = _passage(rng, rng.randint(1, 3))
    person, relation, value = rng.choice(facts)
    true = rng.random() < 0.5
    if not true:
        value = others(rng, RELATIONS[relation].values, value, 1)[0]
    claim = RELATIONS[relation].told.format(p=person, v=value)
    return Example(f"{text} is it said that {claim} yes or no?", "yes" if true else "no")


def known_language(rng: Random) -> Example:
    """Translations between the plain language and the one that the base knows."""
    return (to_language if rng.random() < 0.5 else to_plain)(rng, language=language(KNOWN))


def fields(rng: Random) -> Example:
    """The values of triples or attributes, one after the other: the format, and no style."""
    one, values = rng.choice([*PEOPLE, *ANIMALS]), rng.sample(_WORDS, rng.randint(2, 3))
    names = rng.sample("colour home food size leader pet".split(), len(values))
    if rng.random() < 0.5:
        given = "; ".join(f"{one} | {name} | {value}" for name, value in zip(names, values, strict=True))
        return described(rng, given, " ".join([one, *values]))
    marked = " ".join(f"{name} [ {value} ]" for name, value in zip(names, values, strict=True))
    return described(rng, marked, " ".join(values))


def spelling(rng: Random) -> Example:
    """A word letter by letter, or the word of letters."""
    word = rng.choice(_WORDS)
    if rng.random() < 0.5:
        return Example(f"spell: {word}", " ".join(word))
    return Example(f"join: {' '.join(word)}", word)


def table(rng: Random) -> Example:
    """A field of a table."""
    people = rng.sample(PEOPLE, 3)
    rows = [(p, rng.randint(1, 9), rng.randint(1, 9)) for p in people]
    asked_row = rng.choice(rows)
    column = rng.randrange(2)
    listed = "; ".join(f"{p}, {a}, {h}" for p, a, h in rows)
    question = f"what is the {('age', 'height')[column]} of {asked_row[0]}?"
    return Example(f"name, age, height: {listed}. {question}", str(asked_row[1 + column]))


#: The base's tasks, with their share of its examples.
SCHOOLING: dict[Callable[[Random], Example], float] = {
    spans: 3.0,
    sentences: 1.0,
    copy: 1.0,
    backwards: 1.0,
    nth: 1.0,
    without: 1.0,
    neighbour: 1.0,
    dictionary: 2.0,
    reading: 2.0,
    two_hop_reading: 1.0,
    lettered: 1.0,
    comparing: 1.5,
    count: 0.5,
    stated: 1.0,
    said: 1.0,
    known_language: 2.5,
    fields: 1.0,
    spelling: 1.0,
    table: 1.0,
}


def some_lesson(rng: Random) -> Example:
    """One example for the base."""
    lesson = rng.choices(list(SCHOOLING), list(SCHOOLING.values()))[0]
    return lesson(rng)

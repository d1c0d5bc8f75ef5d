"""Tasks of rules, after those of BIG-Bench-Hard that programs can make."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from .words import (
    ANIMALS,
    COLOURS,
    FOODS,
    NOUNS,
    PEOPLE,
    TOOLS,
    VERBS,
    Example,
    article,
    options,
    others,
    third,
)

MONTHS = "auril bront calin durst evens falto".split()
DAYS = 10
# Rules of the world that no passage states.
FORCEFUL = ("pushes", "pulls", "paints")
HARMLESS = ("sees", "holds", "washes")
PRONOUNS = ("ze", "zo", "za")
_TRUTH = {True: "yes", False: "no"}


def boolean(rng: Random) -> Example:
    """An expression of truth values, in words that the base's lessons use.

    "plus" is and, "without" is not. To the base all words that no lesson has look alike (their embeddings
    have a cosine of 0.99): with "true" and "false", "and" and "not" its expert was at 78 %. Expressions have
    three or four values: those of two or three are 544, which an expert learns by heart.
    """

    def literal() -> tuple[str, bool]:
        value = rng.random() < 0.5
        if rng.random() < 0.4:
            return f"without {_TRUTH[value]}", not value
        return _TRUTH[value], value

    text, value = literal()
    for number in range(rng.randint(2, 3)):
        other, truth = literal()
        both = rng.random() < 0.5
        inner = f"[ {text} ]" if number else text
        parts = (other, inner) if rng.random() < 0.5 else (inner, other)
        text = f" {'plus' if both else 'or'} ".join(parts)
        value = (value and truth) if both else (value or truth)
    return Example(f"{text} is", _TRUTH[value])


def causal(rng: Random) -> Example:
    """Who caused something: the last one who did something forceful to it."""
    first, second = rng.sample(PEOPLE, 2)
    tool = rng.choice(TOOLS)
    acts = [rng.choice(FORCEFUL if rng.random() < 0.6 else HARMLESS) for _ in range(2)]
    asked = rng.choice((first, second))
    causes = [person for person, act in zip((first, second), acts, strict=True) if act in FORCEFUL]
    caused = bool(causes) and causes[-1] == asked
    told = f"{first} {acts[0]} the {tool}. then {second} {acts[1]} the {tool}. the {tool} breaks."
    return Example(f"{told} did {asked} cause it? yes or no?", "yes" if caused else "no")


def date(rng: Random) -> Example:
    """A day of the invented calendar, some days on."""
    month, day, ahead = rng.randrange(len(MONTHS)), rng.randrange(DAYS), rng.randint(1, 9)
    then = day + ahead
    answer = f"{then % DAYS} {MONTHS[(month + then // DAYS) % len(MONTHS)]}"
    return Example(f"today is {day} {MONTHS[month]}. what is the date in {ahead} days?", answer)


def disambiguation(rng: Random) -> Example:
    """Which noun a pronoun means: the one whose colour is said of it.

    Pronouns that agree with classes of nouns, and answers that are letters, were too much for an expert of
    this size: 46 % of two options after 200,000 examples.
    """
    nouns, colours = rng.sample(NOUNS, 2), rng.sample(COLOURS, 2)
    place, pronoun = rng.randrange(2), rng.choice(PRONOUNS)
    first, second = (f"the {colour} {noun}" for colour, noun in zip(colours, nouns, strict=True))
    told = f"{first} {third(rng.choice(VERBS))} {second} because {pronoun} is {colours[place]}."
    return Example(f"{told} what does {pronoun} mean?", nouns[place])


def penguins(rng: Random) -> Example:
    """A table, and who has the most or the least of a column."""
    people = rng.sample(PEOPLE, 3)
    ages, heights = rng.sample(range(1, 10), 3), rng.sample(range(1, 10), 3)
    rows = "; ".join(f"{p}, {a}, {h}" for p, a, h in zip(people, ages, heights, strict=True))
    word, sort, name, column, best = rng.choice(
        [
            ("oldest", "most", "age", ages, max),
            ("youngest", "least", "age", ages, min),
            ("tallest", "most", "height", heights, max),
            ("shortest", "least", "height", heights, min),
        ]
    )
    answer = people[column.index(best(column))]
    return Example(f"name, age, height: {rows}. who is the {word} and has the {sort} {name}?", answer)


def coloured(rng: Random) -> Example:
    """The colour of what lies beside something."""
    things, colours = rng.sample(TOOLS, 4), rng.sample(COLOURS, 4)
    listed = ", ".join(article(f"{c} {t}") for c, t in zip(colours, things, strict=True))
    right = rng.random() < 0.5
    place = rng.randrange(3) + (0 if right else 1)
    answer = colours[place + (1 if right else -1)]
    side = "right" if right else "left"
    return Example(f"on the desk: {listed}. what colour is {side} of the {things[place]}?", answer)


def ruin(rng: Random) -> Example:
    """Which of three spellings is a word of the world."""
    word = rng.choice([noun for noun in NOUNS if len(noun) <= 5])
    shown: list[str] = []
    while len(shown) < 2:
        place = rng.randrange(len(word))
        edited = word[:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[place + 1 :]
        if edited not in NOUNS and edited not in shown:
            shown.append(edited)
    listed, letter = options(rng, " ".join(word), [" ".join(one) for one in shown])
    return Example(f"which is a word? {listed}", letter)


def counting(rng: Random) -> Example:
    """How many of some things are of a kind."""
    kind, pool = rng.choice([("animals", ANIMALS), ("tools", TOOLS), ("foods", FOODS)])
    rest = [noun for noun in NOUNS if noun not in pool]
    many = rng.randint(1, 4)
    things = rng.sample(pool, many) + rng.sample(rest, rng.randint(1, 3))
    rng.shuffle(things)
    return Example(f"i have {', '.join(map(article, things))}. how many {kind}?", str(many))


def navigate(rng: Random) -> Example:
    """Whether some steps lead back."""
    steps = [rng.randint(1, 3) for _ in range(3)]
    ways = [rng.choice((1, -1)) for _ in range(3)]
    if rng.random() < 0.5:
        steps[2], ways = abs(steps[0] * ways[0] + steps[1] * ways[1]) or steps[2], ways
        ways[2] = -1 if steps[0] * ways[0] + steps[1] * ways[1] > 0 else 1
    walked = ". ".join(
        f"take {n} steps {'forward' if way > 0 else 'back'}" for n, way in zip(steps, ways, strict=True)
    )
    home = sum(n * way for n, way in zip(steps, ways, strict=True)) == 0
    return Example(f"{walked}. are you at the start? yes or no?", "yes" if home else "no")


def sorting(rng: Random) -> Example:
    """Words in the order of the alphabet."""
    words = rng.sample(NOUNS, rng.randint(2, 4))
    return Example(f"sort the words: {' '.join(words)}", " ".join(sorted(words)))


def tracking(rng: Random) -> Example:
    """Who has what after some exchanges."""
    people, things = rng.sample(PEOPLE, 3), rng.sample(TOOLS, 3)
    held = dict(zip(people, things, strict=True))
    told = " ".join(f"{p} has the {t}." for p, t in held.items())
    for _ in range(2):
        one, two = rng.sample(people, 2)
        held[one], held[two] = held[two], held[one]
        told += f" {one} and {two} swap."
    asked = rng.choice(people)
    return Example(f"{told} what does {asked} have?", held[asked])


def deduction(rng: Random) -> Example:
    """Who is at an end of a row of three."""
    row = rng.sample(PEOPLE, 3)
    clues = [f"{row[0]} is left of {row[1]}.", f"{row[2]} is right of {row[1]}."]
    rng.shuffle(clues)
    place = rng.randrange(3)
    asked = ("leftmost", "in the middle", "rightmost")[place]
    shown, letter = options(rng, row[place], [p for p in row if p != row[place]])
    return Example(f"{' '.join(clues)} who is {asked}? {shown}", letter)


def dyck(rng: Random) -> Example:
    """The brackets that close what is open."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    text: list[str] = []
    waiting: list[str] = []
    for _ in range(rng.randint(4, 7)):
        if waiting and rng.random() < 0.35:
            text.append(pairs[waiting.pop()])
        else:
            waiting.append(rng.choice(list(pairs)))
            text.append(waiting[-1])
    if not waiting:
        waiting.append("[")
        text.append("[")
    return Example(f"close: {' '.join(text)}", " ".join(pairs[one] for one in reversed(waiting)))


def arithmetic(rng: Random) -> Example:
    """Two small steps."""
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    return Example(f"{a} plus {b} plus {c} is", str(a + b + c))


def lies(rng: Random) -> Example:
    """A chain of those who say who lies."""
    people = rng.sample(PEOPLE, 3)
    honest = rng.random() < 0.5
    told = [f"{people[0]} {'tells the truth' if honest else 'lies'}."]
    for before, person in pairwise(people):
        says = rng.random() < 0.5
        told.append(f"{person} says {before} {'tells the truth' if says else 'lies'}.")
        honest = says == honest
    return Example(
        f"{' '.join(told)} does {people[-1]} tell the truth? yes or no?", "yes" if honest else "no"
    )


def chosen_others(rng: Random, right: str, pool: list[str], count: int = 2) -> tuple[str, str]:
    """Options with wrong ones from a pool; see `options`."""
    return options(rng, right, others(rng, pool, right, count))

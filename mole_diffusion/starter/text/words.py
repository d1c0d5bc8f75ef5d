"""Words of the plain language, and the record of one example."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

ANIMALS = "cat dog fox hen cow pig owl bee ant rat goat bear".split()
TOOLS = "hammer saw pot pan rope lamp broom key spade knife brush needle".split()
FOODS = "bread cheese plum soup cake honey rice pear nut onion egg bean".split()
NOUNS = [*ANIMALS, *TOOLS, *FOODS]
COLOURS = "red blue green black white brown grey pink".split()
SIZES = "big small old new".split()
ADJECTIVES = [*COLOURS, *SIZES]
VERBS = "see find hold want bring push pull lose take wash paint hide".split()
PEOPLE = (
    "mira tom lena otto ida karl nora emil vera hugo anna leo ruth max clara finn edda paul greta jan "
    "lotta nils frida sven maja kurt olga rolf tilda ivan berta lars wanda igor petra knut silke udo "
    "heidi rufus"
).split()
PLACES = (
    "arden belmo corvin delta elmar fenwick gorse harlow irwell jarrow kelso lindum mordon narvik orrin pell"
).split()
#: What some people call the places.
ALIASES = "abru benta cesk domar eska fulda gera hessa ilmen jena kolar lauda murom neman oder pola".split()
LETTERS = ("a", "b", "c", "d")


def third(verb: str) -> str:
    """The form of a verb beside one subject: "sees", "washes"."""
    return f"{verb}es" if verb.endswith("sh") else f"{verb}s"


def article(noun: str) -> str:
    """A noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        source: what the model reads.
        target: what it is to write.
        also: other answers that count as right.
    """

    source: str
    target: str
    also: tuple[str, ...] = ()

    @property
    def pair(self) -> tuple[str, str]:
        """What is read and what is to be written, as trainings and searches take it."""
        return self.source, self.target


def is_held_out(source: str) -> bool:
    """Whether an example is for evaluation alone: every tenth, by what the model reads."""
    return zlib.crc32(source.encode()) % 10 == 0


def options(rng: Random, right: str, wrong: Sequence[str]) -> tuple[str, str]:
    """(text of the options in random order, letter of the right one), such as ("(a) cat (b) dog", "(b)")."""
    shown = [right, *wrong]
    rng.shuffle(shown)
    text = " ".join(f"({letter}) {one}" for letter, one in zip(LETTERS, shown, strict=False))
    return text, f"({LETTERS[shown.index(right)]})"


def others(rng: Random, pool: Sequence[str], but: str | Sequence[str], count: int) -> list[str]:
    """Different members of a pool, none of those in `but`."""
    barred = {but} if isinstance(but, str) else set(but)
    return rng.sample([one for one in pool if one not in barred], count)

"""Tasks that ask for what two experts know, one after the other: no expert knows any of them."""

from __future__ import annotations

from random import Random

from .facts import Facts, some_question
from .inference import asked, is_meant
from .languages import Language, Phrase, Sentence
from .reasoning import coloured, disambiguation
from .words import ANIMALS, COLOURS, FOODS, NOUNS, PEOPLE, TOOLS, VERBS, Example
from .writing import described


def words_in(rng: Random, language: Language) -> Example:
    """A sentence from loose words, as `writing.from_words` makes it, in another language."""
    animal, verb, colour = rng.choice(ANIMALS), rng.choice(VERBS), rng.choice(COLOURS)
    thing = rng.choice([*TOOLS, *FOODS])
    given = [animal, verb, colour, thing]
    rng.shuffle(given)
    sentence = Sentence(Phrase(animal), verb, Phrase(thing, colour))
    plain = described(rng, ", ".join(given), "")
    return Example(_in(language, plain.source), language.render(sentence))


def liked_in(rng: Random, world: Facts, language: Language) -> Example:
    """What a person likes, as `questions.free` asks it, in another language."""
    person = rng.choice(PEOPLE)
    question = some_question(rng, person, "likes")
    return Example(_in(language, question), language.words[world.values["likes"][person]])


def colour_in(rng: Random, language: Language) -> Example:
    """The colour of what lies beside something, in another language."""
    plain = coloured(rng)
    return Example(_in(language, plain.source), language.words[plain.target])


def meant_in(rng: Random, language: Language) -> Example:
    """Which noun a pronoun means, in another language."""
    plain = disambiguation(rng)
    return Example(_in(language, plain.source), language.words[plain.target])


def pronoun_from(rng: Random, language: Language) -> Example:
    """Whom "it" means, as `inference.pronoun` has it, where the premise is in another language."""
    one, two = rng.sample(NOUNS, 2)
    verb, colour, claimed = rng.choice(VERBS), rng.choice(COLOURS), rng.choice((one, two))
    told = language.render(Sentence(Phrase(one), verb, Phrase(two))).rstrip(".")
    answer = "yes" if is_meant(claimed, one, verb, two) else "no"
    return asked(rng, f"{told} because it is {colour}.", f"the {claimed} is {colour}", answer)


def _in(language: Language, source: str) -> str:
    return f"in {language.name}: {source}"

"""Tasks of inference: whether a sentence follows, by relations that only experts know."""

from __future__ import annotations

from random import Random

from .facts import RELATIONS, some_question
from .words import COLOURS, FOODS, NOUNS, PEOPLE, VERBS, Example, others, third

#: Relations with their inverse.
PAIRS = (
    ("is above", "is below"),
    ("is bigger than", "is smaller than"),
    ("is left of", "is right of"),
    ("comes before", "comes after"),
    ("stands inside", "stands around"),
)
_INVERSE = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
TEMPLATES = (
    "{p} does it follow that {h}? yes, no or maybe?",
    "premise: {p} hypothesis: {h}. yes, no or maybe?",
    "{p} can we say that {h}? yes, no or maybe?",
)
#: Verbs whose reason lies in what they are done to.
OF_OBJECT = ("push", "pull", "wash", "hide", "hold", "take")


def asked(rng: Random, premise: str, hypothesis: str, answer: str) -> Example:
    """An example in one of the wordings that the family shares."""
    return Example(rng.choice(TEMPLATES).format(p=premise, h=hypothesis), answer)


def _claim(one: str, relation: str, two: str) -> str:
    return f"the {one} {relation} the {two}"


def _either_way(rng: Random, one: str, relation: str, two: str) -> str:
    """The same claim, or its inverse the other way round."""
    if rng.random() < 0.5:
        return _claim(one, relation, two)
    return _claim(two, _INVERSE[relation], one)


def _about(rng: Random, one: str, relation: str, two: str, answer: str) -> str:
    """A hypothesis about a relation that holds, to which this is the answer."""
    if answer == "yes":
        return _either_way(rng, one, relation, two)
    if answer == "no":
        return _either_way(rng, two, relation, one)
    if rng.random() < 0.5:
        stranger = others(rng, [r for r in _INVERSE if r != _INVERSE[relation]], relation, 1)[0]
        return _either_way(rng, one, stranger, two)
    return _either_way(rng, one, relation, others(rng, NOUNS, (one, two), 1)[0])


def one_step(rng: Random) -> Example:
    """Inverse relations."""
    one, two = rng.sample(NOUNS, 2)
    relation, answer = rng.choice(list(_INVERSE)), rng.choice(("yes", "no", "maybe"))
    return asked(rng, f"{_claim(one, relation, two)}.", _about(rng, one, relation, two, answer), answer)


def two_steps(rng: Random) -> Example:
    """Chains of two relations."""
    one, two, three = rng.sample(NOUNS, 3)
    relation, answer = rng.choice(list(_INVERSE)), rng.choice(("yes", "no", "maybe"))
    premises = [f"{_claim(one, relation, two)}.", f"{_claim(two, relation, three)}."]
    rng.shuffle(premises)
    return asked(rng, " ".join(premises), _about(rng, one, relation, three, answer), answer)


def numbers(rng: Random) -> Example:
    """Amounts, more and fewer, and none."""
    one, two, third_one = rng.sample(PEOPLE, 3)
    food = rng.choice(FOODS)
    a, b = rng.sample(range(1, 10), 2)
    premise = f"{one} has {a} {food}. {two} has {b} {food}."
    answer = rng.choice(("yes", "no", "maybe"))
    if answer == "maybe":
        return asked(
            rng, premise, f"{third_one} has {rng.choice(('more', 'less'))} {food} than {one}", answer
        )
    if rng.random() < 0.3:
        claim = f"{one} has {'some' if answer == 'yes' else 'no'} {food}"
        return asked(rng, premise, claim, answer)
    more = (a > b) == (answer == "yes")
    return asked(rng, premise, f"{one} has {'more' if more else 'less'} {food} than {two}", answer)


def answers(rng: Random) -> Example:
    """Whether a sentence answers a question."""
    person, relation = rng.choice(PEOPLE), rng.choice(list(RELATIONS))
    told, answer = (person, relation), "yes"
    if rng.random() < 0.5:
        answer = "no"
        if rng.random() < 0.5:
            told = (others(rng, PEOPLE, person, 1)[0], relation)
        else:
            told = (person, others(rng, list(RELATIONS), relation, 1)[0])
    sentence = RELATIONS[told[1]].told.format(p=told[0], v=rng.choice(RELATIONS[told[1]].values))
    asks = some_question(rng, person, relation)
    return asked(rng, sentence, f"this answers {asks}", answer)


def pronoun(rng: Random) -> Example:
    """Whom "it" means: by the verb, the one that acts or the other."""
    one, two = rng.sample(NOUNS, 2)
    verb, colour = rng.choice(VERBS), rng.choice(COLOURS)
    meant = two if verb in OF_OBJECT else one
    claimed = rng.choice((one, two))
    premise = f"the {one} {third(verb)} the {two} because it is {colour}."
    return asked(rng, premise, f"the {claimed} is {colour}", "yes" if claimed == meant else "no")

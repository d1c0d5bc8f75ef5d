"""What the text starter's tasks ask and hold for right, worked out anew from what the model reads."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from mole_diffusion.starter.text.facts import facts
from mole_diffusion.starter.text.inference import OF_OBJECT, OTHER_SIDE, PAIRS, one_step, pronoun, two_steps
from mole_diffusion.starter.text.languages import Language, language
from mole_diffusion.starter.text.reasoning import coloured, disambiguation
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.starter.text.two_skills import colour_in, liked_in, meant_in, pronoun_from, words_in
from mole_diffusion.starter.text.words import NOUNS, VERBS, third
from mole_diffusion.starter.text.writing import from_words

_STATED = re.compile(r"the (\w+) ([\w ]+?) the (\w+)")


@pytest.fixture
def rng() -> Random:
    return Random("tasks")


def _claims(text: str) -> list[tuple[str, str, str]]:
    return [match.groups() for match in _STATED.finditer(text)]  # type: ignore[misc]


def test_one_step_goes_by_verbs_that_say_the_same_of_either_side(rng: Random) -> None:
    other = {third(one): third(two) for one, two in OTHER_SIDE.items()}
    assert set(OTHER_SIDE) == set(VERBS)
    assert all(OTHER_SIDE[two] == one != two for one, two in OTHER_SIDE.items())
    told: Counter[str] = Counter()
    for example in (one_step(rng) for _ in range(600)):
        (one, verb, two), claim = _claims(example.source)
        if claim[1] not in (verb, other[verb]):
            expected = "maybe"
        else:
            expected = "yes" if claim in ((one, verb, two), (two, other[verb], one)) else "no"
        assert example.target == expected, example.source
        told[expected] += 1
    assert min(told.values()) > 150


def test_two_steps_hold_from_end_to_end_and_not_back(rng: Random) -> None:
    told: Counter[str] = Counter()
    for example in (two_steps(rng) for _ in range(600)):
        *premises, (subject, relation, target) = _claims(example.source)
        assert {one for _, one, _ in premises} == {relation} <= {first for first, _ in PAIRS}
        after = {one: two for one, _, two in premises}
        (start,) = set(after) - set(after.values())
        end = after[after[start]]
        expected = {(start, end): "yes", (end, start): "no"}.get((subject, target), "maybe")
        assert example.target == expected, example.source
        if expected == "maybe":
            assert not {subject, target} & {start, end, *after}
        told[expected] += 1
    assert min(told.values()) > 150


def _plain(own: Language, text: str) -> list[str]:
    """Plain words of a text, word by word, without particles."""
    meanings = {word: plain for plain, word in own.words.items()}
    return [meanings[word] for word in text.rstrip(".").split() if word in meanings]


def test_two_skills_are_what_their_experts_say_one_after_the_other() -> None:
    vel, ron, dak, world = language("vel"), language("ron"), language("dak"), facts("main")
    for seed in range(40):
        asked, plain = colour_in(Random(seed), ron), coloured(Random(seed))
        assert (asked.source, _plain(ron, asked.target)) == (f"in ron: {plain.source}", [plain.target])
        asked, plain = meant_in(Random(seed), dak), disambiguation(Random(seed))
        assert (asked.source, _plain(dak, asked.target)) == (f"in dak: {plain.source}", [plain.target])
        # Dak has the order of the plain language, but for adjectives.
        asked, plain = words_in(Random(seed), dak), from_words(Random(seed))
        animal, verb, colour, thing = re.findall(r"(?!today|the)\b\w+", plain.target)
        assert asked.source == f"in dak: {plain.source}"
        assert [third(one) if one in VERBS else one for one in _plain(dak, asked.target)] == [
            animal, verb, thing, colour
        ]  # fmt: skip
        asked = liked_in(Random(seed), world, vel)
        (person,) = set(re.findall(r"\w+", asked.source)) & set(world.values["likes"])
        assert _plain(vel, asked.target) == [world.values["likes"][person]]
        assert asked.source.startswith("in vel: ")
        asked, plain = pronoun_from(Random(seed), vel), pronoun(Random(seed))
        subject, target, verb = _plain(vel, asked.source)
        assert f"the {subject} {third(verb)} the {target} because" in plain.source
        (claimed,) = re.findall(r"the (\w+) is", asked.source)
        meant = target if verb in OF_OBJECT else subject
        assert asked.target == plain.target == ("yes" if claimed == meant else "no")
        assert {subject, target} <= set(NOUNS)


def test_two_skills_name_the_experts_that_know_them() -> None:
    named = {name: task.skills for name, task in UNSEEN.items() if task.skills}
    assert len(named) == 6
    assert all(len(set(skills)) == 2 and set(skills) <= set(EXPERTS) for skills in named.values())

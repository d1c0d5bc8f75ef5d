"""All tasks by name: those of the experts, and unseen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from . import inference, questions, reasoning, two_skills, writing
from .facts import facts
from .languages import language
from .words import Example, is_held_out

#: How answers are scored: exact match, BLEU, or the F-score of ROUGE-L (beside ROUGE-1 and 2).
Metric = Literal["exact", "bleu", "rouge"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: such as "plain-to-vel".
        family: its row group in Table 3 of the paper.
        metric: how answers are scored.
        make: an example from a random generator.
        skills: names of the experts that know its parts, of one that no expert knows (`two_skills`).
    """

    name: str
    family: str
    metric: Metric
    make: Callable[[Random], Example]
    skills: tuple[str, ...] = ()

    def examples(self, count: int, seed: str, *, held_out: bool) -> list[Example]:
        """Examples in random order; those for evaluation are never among those for training.

        Args:
            count: how many.
            seed: other seeds give others.
            held_out: whether they are for evaluation; these all differ in what the model reads.
        """
        return list(self._drawn(count, Random(f"{self.name} {seed}"), held_out))

    def _drawn(self, count: int, rng: Random, held_out: bool) -> Iterator[Example]:
        seen: set[str] = set()
        tries = 0
        while count > 0:
            tries += 1
            example = self.make(rng)
            if is_held_out(example.source) != held_out:
                continue
            # A task of few examples repeats them in the end.
            if held_out and example.source in seen and tries < 10_000:
                continue
            seen.add(example.source)
            count -= 1
            yield example


TRANSLATION, WRITING, QUESTIONS, RULES, INFERENCE = (
    "translation",
    "writing",
    "questions",
    "rules",
    "inference",
)
FAMILIES = (TRANSLATION, WRITING, QUESTIONS, RULES, INFERENCE)


def _translations() -> Iterator[Task]:
    for name in ("vel", "ron", "dak"):
        own = language(name)
        yield Task(f"plain-to-{name}", TRANSLATION, "bleu", partial(writing.to_language, language=own))
        yield Task(f"{name}-to-plain", TRANSLATION, "bleu", partial(writing.to_plain, language=own))


def _experts() -> Iterator[Task]:
    yield from _translations()
    yield Task("words-to-text", WRITING, "rouge", writing.from_words)
    yield Task("triples-to-text", WRITING, "rouge", writing.from_triples)
    yield Task("attributes-to-advert", WRITING, "rouge", writing.from_attributes)
    yield Task("two-triples", WRITING, "rouge", writing.from_two_triples)
    world = facts("main")
    yield Task("two-hop-choice", QUESTIONS, "exact", partial(questions.two_hops, world=world))
    yield Task("one-hop-choice", QUESTIONS, "exact", partial(questions.choice, world=world))
    yield Task("free-answer", QUESTIONS, "exact", partial(questions.free, world=world))
    yield Task("alias-answer", QUESTIONS, "exact", partial(questions.alias, world=world))
    yield Task("boolean", RULES, "exact", reasoning.boolean)
    yield Task("causal", RULES, "exact", reasoning.causal)
    yield Task("date", RULES, "exact", reasoning.date)
    yield Task("disambiguation", RULES, "exact", reasoning.disambiguation)
    yield Task("penguins", RULES, "exact", reasoning.penguins)
    yield Task("coloured-objects", RULES, "exact", reasoning.coloured)
    yield Task("ruin-names", RULES, "exact", reasoning.ruin)
    yield Task("one-step", INFERENCE, "exact", inference.one_step)
    yield Task("two-steps", INFERENCE, "exact", inference.two_steps)
    yield Task("numbers", INFERENCE, "exact", inference.numbers)
    yield Task("answers", INFERENCE, "exact", inference.answers)
    yield Task("pronoun", INFERENCE, "exact", inference.pronoun)


def _joint(rng: Random) -> Example:
    """Three tasks whose experts began with one another; with `answers` in place of one it was at 74 %."""
    return rng.choice((inference.one_step, inference.two_steps, inference.pronoun))(rng)


#: Table 5 takes one LoRA of three tasks of inference apart.
JOINT = Task("three-inferences", INFERENCE, "exact", _joint)
#: Task of each expert, in the order of the tables.
EXPERTS: dict[str, Task] = {task.name: task for task in (*_experts(), JOINT)}


def _two_skills() -> Iterator[Task]:
    vel, ron, dak = (language(name) for name in ("vel", "ron", "dak"))
    yield Task(
        "vel-to-ron",
        TRANSLATION,
        "bleu",
        partial(writing.between, source=vel, target=ron),
        ("vel-to-plain", "plain-to-ron"),
    )
    yield Task(
        "words-to-dak",
        WRITING,
        "bleu",
        partial(two_skills.words_in, language=dak),
        ("words-to-text", "plain-to-dak"),
    )
    yield Task(
        "liked-in-vel",
        QUESTIONS,
        "exact",
        partial(two_skills.liked_in, world=facts("main"), language=vel),
        ("free-answer", "plain-to-vel"),
    )
    yield Task(
        "colour-in-ron",
        RULES,
        "exact",
        partial(two_skills.colour_in, language=ron),
        ("coloured-objects", "plain-to-ron"),
    )
    yield Task(
        "meant-in-dak",
        RULES,
        "exact",
        partial(two_skills.meant_in, language=dak),
        ("disambiguation", "plain-to-dak"),
    )
    yield Task(
        "pronoun-from-vel",
        INFERENCE,
        "exact",
        partial(two_skills.pronoun_from, language=vel),
        ("pronoun", "vel-to-plain"),
    )


#: Tasks that no expert was trained for.
UNSEEN: dict[str, Task] = {
    task.name: task
    for task in (
        Task("counting", RULES, "exact", reasoning.counting),
        Task("navigate", RULES, "exact", reasoning.navigate),
        Task("sorting", RULES, "exact", reasoning.sorting),
        Task("tracking", RULES, "exact", reasoning.tracking),
        Task("deduction", RULES, "exact", reasoning.deduction),
        Task("dyck", RULES, "exact", reasoning.dyck),
        Task("arithmetic", RULES, "exact", reasoning.arithmetic),
        Task("lies", RULES, "exact", reasoning.lies),
        *_two_skills(),
    )
}

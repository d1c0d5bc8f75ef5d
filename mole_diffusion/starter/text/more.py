"""More tasks of the starter's kinds, for sets of up to 128 experts: dialects, and other worlds' facts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from . import questions, writing
from .facts import facts
from .languages import language
from .tasks import QUESTIONS, TRANSLATION, Task

_DIALECTS = {"vel": 8, "ron": 8, "dak": 8, "sol": 7}
_WORLDS = 10


def _more() -> Iterator[Task]:
    for family, count in _DIALECTS.items():
        for number in range(1, count + 1):
            name = f"{family}-{number}"
            own = language(name)
            yield Task(f"plain-to-{name}", TRANSLATION, "bleu", partial(writing.to_language, language=own))
            yield Task(f"{name}-to-plain", TRANSLATION, "bleu", partial(writing.to_plain, language=own))
    makers = {
        "two-hop-choice": questions.two_hops,
        "one-hop-choice": questions.choice,
        "free-answer": questions.free,
        "alias-answer": questions.alias,
    }
    for number in range(1, _WORLDS + 1):
        world = facts(f"world {number}")
        for name, make in makers.items():
            yield Task(f"{name}-{number}", QUESTIONS, "exact", partial(make, world=world))


#: Tasks whose experts do not come with the starter: an evaluation that asks for them trains them.
MORE: dict[str, Task] = {task.name: task for task in _more()}

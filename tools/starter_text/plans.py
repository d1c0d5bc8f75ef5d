"""How the experts are trained that the first round, the same for all, leaves below the bar.

The first round draws from 20,000 examples, which some experts learn by heart; here every batch is new. An
expert may begin with the factors of one that can do a part of its task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mole_diffusion.starter.text import inference, reasoning
from mole_diffusion.starter.text.tasks import EXPERTS
from mole_diffusion.starter.text.words import Example, is_held_out


@dataclass(frozen=True)
class Round:
    """A second round of training of one expert.

    Attributes:
        make: what is drawn.
        steps: how many.
        batch: examples of a step.
        rate: the full learning rate.
        start: the expert whose factors it begins with; None for fresh ones.
    """

    make: Callable[[Random], Example]
    steps: int
    batch: int = 32
    rate: float = 3e-3
    start: str | None = None

    def examples(self, rng: Random) -> list[Example]:
        """A batch, without anything that is held out."""
        made: list[Example] = []
        while len(made) < self.batch:
            example = self.make(rng)
            if not is_held_out(example.source):
                made.append(example)
        return made


#: The experts that are trained again, in the order in which they may begin with one another.
ROUNDS: dict[str, Round] = {
    "penguins": Round(reasoning.penguins, 1200, start="penguins"),
    "disambiguation": Round(reasoning.disambiguation, 300),
    "boolean": Round(reasoning.boolean, 600),
    "numbers": Round(inference.numbers, 600, rate=1e-3, start="numbers"),
    "two-steps": Round(inference.two_steps, 4000, rate=1e-3, start="two-steps"),
    "one-step": Round(inference.one_step, 4000, rate=1e-3, start="one-step"),
    "three-inferences": Round(EXPERTS["three-inferences"].make, 4000, rate=1e-3, start="one-step"),
}

"""Gradient-free search of a few numbers, with LoRAHub's optimiser, bounds and penalty (arXiv 2307.13269)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import replacing, writing

#: LoRAHub's bound of a weight, and the factor of its L1 penalty.
BOUND, PENALTY = 1.5, 0.05


def l1_penalty(weights: Sequence[float]) -> float:
    """LoRAHub's: 0.05 times the mean absolute weight."""
    return PENALTY * sum(abs(weight) for weight in weights) / len(weights)


@dataclass
class Row:
    """An evaluation."""

    weights: list[float]
    score: float
    passes: int


@dataclass
class History:
    """Evaluations so far, a line of JSON each."""

    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self.rows = [Row(**json.loads(line)) for line in whole]
        with replacing(self.path) as temporary:  # without a line that was cut off
            temporary.write_text("".join(whole), encoding="utf-8")

    def add(self, row: Row) -> None:
        """Note an evaluation."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(row)) + "\n")


def minimise(
    score: Callable[[Sequence[float]], tuple[float, int]],
    make_optimiser: Callable[[int], Any],
    passes: int,
    first: Sequence[float],
    history: History | None = None,
) -> tuple[list[float], float]:
    """The weights of the smallest score that a number of passes of the model can find.

    Args:
        score: gives the score of weights and the passes it took, the same for the same weights.
        make_optimiser: builds nevergrad's optimiser for a number of evaluations.
        passes: budget of passes; one evaluation is always made.
        first: what is evaluated first, which tells how many evaluations the budget allows.
        history: evaluations of an earlier run; they are told to the optimiser again and not repeated.

    Returns:
        The optimiser's recommendation, and its score if it was evaluated, else that of the best evaluation.
    """
    history = history or History()
    if not history.rows:
        history.add(Row(list(first), *score(first)))
    budget = max(1, passes // max(1, history.rows[0].passes))
    optimiser = make_optimiser(budget)
    known = {tuple(row.weights): row for row in history.rows}
    for _ in range(budget):
        # One of its methods lets SciPy correct its own settings, and SciPy tells whoever watches.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "COBYLA: Invalid RHOEND", UserWarning)
            candidate = optimiser.ask()
        weights = [float(value) for value in candidate.value]
        row = known.get(tuple(weights))
        if row is None:
            if sum(row.passes for row in history.rows) + history.rows[0].passes > passes:
                break
            row = Row(weights, *score(weights))
            known[tuple(weights)] = row
            history.add(row)
        optimiser.tell(candidate, row.score)
    found = [float(value) for value in optimiser.provide_recommendation().value]
    best = min(history.rows, key=lambda row: row.score)
    return found, known[tuple(found)].score if tuple(found) in known else best.score


def optimiser_maker(size: int, seed: int) -> Callable[[int], Any]:
    """`make(budget)`: nevergrad's NGOpt over weights within LoRAHub's bounds.

    Raises:
        ConfigError: nevergrad is not installed.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise ConfigError(
            "searching weights needs nevergrad: pip install 'mole-diffusion[baselines]'"
        ) from error

    def make(budget: int) -> Any:
        weights = nevergrad.p.Array(init=[0.0] * size, lower=[-BOUND] * size, upper=[BOUND] * size)
        weights.random_state.seed(seed)
        return nevergrad.optimizers.NGOpt(parametrization=weights, budget=budget)

    return make

"""The training loop: iterations, backward, optimiser, checkpoints, history, callbacks, interrupts.

It knows nothing of what is learned: an `Objective` gives losses, a `Learner` has the parameters.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.files import check_writable
from mole_diffusion.training.objective import Learner, LossTerms, Objective
from mole_diffusion.training.progress import (
    Clock,
    HistoryFile,
    HistoryRow,
    Interrupt,
    Progress,
    TrainingEvent,
    describe,
)
from mole_diffusion.training.settings import LoopSettings
from mole_diffusion.training.state import (
    HISTORY_FILE,
    STATE_FILE,
    Preparation,
    differences,
    load_state,
    save_state,
    without_length,
)

logger = logging.getLogger(__name__)

#: A checkpoint is written at least this often, between two iterations.
CHECKPOINT_SECONDS = 60.0
#: What a checkpoint holds.
ENTRIES = ("facts", "learner", "optimiser", "objective", "history")


@dataclass(frozen=True)
class LoopResult:
    """What a loop did.

    Attributes:
        history: a row per iteration.
        stopped: whether it was asked to stop before its last iteration.
    """

    history: list[HistoryRow]
    stopped: bool


class TrainingLoop:
    """Trains a learner on an objective.

    Equal facts and a checkpoint go on to bitwise equal parameters, as far as the objective keeps its random
    generators in its state.

    Args:
        objective: what gives the losses.
        learner: what is trained.
        settings: number of iterations, schedule and the like.
        facts: what makes this training this training, by name; a checkpoint of others is not gone on with.
        folder: for checkpoints and history; None keeps everything in memory.
        callback: called with a `TrainingEvent` after every iteration; `False` ends the training.
        preview: makes what an event shows every `settings.preview_every` iterations; is given the iteration.
        save: called with the number of iterations after every checkpoint, to write what others read.
        what: what is trained, in a word.
        preparation: where the objective keeps what it prepares; cleared as soon as a checkpoint has it.
    """

    def __init__(
        self,
        objective: Objective,
        learner: Learner,
        settings: LoopSettings,
        *,
        facts: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        callback: Callable[[TrainingEvent], Any] | None = None,
        preview: Callable[[int], Any] | None = None,
        save: Callable[[int], None] | None = None,
        what: str = "training",
        preparation: Preparation | None = None,
    ) -> None:
        self._objective, self._learner, self._settings = objective, learner, settings
        self._facts = dict(facts or {})
        self._folder = folder
        self._callback, self._preview, self._save = callback, preview, save
        self._preparation = preparation or Preparation()
        self._written = 0.0
        self._what = what
        self._stopping = False

    def stop(self) -> None:
        """End the training after the running iteration; may be called from another thread."""
        self._stopping = True

    def run(self, resume: bool | None = None) -> LoopResult:
        """Train, or go on with a training.

        Args:
            resume: True goes on from the checkpoint in the folder, False begins anew; None goes on where
                there is a checkpoint of the same training.

        Raises:
            TrainingError: if `resume` is True and there is no checkpoint of the same training, more
                iterations are done already than are asked for, the checkpoint cannot be read, or a loss is no
                number.
            WriteError: nothing can be written into the folder.
            KeyboardInterrupt: after Ctrl-C; the checkpoint holds everything up to there.
        """
        if self._folder is not None:
            check_writable(self._folder)
        saved = self._saved(resume)
        if resume is False:
            self._preparation.clear()
        self._stopping = False
        optimiser = self._learner.optimiser()
        for group in optimiser.param_groups:
            group["full_lr"] = group["lr"]
        run = _Run(optimiser)
        optimiser.zero_grad(set_to_none=True)
        if saved is not None:
            self._restore(run, saved)
        else:
            self._objective.prepare()
            self._keep_state(run)
        self._iterate(run)
        return LoopResult(run.history, len(run.history) < self._settings.iterations)

    def _iterate(self, run: _Run) -> None:
        """Iterations, checkpoints, callbacks."""
        settings, first = self._settings, len(run.history)
        run.clock = Clock(run.history[-1]["seconds"] if run.history else 0.0)
        file = HistoryFile(self._folder / HISTORY_FILE if self._folder else None, run.history)
        interrupt = Interrupt()
        shown = Progress(self._what, settings.iterations, first, shown=settings.progress)
        with self._saving(run, interrupt), shown:
            for iteration in range(first, settings.iterations):
                run.complete = False
                row = self._iteration(run, iteration)
                run.history.append(row)
                run.complete = True
                file.append(row)
                done = iteration + 1
                shown.update(done, describe(row))
                if self._due(done, first):
                    self._checkpoint(run)
                left = run.clock.left(done - first, settings.iterations - done)
                if self._tell(row, left) is False or self._stopping or interrupt.asked:
                    break

    def _due(self, done: int, first: int) -> bool:
        """Whether a checkpoint is written now: after the first iteration of every run, then now and then."""
        if done >= self._settings.iterations:  # the end writes one
            return False
        late = time.monotonic() - self._written > CHECKPOINT_SECONDS
        return done == first + 1 or done % self._settings.checkpoint_every == 0 or late

    def _iteration(self, run: _Run, iteration: int) -> HistoryRow:
        """One iteration: losses, backward, updates; returns its history row."""
        factor = self._settings.rate(iteration)
        for group in run.optimiser.param_groups:
            group["lr"] = group["full_lr"] * factor
        with closing(self._objective.losses(iteration)) as losses:
            terms = [self._backward(run, term, iteration) for term in losses]
        updates = sum(term.update for term in terms)
        if not updates:
            raise TrainingError(f"the objective asked for no update in iteration {iteration + 1}")
        names = sorted({name for term in terms for name in term.parts})
        parts = {name: _mean([term.parts[name] for term in terms if name in term.parts]) for name in names}
        return {
            "iteration": iteration + 1,
            "loss": sum(float(term.loss) for term in terms) / updates,
            **self._learner.row(parts),
            "seconds": round(run.clock.seconds, 3),
        }

    def _backward(self, run: _Run, terms: LossTerms, iteration: int) -> LossTerms:
        """Backward on one loss, and an update where it asks for one; returns it as numbers."""
        if not torch.isfinite(terms.loss):
            loss = float(terms.loss.detach())
            raise TrainingError(f"the loss is {loss} in iteration {iteration + 1}: {terms.parts}")
        terms.loss.backward()  # type: ignore[no-untyped-call]
        if terms.update:
            if self._settings.gradient_clip:
                nn.utils.clip_grad_norm_(run.parameters, self._settings.gradient_clip)
            run.optimiser.step()
            run.optimiser.zero_grad(set_to_none=True)
        return LossTerms(terms.loss.detach(), terms.parts, terms.update)

    def _tell(self, row: HistoryRow, left: float) -> Any:
        """Make a preview where one is due and call the callback; returns what it says."""
        made, every, done = None, self._settings.preview_every, row["iteration"]
        if self._preview is not None and every and done % every == 0:
            made = self._preview(done)
        if self._callback is None:
            return None
        return self._callback(TrainingEvent(done, self._settings.iterations, row, left, made))

    @contextmanager
    def _saving(self, run: _Run, interrupt: Interrupt) -> Iterator[None]:
        """Write a checkpoint at the end, however it ends, unless an iteration was cut in the middle."""
        try:
            with interrupt.watching():
                yield
        finally:
            if run.complete:
                self._checkpoint(run)
        if interrupt.asked:
            raise KeyboardInterrupt

    def _checkpoint(self, run: _Run) -> None:
        self._keep_state(run)
        if self._folder is not None and self._save is not None:
            self._save(len(run.history))

    def _keep_state(self, run: _Run) -> None:
        if self._folder is None:
            return
        state = {
            "facts": self._facts,
            "learner": self._learner.state_dict(),
            "optimiser": run.optimiser.state_dict(),
            "objective": self._objective.state_dict(),
            "history": run.history,
        }
        save_state(self._folder, state)
        self._preparation.clear()
        self._written = time.monotonic()

    def _restore(self, run: _Run, saved: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; a learner that it does not fit is as it was."""
        before = copy.deepcopy(self._learner.state_dict())
        try:
            self._learner.load_state_dict(saved["learner"])
            run.optimiser.load_state_dict(saved["optimiser"])
            self._objective.load_state_dict(saved["objective"])
            run.history.extend(saved["history"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._learner.load_state_dict(before)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrainingError(f"{self._state_file} does not fit this training: {reason}") from error

    def _saved(self, resume: bool | None) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None to begin anew."""
        saved = None
        if self._folder is not None and resume is not False:
            saved = load_state(self._folder, ENTRIES)
        if saved is None:
            if resume:
                raise TrainingError(f"resume is True, and there is no checkpoint in {self._folder}")
            return None
        if not isinstance(saved["facts"], dict) or not isinstance(saved["history"], list):
            raise TrainingError(f"{self._state_file} is no training state: it is of another kind")
        different = differences(without_length(self._facts), without_length(saved["facts"]))
        done, wanted = len(saved["history"]), self._settings.iterations
        if done > wanted:
            different.append(f"iterations: {wanted} now, {done} are done in the checkpoint")
        if not different:
            return saved
        message = "\n  - ".join([f"the checkpoint in {self._folder} is of another training", *different])
        if resume:
            raise TrainingError(message)
        logger.warning("%s\nbeginning anew", message)
        return None

    @property
    def _state_file(self) -> str:
        return str(Path(self._folder or "") / STATE_FILE)


@dataclass
class _Run:
    """What changes from iteration to iteration."""

    optimiser: torch.optim.Optimizer
    history: list[HistoryRow] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    complete: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

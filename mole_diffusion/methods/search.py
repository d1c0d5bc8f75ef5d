"""A weight per expert found by gradient-free search, after LoRAHub (Huang et al. 2023, arXiv 2307.13269).

With their optimiser, bounds and penalty, but on the experts' deltas, where theirs mixes factors (as
`mole_diffusion.text.merging.lorahub` does). The objective is that of gate training, without gradient, so that
both are given the same: the same pictures, and as many passes of the UNet. Every candidate is judged on the
same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.training.search import History, l1_penalty, minimise, optimiser_maker

if TYPE_CHECKING:
    from mole_diffusion.methods.job import Job

#: Batches that a candidate is judged on: one pass each for collages, a whole rollout each for CLIP.
COLLAGE_BATCHES, ROLLOUTS = 4, 1
HISTORY_FILE = "search.jsonl"


def search(method: str, job: Job) -> None:
    """Search the weights for the prompts of a job; goes on where an earlier search in its folder stopped.

    Raises:
        ConfigError: nevergrad is not installed, or there are no prompts.
    """
    if not job.prompts:
        raise ConfigError("weights are searched for prompts, and none is given")
    from mole_diffusion.pictures.training.judging import ObjectiveScore

    names = list(job.pipe.experts)
    make_optimiser = optimiser_maker(len(names), job.config.seed)
    batches = COLLAGE_BATCHES if job.config.clip_guidance is None else ROLLOUTS
    objective = ObjectiveScore(job.pipe, job.prompts, job.concepts, job.config, batches)

    def score(weights: Sequence[float]) -> tuple[float, int]:
        before = objective.passes
        loss = objective.loss(dict(zip(names, weights, strict=True)))
        return loss + l1_penalty(weights), objective.passes - before

    history = History(job.folder / HISTORY_FILE)
    with objective.ready(job.folder):
        drawing = objective.passes
        passes = job.options.search_passes or job.config.iterations
        found, value = minimise(score, make_optimiser, passes, [0.0] * len(names), history)
        nla, _ = score([1 / len(names)] * len(names))
    job.passes["without_gradient"] = drawing + sum(row.passes for row in history.rows)
    weights = dict(zip(names, found, strict=True))
    job.details.update(mixture=weights, score=value, score_of_nla=nla)
    job.details.update(objective=job.config.objective, evaluations=len(history.rows))

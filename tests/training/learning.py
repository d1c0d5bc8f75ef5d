"""Do gates learn? On random networks every draw has a loss of its own, so draws are repeated."""

import copy
from typing import Any

import torch

from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig

#: Shares of the loss that a step along the gradient is asked to take off it.
SHARES = (1e-4, 3e-5, 1e-5)


def repeat_draws(trainer: GateTrainer) -> None:
    """Let the next losses be on the same noise, times and choices as all others after this call."""
    trainer.objective.bench.draws.tensors.manual_seed(99)
    trainer.objective.bench.draws.choices.seed(99)


@torch.no_grad()
def loss_of(trainer: GateTrainer) -> float:
    """The loss of the gates as they are, on the repeated draws."""
    repeat_draws(trainer)
    return sum(float(term.loss) for term in trainer.objective.losses(0))


def losses_before_and_after(
    pipe: Any, prompt: str, concepts: list[Concept], config: TrainingConfig
) -> tuple[float, float]:
    """Losses of fresh and of trained gates on the same draws, which the training repeats."""

    def repeat(_: object) -> None:
        repeat_draws(trainer)

    trainer = GateTrainer(pipe, prompt, concepts, config, callback=repeat)
    gates = {part: mixture.gates for part, mixture in pipe.mixtures.items()}
    fresh = {part: copy.deepcopy(module.state_dict()) for part, module in gates.items()}
    trainer.train()
    trained = loss_of(trainer)
    for part, module in gates.items():
        module.load_state_dict(fresh[part])
    return loss_of(trainer), trained


def promises_kept(pipe: Any, prompt: str, concepts: list[Concept], config: TrainingConfig) -> list[float]:
    """How much of what the gradient promises a small step takes off the loss, for steps of several sizes.

    A step of e g, against the gradient g, promises e |g|^2. One of the sizes is small enough for it to hold
    and large enough to be seen, so one of the ratios is about 1: on any network and machine, but only if the
    gradient is that of this loss, through sampler, decoder and CLIP.
    """
    trainer = GateTrainer(pipe, prompt, concepts, config)
    gates = [gate for mixture in pipe.mixtures.values() for gate in mixture.parameters()]
    trainer.objective.prepare()
    repeat_draws(trainer)
    with trainer.objective.ready(gates):
        loss = sum((term.loss for term in trainer.objective.losses(0)), torch.zeros(()))
        found = torch.autograd.grad(loss, gates, allow_unused=True)
    gradient = [torch.zeros(()) if one is None else one for one in found]
    before, squares = float(loss.detach()), sum(float(one.square().sum()) for one in gradient)
    kept = []
    for share in SHARES:
        step = share * before / squares
        _move(gates, gradient, -step)
        kept.append((before - loss_of(trainer)) / (share * before))
        _move(gates, gradient, step)
    return kept


@torch.no_grad()
def _move(gates: list[torch.nn.Parameter], direction: list[torch.Tensor], step: float) -> None:
    for gate, own in zip(gates, direction, strict=True):
        gate.add_(own, alpha=step)

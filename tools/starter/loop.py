"""A small resumable training loop shared by the steps of the starter's build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mole_diffusion.core.files import replacing


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Average:
    """Exponential moving average of a module's parameters, kept as plain tensors."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.count = module, decay, 0
        self.values = {k: v.detach().clone() for k, v in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's weights of now into the average."""
        self.count += 1
        # A short memory at first, so that the random start is forgotten.
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        names = list(self.values)
        current = dict(self.module.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [current[n] for n in names], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give a module of the same kind the averaged weights."""
        for name, value in module.named_parameters():
            value.copy_(self.values[name])


def train(
    name: str,
    folder: Path,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.01,
    average: Average | None = None,
    checkpoint_every: int = 250,
    quiet: bool = False,
) -> None:
    """Minimise ``loss_of(step)`` over ``module``'s trainable parameters with AdamW.

    All randomness of ``loss_of`` must come from its step number: then a killed run continues exactly from
    ``folder/NAME.pt``, which is written every ``checkpoint_every`` steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    first = _restore(path, module, optimiser, average) if path.is_file() else 0
    smooth = None
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, disable=quiet, mininterval=10)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = rate * cosine(step, steps)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if average is not None:
            average.update()
        value = float(loss.detach())
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _save(path, module, optimiser, average, step + 1)


def _save(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: Average | None, step: int
) -> None:
    frozen = {k for k, p in module.named_parameters() if not p.requires_grad}
    state = {
        "module": {k: v for k, v in module.state_dict().items() if k not in frozen},
        "optimiser": optimiser.state_dict(),
        "step": step,
        "average": average.values if average else {},
        "count": average.count if average else 0,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _restore(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, average: Average | None) -> int:
    """The number of steps done."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"], strict=False)  # frozen parameters are not in the file
    optimiser.load_state_dict(state["optimiser"])
    if average is not None:
        average.values, average.count = state["average"], int(state["count"])
    return int(state["step"])

"""The resumable training loop shared by the steps of the starter's build; a CUDA device replays one graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mole_diffusion.core.files import replacing

Batch = dict[str, Tensor]
_WARM_UP = 3
"""Steps before a CUDA graph is captured: kernels are chosen and the optimiser's state is made in them."""


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    warmup = min(warmup, max(1, steps // 10))
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


class _Step:
    """One optimisation step; on CUDA, after a few steps, a replayed graph."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimiser: torch.optim.Optimizer,
        loss_of: Callable[[Batch], Tensor],
        graph: bool,
        clip: float | None,
    ) -> None:
        self.parameters, self.optimiser, self.loss_of, self.wanted = parameters, optimiser, loss_of, graph
        self.clip = clip
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: Batch = {}
        self.loss = torch.zeros(())

    def _once(self, batch: Batch) -> Tensor:
        loss = self.loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        return loss.detach()

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step; the loss before it."""
        self.done += 1
        if self.graph is not None:
            for name, value in batch.items():
                self.held[name].copy_(value)
            self.graph.replay()
            return self.loss
        if self.wanted and self.done > _WARM_UP:
            self.held = {name: value.clone() for name, value in batch.items()}
            self.optimiser.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self._once(self.held)
            self.graph.replay()
            return self.loss
        self.optimiser.zero_grad(set_to_none=True)
        stream = torch.cuda.Stream() if self.wanted else None
        if stream is None:
            return self._once(batch)
        # Graphs want their warm-up on a stream of its own.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._once(batch)
        torch.cuda.current_stream().wait_stream(stream)
        return loss


def train(
    name: str,
    folder: Path,
    module: nn.Module,
    make: Callable[[int], Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.01,
    average: float | None = None,
    checkpoint_every: int = 1000,
    quiet: bool = False,
    graph: bool = True,
    clip: float | None = 1.0,
) -> None:
    """Minimise `loss_of(make(step))` over `module`'s trainable parameters with AdamW.

    All randomness must come from `make` and its step number: then a killed run continues exactly from
    `folder/NAME.pt`, which is written every `checkpoint_every` steps.

    Args:
        average: decay of a moving average of the weights, which the module has at the end; None for none.
        make: tensors of a step; names and shapes are the same in every step.
        graph: on a CUDA device capture the step as a graph; `loss_of` must not wait for the device then.
        clip: largest norm of the gradient; None leaves it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    on_cuda = trained[0].is_cuda
    speed = torch.tensor(rate, device=trained[0].device)
    optimiser = torch.optim.AdamW(groups, lr=speed, betas=(0.9, 0.99), fused=True, capturable=on_cuda)
    smooth = None if average is None else Average(module, average)
    first = _restore(path, module, optimiser, smooth) if path.is_file() else 0
    for group in optimiser.param_groups:
        group["lr"] = speed
    one = _Step(trained, optimiser, loss_of, graph and on_cuda, clip)
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, disable=quiet, mininterval=10)
    for step in bar:
        speed.fill_(rate * cosine(step, steps))
        loss = one(make(step))
        if smooth is not None:
            smooth.update()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _save(path, module, optimiser, smooth, step + 1)
    if smooth is not None:
        smooth.copy_to(module)


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

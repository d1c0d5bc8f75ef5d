"""A training loop for a time budget: one static step, replayed as a CUDA graph where there is CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mole_diffusion.core.files import replacing

Tensors = tuple[Tensor, ...]
_AHEAD = 50
_CHECKPOINT_SECONDS = 20.0


def rate(step: int, steps: int, warmup: int, elapsed: float = 0.0) -> float:
    """Share of the full learning rate: linear up, then linear down to a fiftieth.

    Args:
        step, steps: how many are done, and how many there are.
        warmup: steps with a smaller rate.
        elapsed: share of the time that is gone, if that decides.
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, 1.0 - max(elapsed, (step - warmup) / max(1, steps - warmup)))


class Step:
    """One step of AdamW on the loss of a static batch.

    Args:
        loss: of the tensors of a batch.
        parameters: what trains, by name.
        batch: an example of a batch, whose shapes stay.
        lr, decay: of AdamW.
        clip: largest norm of the gradient; None for any.
        compiled: whether `torch.compile` makes the loss; what it cannot compile runs as it is.
    """

    def __init__(
        self,
        loss: Callable[[Tensors], Tensor],
        parameters: Mapping[str, Tensor],
        batch: Tensors,
        lr: float,
        decay: float,
        clip: float | None,
        *,
        compiled: bool = False,
    ) -> None:
        self._loss, self._clip, self._lr = loss, clip, lr
        self._compiled = torch.compile(loss, dynamic=False) if compiled else None
        self._parameters = list(parameters.values())
        device = self._parameters[0].device
        self._cuda = device.type == "cuda"
        self._rate = torch.tensor(lr, device=device) if self._cuda else lr
        self.optimiser = torch.optim.AdamW(
            self._parameters,
            lr=self._rate,
            betas=(0.9, 0.98),
            weight_decay=decay,
            capturable=self._cuda,
            fused=self._cuda,
        )
        self._batch = tuple(part.clone() for part in batch)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.last = torch.zeros((), device=device)

    def _eager(self) -> None:
        self.optimiser.zero_grad()
        loss = self._loss(self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.optimiser.step()
        self.last = loss.detach()

    def capture(self) -> None:
        """Compile and record the step; it has run a few times before, at a rate of zero."""
        self.set_rate(0.0)
        self._compile()
        if not self._cuda:
            self._forget()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._eager()
            self._graph = graph
        except RuntimeError as error:
            print(f"no CUDA graph, every step is launched anew: {error}", flush=True)
        self._forget()

    def _compile(self) -> None:
        if self._compiled is None:
            return
        plain, self._loss = self._loss, self._compiled
        try:
            self._eager()
        except Exception as error:  # Whatever a compiler may meet, the step itself is known to run.
            print(f"not compiled: {type(error).__name__}: {str(error)[:500]}", flush=True)
            self._loss = plain

    def _forget(self) -> None:
        for state in self.optimiser.state.values():
            for value in state.values():
                value.zero_()

    def set_rate(self, share: float) -> None:
        """Set the learning rate to a share of the full one."""
        if isinstance(self._rate, Tensor):
            self._rate.fill_(self._lr * share)
        else:
            for group in self.optimiser.param_groups:
                group["lr"] = self._lr * share

    def __call__(self, batch: Tensors) -> None:
        """Train on a batch."""
        for static, part in zip(self._batch, batch, strict=True):
            static.copy_(part)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._eager()


def train(
    name: str,
    step: Step,
    parameters: Mapping[str, Tensor],
    draw: Callable[[torch.Generator], Tensors],
    *,
    steps: int | None,
    seconds: float,
    work: Path,
    seed: int,
    log: Callable[[str], None],
    warmup: int = 200,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Train for a number of steps, or for as many as fit a time; goes on from its checkpoint.

    Args:
        name: of the checkpoint.
        step: what a step does.
        parameters: what trains, by name.
        draw: makes a batch.
        steps: how many; None for those that fit `seconds`.
        seconds: see `steps`.
        work: folder of the checkpoint.
        seed: of the batches.
        log: is told how it goes.
        warmup: steps with a smaller rate.
        meanwhile: is called before every checkpoint.

    Returns:
        The number of steps.
    """
    device = next(iter(parameters.values())).device
    rng = torch.Generator(device=device).manual_seed(seed)
    path, first = work / f"{name}.pt", 0
    if path.is_file():
        first, steps = _restore(path, step, parameters, rng)
    else:
        step.capture()
    start = saved = time.monotonic()
    seconds = max(seconds, 1.0)
    done = first
    while steps is None or done < steps:
        # Other work on the device may make steps slower than they were: the time decides.
        elapsed = (time.monotonic() - start) / seconds if steps is None else 0.0
        if elapsed > 1.0:
            break
        step.set_rate(rate(done, steps or 10**9, warmup, elapsed))
        step(draw(rng))
        done += 1
        if done % _AHEAD == 0:
            # Steps are queued faster than they run; the clock is to see those that ran.
            _wait(device)
        if done % 250 == 0:
            pace = (time.monotonic() - start) / (done - first)
            log(f"{name}: step {done}, {1000 * pace:.1f} ms each, loss {float(step.last):.3f}")
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            saved = time.monotonic()
            meanwhile()
            _save(path, step, parameters, rng, (done, steps))
    _wait(device)
    return done


def _save(
    path: Path,
    step: Step,
    parameters: Mapping[str, Tensor],
    rng: torch.Generator,
    done: tuple[int, int | None],
) -> None:
    state = {
        "parameters": dict(parameters),
        "optimiser": step.optimiser.state_dict(),
        "rng": rng.get_state(),
        "done": done,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _restore(
    path: Path, step: Step, parameters: Mapping[str, Tensor], rng: torch.Generator
) -> tuple[int, int | None]:
    """(steps done, steps in all) of a checkpoint."""
    state = torch.load(path, map_location=rng.device, weights_only=True)
    with torch.no_grad():
        for key, value in state["parameters"].items():
            parameters[key].copy_(value)
    step.optimiser.load_state_dict(state["optimiser"])
    rng.set_state(state["rng"].cpu())
    done: tuple[int, int | None] = tuple(state["done"])
    return done


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

"""Time, memory and number of operations of forwards, on the CPU and on CUDA devices."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import torch
from torch.autograd import profiler_legacy
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.networks import Forward

MIB = 2**20
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Variant:
    """Something to measure.

    Attributes:
        forward: what is timed.
        before: what must be done before, untimed.
    """

    forward: Forward
    before: Callable[[], None] | None = None

    def prepare(self) -> None:
        """Do that."""
        if self.before is not None:
            self.before()


def seconds_of(forward: Forward, device: torch.device) -> float:
    """Seconds of one forward: from its first launch to the end of its last kernel."""
    if device.type != "cuda":
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start
    first: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    first.record()
    forward()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def measure(
    variants: Mapping[str, Variant], rounds: int, device: torch.device, until: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one round that is thrown away.

    Each round runs every variant once, each round in another order; a ratio compares two runs of one round,
    so that a machine that slows down does so for all.

    Args:
        until: value of `time.monotonic` after which no further round begins, once there are three.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if number > _LEAST_ROUNDS and time.monotonic() > until:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            variants[name].prepare()
            spent = seconds_of(variants[name].forward, device)
            if number:
                seconds[name].append(spent)
    return seconds


def median_ratio(runs: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of two variants within a round."""
    return statistics.median(a / b for a, b in zip(runs, others, strict=True))


def operations(forward: Forward) -> int:
    """ATen operations of a forward as torch's profiler counts them, those that call others included."""
    # The profiler of old counts the same and neither starts a service nor writes to the console.
    with profiler_legacy.profile() as profiler:  # type: ignore[no-untyped-call]
        forward()
    return sum(event.name.startswith("aten::") for event in profiler.function_events)


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach a device's kernels, by name; views are not among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count it."""
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view:
            name = str(func)
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def launches(forward: Forward, device: torch.device) -> int:
    """Kernels, copies and fills that a forward gives to a GPU; elsewhere its operations that are no views."""
    if device.type != "cuda":
        counted = Dispatched()
        with counted:
            forward()
        return counted.total
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        forward()
        torch.cuda.synchronize(device)
    return len([event for event in profiler.events() if event.device_type.name == "CUDA"])


def allocated(device: torch.device) -> int | None:
    """Bytes of tensors on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_allocated(device))


def peak_of(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a piece of work needs at most beside what there was before; None without a CUDA device."""
    before = allocated(device)
    if before is None:
        work()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def mebibytes(size: int | None) -> str:
    """For tables."""
    return "–" if size is None else f"{size / MIB:,.0f}"


def machine(device: torch.device) -> dict[str, Any]:
    """What a number was measured on."""
    facts = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts["card"] = card.name
        facts["card_memory_mib"] = card.total_memory // MIB
        facts["cuda"] = torch.version.cuda
    return facts

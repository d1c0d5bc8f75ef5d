"""Examples as tensors, made by other processes while the model already trains on the first of them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import Task
from mole_diffusion.starter.text.words import Example

from .words import SOURCE, TARGET, encode

Arrays = tuple[np.ndarray, np.ndarray]
#: Longest source and target of each bucket of the base's lessons.
BUCKETS = ((16, 8), (24, TARGET), (SOURCE, TARGET))
_CHUNK = 20_000
# Batches between two looks for new examples.
_ARRIVE = 25


class Makers:
    """Processes that make examples; they have to be asked before any device is in use.

    Args:
        tokenizer: its file.
        processes: how many; 1 makes them in this process, when they are asked for.
    """

    def __init__(self, tokenizer: Path, processes: int) -> None:
        self._tokenizer = str(tokenizer)
        # A fork has everything imported; no other thread runs yet.
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(processes, mp_context=context) if processes > 1 else None

    def lessons(self, count: int, seed: str) -> list[Future[Arrays]]:
        """Chunks of examples for the base."""
        seeds = [f"lessons {seed} {number}" for number in range(-(-count // _CHUNK))]
        return [self._ask(_lessons, self._tokenizer, min(_CHUNK, count), one) for one in seeds]

    def exercises(self, tasks: Sequence[Task], count: int, seed: str) -> list[Future[Arrays]]:
        """Examples of each task."""
        return [self._ask(_task, self._tokenizer, task, count, seed) for task in tasks]

    def close(self) -> None:
        """End the processes; what they have not begun is left."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, make, *given) -> Future[Arrays]:  # type: ignore[no-untyped-def]
        if self._pool is not None:
            return self._pool.submit(make, *given)
        found: Future[Arrays] = Future()
        found.set_result(make(*given))
        return found


class Lessons:
    """The base's examples in buckets by length, on a device; they grow while chunks arrive.

    Args:
        chunks: of `Makers.lessons`.
        device: where they lie.
        batch: rows of a batch, over all buckets.
        whole: whether to wait for all of them at once, so that batches do not depend on the pace.
    """

    def __init__(
        self, chunks: list[Future[Arrays]], device: torch.device, batch: int, *, whole: bool
    ) -> None:
        self._chunks, self._device, self._drawn = list(chunks), device, 0
        first = _bucketed(self._chunks.pop(0).result())
        total = sum(len(sources) for sources, _ in first)
        # As many rows of each bucket as there are: every example is as likely as any other.
        self._rows = [max(1, round(batch * len(sources) / total)) for sources, _ in first]
        self._sources = [sources.to(device) for sources, _ in first]
        self._targets = [targets.to(device) for _, targets in first]
        self.arrive(wait=whole)

    def arrive(self, *, wait: bool = False) -> None:
        """Take in the chunks that are there."""
        ready = [chunk for chunk in self._chunks if wait or chunk.done()]
        if not ready:
            return
        self._chunks = [chunk for chunk in self._chunks if chunk not in ready]
        found = [_bucketed(chunk.result()) for chunk in ready]
        for number in range(len(BUCKETS)):
            for own, part in ((self._sources, 0), (self._targets, 1)):
                new = torch.cat([one[number][part] for one in found]).to(self._device)
                own[number] = torch.cat([own[number], new])

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def draw(self, rng: torch.Generator) -> tuple[Tensor, ...]:
        """A batch: sources and targets of each bucket in turn."""
        self._drawn += 1
        if self._drawn % _ARRIVE == 0:
            self.arrive()
        batch: list[Tensor] = []
        for sources, targets, rows in zip(self._sources, self._targets, self._rows, strict=True):
            chosen = torch.randint(len(sources), (rows,), generator=rng, device=self._device)
            batch += [sources[chosen].long(), targets[chosen].long()]
        return tuple(batch)


def _bucketed(arrays: Arrays) -> list[tuple[Tensor, Tensor]]:
    """The examples of each bucket: the first that they fit."""
    long = [(part != 0).sum(1) for part in arrays]
    left = np.ones(len(long[0]), bool)
    found = []
    for source, target in BUCKETS:
        fits = left & (long[0] <= source) & (long[1] <= target)
        left &= ~fits
        found.append(
            (
                torch.from_numpy(np.ascontiguousarray(arrays[0][fits, :source])),
                torch.from_numpy(np.ascontiguousarray(arrays[1][fits, :target])),
            )
        )
    return found


def beside(found: Sequence[Arrays]) -> tuple[Tensor, Tensor]:
    """(sources (tasks, n, L), targets (tasks, n, T)): equally many examples of each task."""
    least = min(len(sources) for sources, _ in found)
    sources, targets = (np.stack([pair[part][:least] for pair in found]) for part in (0, 1))
    return torch.from_numpy(sources), torch.from_numpy(targets)


def sources_of(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> Tensor:
    """(n, length) what the model reads; examples have been made to fit."""
    rows = [one.ids for one in tokenizer.encode_batch([example.source for example in examples])]
    return torch.tensor([(row + [0] * length)[:length] for row in rows])


def _lessons(tokenizer: str, count: int, seed: str) -> Arrays:
    rng = Random(seed)
    return encode(_tokenizer(tokenizer), [some_lesson(rng) for _ in range(count)])


def _task(tokenizer: str, task: Task, count: int, seed: str) -> Arrays:
    return encode(_tokenizer(tokenizer), task.examples(count, seed, held_out=False))


def _tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokenizer.from_file(path)

"""Examples as tensors, made by all processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import Task
from mole_diffusion.starter.text.words import Example

from .words import encode

Arrays = tuple[np.ndarray, np.ndarray]
_CHUNK = 20_000


def lessons(tokenizer: Path, count: int, seed: str, processes: int) -> tuple[Tensor, Tensor]:
    """(sources, targets) for the base."""
    seeds = [f"lessons {seed} {number}" for number in range(-(-count // _CHUNK))]
    return _together(
        _in_parallel(_lessons, [(str(tokenizer), min(_CHUNK, count), one) for one in seeds], processes)
    )


def _lessons(tokenizer: str, count: int, seed: str) -> Arrays:
    rng = Random(seed)
    return encode(_tokenizer(tokenizer), [some_lesson(rng) for _ in range(count)])


def of_tasks(
    tokenizer: Path, tasks: Sequence[Task], count: int, seed: str, processes: int
) -> tuple[Tensor, Tensor]:
    """(sources (tasks, n, L), targets (tasks, n, T)) for experts: equally many examples of each task."""
    found = _in_parallel(_task, [(str(tokenizer), task, count, seed) for task in tasks], processes)
    least = min(len(sources) for sources, _ in found)
    sources, targets = (np.stack([pair[part][:least] for pair in found]) for part in (0, 1))
    return torch.from_numpy(sources), torch.from_numpy(targets)


def _task(tokenizer: str, task: Task, count: int, seed: str) -> Arrays:
    return encode(_tokenizer(tokenizer), task.examples(count, seed, held_out=False))


def sources_of(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> Tensor:
    """(n, length) what the model reads; examples have been made to fit."""
    rows = [one.ids for one in tokenizer.encode_batch([example.source for example in examples])]
    return torch.tensor([(row + [0] * length)[:length] for row in rows])


def _tokenizer(path: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Tokenizer.from_file(path)


def _in_parallel(make, work, processes: int) -> list[Arrays]:  # type: ignore[no-untyped-def]
    if processes <= 1:
        return [make(*one) for one in work]
    # A fork has everything imported; no other thread runs yet, and no device is in use.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(make, *zip(*work, strict=True)))


def _together(found: list[Arrays]) -> tuple[Tensor, Tensor]:
    sources, targets = (np.concatenate([pair[part] for pair in found]) for part in (0, 1))
    return torch.from_numpy(sources), torch.from_numpy(targets)

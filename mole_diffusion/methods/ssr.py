"""SSR-Merge: one LoRA that sends each signal of the experts' rank space back to the expert it came from.

After arXiv 2606.10617: with the experts' factors side by side, z = A_cat x, a matrix R is put between them,
B_cat R A_cat. R is the least-squares answer to: on the signals of each expert's own prompt, let only that
expert's ranks through. G is the sum of z z^T over all prompts, Q_k keeps the rows of expert k's ranks for the
signals of prompt k; R = sum_k Q_k (G + eps)^-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.export import lora_header, write_lora
from mole_diffusion.core.keys import factor_keys
from mole_diffusion.core.matrices import MatrixSlot
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.ranks import SharedDown, rank_rows, share_down
from mole_diffusion.methods.merges import LORA_FILE, check_biases

if TYPE_CHECKING:
    from mole_diffusion.methods.job import Job

#: Steps of the picture that each expert draws of its own prompt.
STEPS = 10
#: Of the mean of G's diagonal, added to it.
_RIDGE = 1e-4


class _Signals:
    """What one matrix is seen to send through the experts' ranks.

    Args:
        slot: the matrix.
    """

    def __init__(self, slot: MatrixSlot) -> None:
        self.slot = slot
        self._owners = [index for index, one in slot.factors.items() for _ in range(one.width)]
        size = len(self._owners)
        self._all, self._kept = torch.zeros(size, size), torch.zeros(size, size)
        self._down: SharedDown | None = None

    def watch(self, expert: int) -> Any:
        """Add the signals of forwards in which one expert is alone, until the handle is removed."""
        own = torch.tensor([owner == expert for owner in self._owners])

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._down is None:
                factors = [list(self.slot.factors.values())]
                self._down = share_down(module, factors, output.device, output.dtype)
            z = rank_rows(module, args[0], self._down).float()
            total = (z.T @ z).cpu()
            self._all += total
            self._kept[own] += total[own]

        return self.slot.module.register_forward_hook(add)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the merged LoRA, the experts' scaling inside."""
        ridge = _RIDGE * self._all.diagonal().mean().clamp_min(1e-12)
        between = torch.linalg.solve(self._all + ridge * torch.eye(len(self._all)), self._kept.T).T
        experts = self.slot.factors.values()
        up = torch.cat([one.weighted_up() for one in experts], dim=1) @ between
        down = torch.cat([one.down.float() for one in experts])
        return down, up.view(*up.shape, *(1 for _ in down.shape[2:]))


def merge(method: str, job: Job) -> None:
    """Merge the experts of a pipeline into one LoRA file, which any program can load.

    Raises:
        ConfigError: an expert changes biases.
    """
    pipe = job.pipe
    signals: list[tuple[str, _Signals]] = []
    for part, mixture in pipe.mixtures.items():
        check_biases(mixture)
        signals += [(part, _Signals(slot)) for slot in _slots(mixture)]
    for index, name in enumerate(pipe.experts):
        with _watched(signals, index):
            pipe(
                job.concepts[name].text,
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(job.config.seed),
                mixture={name: 1.0},
                output_type="latent",
            )
        job.passes["without_gradient"] += STEPS
    tensors: dict[str, Tensor] = {}
    for part, found in signals:
        keys = factor_keys(part, found.slot.name, "diffusers")
        for role, factor in zip(("down", "up"), found.factors(), strict=True):
            tensors[keys[role]] = factor.contiguous()
    write_lora(
        job.folder / LORA_FILE, tensors, lora_header("merge ssr", pipe.experts.values(), pipe.ensemble.facts)
    )


def _slots(mixture: Mixture) -> Iterator[MatrixSlot]:
    return (slot for group in mixture.groups for slot in group.slots)


@contextmanager
def _watched(signals: list[tuple[str, _Signals]], expert: int) -> Iterator[None]:
    handles = [found.watch(expert) for _, found in signals]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

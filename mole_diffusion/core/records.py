"""The gate weights of one call as rows that say which network, step and picture they belong to."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import nn

from .mixture import Mixture


@dataclass(frozen=True)
class GateWeight:
    """How much one expert counted in one group, averaged over tokens.

    Attributes:
        network: part of the pipeline, "unet" or "text_encoder".
        group: the group of matrices that share the gate, e.g. a transformer block's name; with the suffix
            ".context" for a group's gate on text tokens.
        step: index of the denoising step, None for the text encoder, which runs once.
        branch: "prompt" or "negative" (the half of the batch that classifier-free guidance adds).
        entry: index of the picture in the batch (of the prompt, for the text encoder).
        expert: expert name.
        weight: gate weight; an expert that was not active has 0.
    """

    network: str
    group: str
    step: int | None
    branch: str
    entry: int
    expert: str
    weight: float


class GateWeights(Sequence[GateWeight]):
    """The rows of one call, in the order in which the networks ran."""

    def __init__(self, rows: Sequence[GateWeight] = ()) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[GateWeight]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> GateWeight: ...
    @overload
    def __getitem__(self, index: slice) -> "GateWeights": ...
    def __getitem__(self, index: int | slice) -> "GateWeight | GateWeights":
        return GateWeights(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        networks = ", ".join(dict.fromkeys(row.network for row in self._rows))
        return f"GateWeights({len(self)} rows; networks: {networks or 'none'})"

    def where(self, **fields: Any) -> "GateWeights":
        """The rows whose fields have the given values, e.g. `where(network="unet", branch="prompt")`."""
        return GateWeights([r for r in self._rows if all(getattr(r, k) == v for k, v in fields.items())])

    def to_dicts(self) -> list[dict[str, Any]]:
        """One plain dict per row, for JSON lines or a data frame."""
        return [asdict(row) for row in self._rows]

    def to_array(
        self, network: str = "unet", branch: str = "prompt"
    ) -> tuple[torch.Tensor, dict[str, list[Any]]]:
        """The weights of one network as a tensor.

        Returns:
            weights (groups, steps, entries, experts), float32, and the labels of the four axes under the keys
            "group", "step", "entry" and "expert".
        """
        rows = self.where(network=network, branch=branch)
        axes = ("group", "step", "entry", "expert")
        labels: dict[str, list[Any]] = {
            axis: list(dict.fromkeys(getattr(r, axis) for r in rows)) for axis in axes
        }
        places = [{label: i for i, label in enumerate(labels[axis])} for axis in axes]
        weights = torch.zeros([len(labels[axis]) for axis in axes])
        for row in rows:
            index = tuple(place[getattr(row, axis)] for place, axis in zip(places, axes, strict=True))
            weights[index] = row.weight
        return weights, labels


@dataclass(frozen=True)
class _Run:
    """One forward of one network: its gates' weights, label -> (B, N), and how many entries are negative."""

    network: str
    step: int | None
    negative: int
    experts: tuple[str, ...]
    weights: Mapping[str, torch.Tensor]


class CallRecorder:
    """Keeps the gate weights of every forward of the networks during one pipeline call.

    Forward hooks on the networks take them, so that the user's callbacks and any scheduler (some run the UNet
    more often than they have steps) stay untouched, and compiled networks see no step number that changes.
    Weights stay on their device until somebody asks.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    @contextmanager
    def recording(
        self,
        mixtures: Mapping[str, Mixture],
        networks: Mapping[str, nn.Module],
        guided: Callable[[], bool],
        text_branches: Sequence[str],
    ) -> Iterator[None]:
        """Record the forwards inside the `with` block.

        Args:
            mixtures: by part.
            networks: what the pipeline calls, by part; a compiled network is not the mixture's own.
            guided: whether the UNet's batch has a negative half right now.
            text_branches: what each forward of the text encoder is for, "prompt" or "negative".
        """
        handles = [
            networks[part].register_forward_hook(self._taker(part, mixture, guided, text_branches))
            for part, mixture in mixtures.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _taker(
        self, part: str, mixture: Mixture, guided: Callable[[], bool], text_branches: Sequence[str]
    ) -> Callable[..., None]:
        count = itertools.count()

        def take(*_: Any) -> None:
            index = next(count)
            weights = {label: live.detach() for label, live in mixture.live_weights().items()}
            entries = max((len(live) for live in weights.values()), default=0)
            if part == "unet":
                step, negative = index, entries // 2 if guided() else 0
            else:
                step, negative = (
                    None,
                    entries if list(text_branches[index : index + 1]) == ["negative"] else 0,
                )
            self._runs.append(_Run(part, step, negative, mixture.expert_names, weights))

        return take

    @cached_property
    def rows(self) -> GateWeights:
        """What was recorded, one row per network, step, group, entry and expert."""
        return GateWeights([row for run in self._runs for row in _rows(run)])


def _rows(run: _Run) -> Iterator[GateWeight]:
    for group, weights in run.weights.items():
        for i, entry in enumerate(weights.float().cpu().tolist()):
            negative = i < run.negative
            for expert, weight in zip(run.experts, entry, strict=True):
                yield GateWeight(
                    network=run.network,
                    group=group,
                    step=run.step,
                    branch="negative" if negative else "prompt",
                    entry=i if negative else i - run.negative,
                    expert=expert,
                    weight=weight,
                )

"""The gate weights of one call as rows that say which network, step and picture they belong to."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mole_diffusion.context import GateRecord
from mole_diffusion.inject import Mixture


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


class CallRecorder:
    """Counts the forwards of the networks during one pipeline call and names the rows afterwards.

    The count goes into `Mixture.step` from a forward pre-hook on each network, so that the user's callbacks
    and any scheduler (some run the UNet more often than they have steps) stay untouched.
    """

    def __init__(self, mixtures: Mapping[str, Mixture], networks: Mapping[str, nn.Module]) -> None:
        self._mixtures = dict(mixtures)
        self._networks = dict(networks)
        self._handles: list[RemovableHandle] = []
        self._guided: dict[int, bool] = {}

    def start(self, guided: Callable[[], bool]) -> None:
        """Begin to record. `guided()` says whether the UNet's batch has a negative half right now."""
        for part, mixture in self._mixtures.items():
            mixture.record(True)
            self._handles.append(
                self._networks[part].register_forward_pre_hook(self._counter(part, mixture, guided))
            )

    def _counter(self, part: str, mixture: Mixture, guided: Callable[[], bool]) -> Callable[..., None]:
        calls = itertools.count()

        def count(*_: Any) -> None:
            mixture.step = next(calls)
            if part == "unet":
                self._guided[mixture.step] = guided()

        return count

    def stop(self, text_branches: Sequence[str]) -> GateWeights:
        """End recording and give the rows. `text_branches`: what each run of the text encoder was for."""
        for handle in self._handles:
            handle.remove()
        rows: list[GateWeight] = []
        # The text encoder runs first.
        for part in sorted(self._mixtures, key=lambda part: part == "unet"):
            mixture = self._mixtures[part]
            for record in mixture.records:
                rows += self._rows(record, mixture.expert_names, text_branches)
            mixture.record(False)
            mixture.step = None
        return GateWeights(rows)

    def _rows(
        self, record: GateRecord, names: Sequence[str], text_branches: Sequence[str]
    ) -> list[GateWeight]:
        assert record.step is not None  # set by the counter before any gate ran
        step: int | None
        if record.part == "unet":
            step, half = record.step, len(record.weights) // 2 if self._guided[record.step] else 0
        else:
            step, half = (
                None,
                len(record.weights) if text_branches[record.step : record.step + 1] == ["negative"] else 0,
            )
        return [
            GateWeight(
                network=record.part,
                group=record.group,
                step=step,
                branch="negative" if i < half else "prompt",
                entry=i if i < half else i - half,
                expert=name,
                weight=weight,
            )
            for i, weights in enumerate(record.weights.tolist())
            for name, weight in zip(names, weights, strict=True)
        ]

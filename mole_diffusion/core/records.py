"""Gate weights of forwards: a recorder, rows that say where each weight belongs, and their means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ConfigError
from .mixture import Mixture

PROMPT, NEGATIVE = "prompt", "negative"

#: network -> gate (a group's name, with ".context" for its gate on text tokens) -> expert -> mean weight.
MeanWeights = dict[str, dict[str, dict[str, float]]]
#: (mixture, index of its network's forward, batch entries) -> (step, how many of the first entries are of the
#: negative prompt; of the last ones, where the number is below zero).
Placing = Callable[[Mixture, int, int], tuple[int | None, int]]


@dataclass(frozen=True)
class GateWeight:
    """How much one expert counted in one group, averaged over tokens.

    Attributes:
        network: what the host calls the network.
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


@dataclass(frozen=True, eq=False)
class GateRecord:
    """Gate weights of one gate in one branch of one forward.

    Attributes:
        network, group, step, branch: as in `GateWeight`.
        entries: indices of the batch entries within the branch, B of them.
        experts: names, N of them.
        weights: (B, N) float32 on the CPU, mean over tokens; rows over all experts sum to 1.
    """

    network: str
    group: str
    step: int | None
    branch: str
    entries: tuple[int, ...]
    experts: tuple[str, ...]
    weights: Tensor

    def rows(self) -> Iterator[GateWeight]:
        """One row per entry and expert."""
        for entry, weights in zip(self.entries, self.weights.tolist(), strict=True):
            for expert, weight in zip(self.experts, weights, strict=True):
                yield GateWeight(self.network, self.group, self.step, self.branch, entry, expert, weight)

    def only(self, entry: int | None, expert: str | None) -> GateRecord:
        """The same for one entry, one expert or both."""
        rows = [i for i, own in enumerate(self.entries) if entry is None or own == entry]
        columns = [i for i, own in enumerate(self.experts) if expert is None or own == expert]
        return replace(
            self,
            entries=tuple(self.entries[i] for i in rows),
            experts=tuple(self.experts[i] for i in columns),
            weights=self.weights[rows][:, columns],
        )


class GateWeights(Sequence[GateWeight]):
    """Gate weights as rows, in the order in which the networks ran.

    Attributes:
        records: the same, one per gate, branch and forward.
    """

    def __init__(self, records: Iterable[GateRecord] = ()) -> None:
        self.records = tuple(records)

    @cached_property
    def _rows(self) -> tuple[GateWeight, ...]:
        return tuple(row for record in self.records for row in record.rows())

    def __len__(self) -> int:
        return sum(record.weights.numel() for record in self.records)

    def __iter__(self) -> Iterator[GateWeight]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> GateWeight: ...
    @overload
    def __getitem__(self, index: slice) -> GateWeights: ...
    def __getitem__(self, index: int | slice) -> GateWeight | GateWeights:
        if isinstance(index, slice):
            return GateWeights(_record_of(row) for row in self._rows[index])
        return self._rows[index]

    def __repr__(self) -> str:
        networks = ", ".join(dict.fromkeys(record.network for record in self.records))
        return f"GateWeights({len(self)} rows; networks: {networks or 'none'})"

    def where(self, **fields: Any) -> GateWeights:
        """The rows whose fields have the given values, e.g. `where(branch="prompt", step=0)`.

        Raises:
            ConfigError: rows have no such field to be told by.
        """
        _check_fields(fields)
        entry, expert = (fields.pop(name, None) for name in ("entry", "expert"))
        chosen = [r for r in self.records if all(getattr(r, name) == value for name, value in fields.items())]
        if entry is not None or expert is not None:
            chosen = [record.only(entry, expert) for record in chosen]
        return GateWeights(record for record in chosen if record.weights.numel())

    def mean(self, *fields: str) -> dict[tuple[Any, ...], float]:
        """Mean weights by some fields, over all others: `mean("network", "group", "expert")`.

        Returns:
            The fields' values -> mean weight, in the order in which the networks ran.
        Raises:
            ConfigError: rows have no such field to be told by.
        """
        _check_fields(fields)
        sums: dict[tuple[Any, ...], tuple[float, int]] = {}
        for record in self.records:
            known = {name: getattr(record, name, None) for name in fields}
            for entry, weights in zip(record.entries, record.weights.tolist(), strict=True):
                for expert, weight in zip(record.experts, weights, strict=True):
                    own = {"entry": entry, "expert": expert}
                    key = tuple(own.get(name, known[name]) for name in fields)
                    total, count = sums.get(key, (0.0, 0))
                    sums[key] = total + weight, count + 1
        return {key: total / count for key, (total, count) in sums.items()}

    def means(self) -> MeanWeights:
        """Mean weight by network, gate and expert, over steps, batch entries and both guidance branches."""
        found: MeanWeights = {}
        for (network, group, expert), weight in self.mean("network", "group", "expert").items():
            found.setdefault(network, {}).setdefault(group, {})[expert] = weight
        return found

    def to_dicts(self) -> list[dict[str, Any]]:
        """One plain dict per row, for JSON lines or a data frame."""
        return [asdict(row) for row in self._rows]

    def to_array(
        self, network: str | None = None, branch: str = PROMPT
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """The weights of one network as a tensor.

        Args:
            network: what the host calls it; None for the one that runs step by step.
            branch: "prompt" or "negative".
        Returns:
            weights (groups, steps, entries, experts), float32, and the labels of the four axes under the keys
            "group", "step", "entry" and "expert".
        """
        axes = ("group", "step", "entry", "expert")
        if network is None:
            network = next((row.network for row in self._rows if row.step is not None), "")
        means = self.where(network=network, branch=branch).mean(*axes)
        labels = {axis: list(dict.fromkeys(key[i] for key in means)) for i, axis in enumerate(axes)}
        places = [{label: i for i, label in enumerate(labels[axis])} for axis in axes]
        weights = torch.zeros([len(labels[axis]) for axis in axes])
        for key, weight in means.items():
            weights[tuple(place[value] for place, value in zip(places, key, strict=True))] = weight
        return weights, labels


@dataclass(frozen=True, eq=False)
class _Run:
    """One forward of one network: its gates' weights, label -> (B, N), on their device."""

    network: str
    experts: tuple[str, ...]
    step: int | None
    negative: int
    weights: Mapping[str, Tensor]

    def records(self, weights: Mapping[str, Tensor]) -> Iterator[GateRecord]:
        """Per gate its negative half, if there is one, and then the prompt's, of these weights."""
        for label, found in weights.items():
            negative, prompt = _halves(found, self.negative)
            for branch, own in ((NEGATIVE, negative), (PROMPT, prompt)):
                if len(own):
                    entries = tuple(range(len(own)))
                    yield GateRecord(self.network, label, self.step, branch, entries, self.experts, own)


class Recorder:
    """Keeps the gate weights of every forward of the networks that it watches.

    Forward hooks on the networks take them, so that users' callbacks and any scheduler (some run the denoiser
    more often than they have steps) stay untouched, and compiled networks see no step number that changes.
    Weights stay on their device until somebody asks.

    Args:
        placing: what a forward is for; None counts the forwards of each network and knows no negative prompt.
    """

    def __init__(self, placing: Placing | None = None) -> None:
        self._placing = placing or (lambda mixture, index, entries: (index, 0))
        self._runs: list[_Run] = []
        self._forwards: Counter[str] = Counter()

    @property
    def forwards(self) -> Mapping[str, int]:
        """How often each network ran."""
        return self._forwards

    @property
    def weights(self) -> GateWeights:
        """What was recorded so far; empty where no gate ran (fixed weights, the base model)."""
        return GateWeights(self._records())

    def watch(self, mixture: Mixture, network: nn.Module | None = None) -> RemovableHandle:
        """Take the weights of every forward until the handle is removed.

        Args:
            mixture: whose gates.
            network: what the host calls, where that is not the mixture's own: a compiled network.
        """

        called = mixture.network if network is None else network
        return called.register_forward_hook(lambda *_: self.note(mixture))

    def note(self, mixture: Mixture) -> None:
        """Take the weights of a mixture's last forward."""
        weights = {label: live.detach() for label, live in mixture.live_weights().items()}
        entries = max((len(live) for live in weights.values()), default=0)
        step, negative = self._placing(mixture, self._forwards[mixture.part], entries)
        self._forwards[mixture.part] += 1
        self._runs.append(_Run(mixture.part, mixture.expert_names, step, negative, weights))

    @contextmanager
    def watching(
        self, mixtures: Mapping[str, Mixture], networks: Mapping[str, nn.Module] | None = None
    ) -> Iterator[None]:
        """`watch` every mixture inside the `with` block.

        Args:
            mixtures: by part.
            networks: what the host calls, by part.
        """
        called = networks or {}
        handles = [self.watch(mixture, called.get(part)) for part, mixture in mixtures.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reset(self, networks: Iterable[str] | None = None) -> None:
        """Forget everything, or what these networks did."""
        gone = set(self._forwards) if networks is None else set(networks)
        self._runs = [run for run in self._runs if run.network not in gone]
        for network in gone:
            self._forwards.pop(network, None)

    def _records(self) -> Iterator[GateRecord]:
        """What every run left; tensors of equal shape cross from the device together."""
        by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
        for run in self._runs:
            for weights in run.weights.values():
                by_shape.setdefault((weights.shape, weights.device), []).append(weights)
        moved = {key: iter(torch.stack(own).float().cpu().unbind()) for key, own in by_shape.items()}
        for run in self._runs:
            yield from run.records(
                {label: next(moved[w.shape, w.device]) for label, w in run.weights.items()}
            )


class MapRecorder(Recorder):
    """Keeps also where in the picture each expert acts, as the mean over the forwards of the prompt."""

    def __init__(self, placing: Placing | None = None) -> None:
        super().__init__(placing)
        self._experts: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    @property
    def maps(self) -> dict[str, Tensor]:
        """Expert -> (entries, height, width), shares from 0 to 1, float32 on the CPU; see `Mixture.live_map`.

        Empty where no gate of image tokens ran.
        """
        if self._sum is None:
            return {}
        return dict(zip(self._experts, (self._sum / self._count).cpu().unbind(1), strict=True))

    def note(self, mixture: Mixture) -> None:
        """Take the weights of a mixture's last forward, and its map."""
        index = self._forwards[mixture.part]
        super().note(mixture)
        found = mixture.live_map() if mixture.in_picture else None
        if found is None:
            return
        _, prompt = _halves(found, self._placing(mixture, index, len(found))[1])
        if not len(prompt):
            return
        if self._sum is None or self._sum.shape != prompt.shape:
            self._sum, self._count = torch.zeros_like(prompt), 0
        self._sum, self._count, self._experts = self._sum + prompt, self._count + 1, mixture.expert_names

    def reset(self, networks: Iterable[str] | None = None) -> None:
        """Forget everything, or what these networks did; maps in any case."""
        super().reset(networks)
        self._sum, self._count = None, 0


class MeanRecorder(Recorder):
    """Keeps the mean weights of each gate over all forwards: a text of any length leaves one row per gate.

    A gate that runs less often than its network (that of the text which a decoder reads runs once) has the
    mean over its own forwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self._experts: dict[str, tuple[str, ...]] = {}

    def note(self, mixture: Mixture) -> None:
        """Add the weights of a mixture's last forward."""
        self._forwards[mixture.part] += 1
        self._experts[mixture.part] = mixture.expert_names
        for label, live in mixture.live_weights().items():
            key, weights = (mixture.part, label), live.detach()
            total, count = self._sums.get(key, (None, 0))
            same = total is not None and total.shape == weights.shape
            self._sums[key] = (total + weights, count + 1) if same and total is not None else (weights, 1)

    def reset(self, networks: Iterable[str] | None = None) -> None:
        """Forget everything, or what these networks did."""
        gone = set(self._forwards) if networks is None else set(networks)
        super().reset(networks)
        self._sums = {key: value for key, value in self._sums.items() if key[0] not in gone}

    def _records(self) -> Iterator[GateRecord]:
        for (network, label), (total, count) in self._sums.items():
            entries, experts = tuple(range(len(total))), self._experts[network]
            yield GateRecord(network, label, None, PROMPT, entries, experts, (total / count).float().cpu())


def _halves(weights: Tensor, negative: int) -> tuple[Tensor, Tensor]:
    """The entries of the negative prompt and those of the prompt; see `Placing`."""
    first, last = weights[:negative], weights[negative:]
    return (first, last) if negative >= 0 else (last, first)


def in_order(means: MeanWeights, experts: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Mean weights as lists in the order of these experts; one without weights has 0.

    Raises:
        ConfigError: weights of an expert that is not among them.
    """
    for expert in {name for gates in means.values() for own in gates.values() for name in own}:
        if expert not in experts:
            raise ConfigError(f"expert {expert!r} has weights but is not among {list(experts)}.")
    return {
        network: {gate: [own.get(name, 0.0) for name in experts] for gate, own in gates.items()}
        for network, gates in means.items()
    }


def _record_of(row: GateWeight) -> GateRecord:
    """A row as a record of one entry and one expert."""
    weights = torch.tensor([[row.weight]])
    return GateRecord(row.network, row.group, row.step, row.branch, (row.entry,), (row.expert,), weights)


def _check_fields(names: Iterable[str]) -> None:
    known = [name for name in GateWeight.__dataclass_fields__ if name != "weight"]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"gate weights have no field {unknown[0]!r}; allowed are {', '.join(known)}.")

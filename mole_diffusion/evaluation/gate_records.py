"""What the gates of a prepared method did in one call, on disk: weights by network, gate, step and expert."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mole_diffusion.core.records import GateWeights
from mole_diffusion.evaluation.results import write_text

FOLDER = "gate_weights"


@dataclass(frozen=True)
class NetworkRecord:
    """Gate weights of one network, mean over the pictures of a call, in the branch of the prompt.

    Attributes:
        groups: names of the gates, in execution order.
        experts: names.
        weights: (gates, steps, experts); the text encoder has one step.
    """

    groups: tuple[str, ...]
    experts: tuple[str, ...]
    weights: NDArray[np.float64]

    @property
    def by_gate(self) -> dict[str, NDArray[np.float64]]:
        """gate -> mean over steps, (experts,)."""
        return dict(zip(self.groups, self.weights.mean(axis=1), strict=True))


def record_of(rows: GateWeights) -> dict[str, NetworkRecord]:
    """The records of `pipe.gate_weights()`, by network; none where no gate ran."""
    found = {}
    for network in dict.fromkeys(record.network for record in rows.records):
        means = rows.where(network=network, branch="prompt").mean("group", "step", "expert")
        groups, steps, experts = (tuple(dict.fromkeys(axis)) for axis in zip(*means, strict=True))
        weights = [[[means[group, step, expert] for expert in experts] for step in steps] for group in groups]
        found[network] = NetworkRecord(groups, experts, np.array(weights, dtype=np.float64))
    return found


def write_record(path: Path, record: Mapping[str, NetworkRecord]) -> None:
    """Write records as JSON."""
    write_text(
        path,
        json.dumps(
            {
                network: {
                    "groups": entry.groups,
                    "experts": entry.experts,
                    "weights": np.round(entry.weights, 5).tolist(),
                }
                for network, entry in record.items()
            }
        ),
    )


def read_record(path: Path) -> dict[str, NetworkRecord]:
    """The reverse of `write_record`."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {
        network: NetworkRecord(
            tuple(entry["groups"]), tuple(entry["experts"]), np.asarray(entry["weights"], dtype=np.float64)
        )
        for network, entry in document.items()
    }


def record_path(out: Path, scene: str, method: str) -> Path:
    """Where the record of a method and set lies."""
    return out / FOLDER / scene / f"{method}.json"

"""Mean gate weights in the header of a gates file, as Train Gates writes them."""

from __future__ import annotations

import json

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.records import MeanWeights, in_order

from .experts import GatesFile

#: Header entry: {"experts": [names], "weights": {part: {gate: [mean weight per expert]}}}.
ENTRY = "mole.mean_weights"

#: part -> gate -> mean weight of each expert.
Rows = dict[str, dict[str, list[float]]]


def mean_weights_entry(names: tuple[str, ...], means: MeanWeights) -> dict[str, str]:
    """The header entry."""
    return {ENTRY: json.dumps({"experts": list(names), "weights": in_order(means, names)})}


def weights_of_gates(gates: GatesFile) -> tuple[tuple[str, ...], Rows]:
    """Expert names, and their mean weights at the end of the training.

    Raises:
        ConfigError: the file does not say.
    """
    text = gates.metadata.get(ENTRY)
    if text is None:
        raise ConfigError(
            f"{gates.path.name!r} does not say what its gates weighed in training (MoLE Train Gates notes "
            "it): connect the MODEL of MoLE Apply and the sampler's LATENT instead."
        )
    found = json.loads(text)
    return tuple(found["experts"]), found["weights"]

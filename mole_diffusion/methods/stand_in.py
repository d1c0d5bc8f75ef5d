"""Other experts, or other gates, on the networks of a pipeline for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture


@dataclass
class StandIn:
    """Experts and the form of their gates; what is built for a pipeline's networks is kept for the next time.

    Args:
        experts: by name.
        config: the form of the gates.
        finish: called with the mixtures when they are built, by part: loads gates into them.
    """

    experts: dict[str, Expert]
    config: MoLEConfig
    finish: Callable[[dict[str, Mixture]], object] | None = None
    _mixtures: dict[str, Mixture] = field(default_factory=dict)
    _networks: dict[str, nn.Module] = field(default_factory=dict)

    @contextmanager
    def attached(
        self, networks: Mapping[str, nn.Module], inject_all: Callable[..., Any]
    ) -> Iterator[dict[str, Mixture]]:
        """Have the hooks on the networks, which carry no others, inside the `with` block.

        Args:
            networks: by part.
            inject_all: `inject_all(experts, config, into)` builds the mixtures.

        Yields:
            The mixtures by part.
        """
        mixtures: dict[str, Mixture] = {}
        try:
            if self._mixtures and self._networks == dict(networks):
                mixtures = self._mixtures
                for mixture in mixtures.values():
                    mixture.attach()
            else:
                inject_all(self.experts, self.config, mixtures)
                if self.finish is not None:
                    self.finish(mixtures)
                self._mixtures, self._networks = mixtures, dict(networks)
            yield mixtures
        finally:
            for mixture in mixtures.values():
                mixture.eject()

"""Shared gates: a small net refines what `mixture="auto"` gives each expert; no expert has a number in it.

Trained once for a base, on some experts, it serves others that it has never seen: it reads how much `auto`
gives an expert in a token, what the others get there, the timestep and which gate is asked, and answers with
a factor. All experts are treated alike, in any order and number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import SHARED_FORMAT as FORMAT
from .checkpoint import are_texts, write_safetensors
from .errors import GateMismatchError
from .mixture import Mixture
from .reading import BadFileError, Header, is_finite, parse_json, read_header, read_safetensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1"
_OWN_KEYS = ("format", "format_version", "parts")
# Numbers that describe a gate, width of the hidden layers, and what the net reads of a token and an expert.
_PLACES, _WIDTH, _FEATURES = 8, 32, 6
# Factors are between exp(-_REACH) and exp(_REACH).
_REACH = 1.5


class SharedGates(nn.Module):
    """A net that gives a factor to each expert in each token, gate by gate; float32.

    Its last layer starts at zero: untrained, `auto` draws as ever.

    Args:
        parts: part -> "gates", the names of its gates' places, and "base", the fingerprint of its network.
        metadata: what the writer of its file added.

    Attributes:
        parts, metadata: as given.
    """

    def __init__(
        self, parts: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.parts = {part: dict(own) for part, own in parts.items()}
        self.metadata = dict(metadata or {})
        places = [(part, place) for part, own in self.parts.items() for place in own["gates"]]
        self._numbers = {place: number for number, place in enumerate(places)}
        self._told: list[str] = []
        self._rested: set[tuple[str, ...]] = set()
        self.places = nn.Embedding(len(places), _PLACES)
        last = nn.Linear(_WIDTH, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(
            nn.Linear(_FEATURES + _PLACES, _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.SiLU(),
            last,
        )

    @classmethod
    def fresh(cls, mixtures: Mapping[str, Mixture], seed: int = 0) -> SharedGates:
        """An untrained one for the networks and gates of these mixtures, by part."""
        parts = {
            part: {"gates": _places(mixture), "base": dict(mixture.base)}
            for part, mixture in mixtures.items()
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(parts)

    def refine(self, part: str, place: str, weights: Tensor, timestep: float) -> Tensor:
        """The weights of the experts in the tokens of one gate, each times its factor.

        Where a picture or text has one expert alone, that is drawn as if it were loaded alone. A gate that
        was not there in training changes nothing.

        Args:
            part: of the network.
            place: of the gate, see `Group.place`.
            weights: (B, T, N) of experts that have places of their own; 0 for the others.
            timestep: from 1 (noise) to 0.
        Returns:
            (B, T, N).
        """
        number = self._numbers.get((part, place))
        if number is None or weights.shape[-1] < 2:
            return weights
        if self.places.weight.device != weights.device:
            self.to(weights.device)
        weights = weights.float()
        count = (weights > 0).any(1, keepdim=True).sum(-1, keepdim=True)
        largest, second = weights.topk(2, dim=-1).values.chunk(2, dim=-1)
        time = torch.full_like(weights, timestep)
        read = [
            weights,
            torch.where(weights == largest, second, largest),
            weights.sum(-1, keepdim=True).expand_as(weights),
            time,
            time.square(),
            (1.0 / count.clamp_min(1)).expand_as(weights),
        ]
        own = self.places.weight[number].expand(*weights.shape, -1)
        answers = self.net(torch.cat([torch.stack(read, dim=-1), own], dim=-1)).squeeze(-1)
        return weights * torch.where(count > 1, torch.exp(_REACH * torch.tanh(answers)), 1.0)

    def rest(self, beside: tuple[str, ...]) -> None:
        """Say, once of the same experts, that nothing is refined where these count in the whole picture."""
        if beside not in self._rested:
            self._rested.add(beside)
            logger.warning(
                "shared gates refine nothing where %s counts in the whole picture: auto draws such pictures "
                "as without them",
                " and ".join(repr(name) for name in beside),
            )

    def check(self, mixtures: Mapping[str, Mixture]) -> None:
        """See that these mixtures, by part, are of networks that it was trained for.

        Parts that no expert changes here may be missing, and parts and gates may have been missing in its
        training; those draw as without it, and a warning says so.

        Raises:
            GateMismatchError: a network is another one, or no gate is known.
        """
        differences, strange, known = [], [], 0
        for part, mixture in mixtures.items():
            own = self.parts.get(part, {"gates": [], "base": mixture.base})
            if own["base"].get("matrices") != mixture.base.get("matrices"):
                differences.append(
                    f"{part}: the base network has other matrices "
                    f"({own['base'].get('class')} in the file, {mixture.base.get('class')} here)"
                )
            here = _places(mixture)
            missing = [place for place in here if place not in own["gates"]]
            strange += [f"{part}: {place}" for place in missing]
            known += len(here) - len(missing)
        if not differences and not known:
            differences = [f"gate {place} was not trained" for place in strange[:3]]
        if differences:
            raise GateMismatchError("The shared gates do not fit:", differences)
        # Asked before every picture, told once.
        if strange and strange != self._told:
            logger.warning(
                "the shared gates were trained without %d gates of the experts that are loaded, which draw "
                "as without them: %s",
                len(strange),
                ", ".join(strange[:3]),
            )
        self._told = strange

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write it into a safetensors file, which appears whole or not at all.

        Args:
            path: file to write or replace.
            metadata: more to note in the header.

        Raises:
            ValueError: `metadata` uses a name of the format.
        """
        noted = {**self.metadata, **(metadata or {})}
        if taken := [key for key in noted if key in _OWN_KEYS]:
            raise ValueError(f"metadata may not use {taken}.")
        tensors = {
            key: value.detach().to("cpu", torch.float32).contiguous()
            for key, value in self.state_dict().items()
        }
        own = {"format": FORMAT, "format_version": FORMAT_VERSION, "parts": json.dumps(self.parts)}
        write_safetensors(Path(path), tensors, {**noted, **own})

    @classmethod
    def load(cls, path: str | Path) -> SharedGates:
        """Read what `save` wrote.

        Raises:
            GateMismatchError: the file is missing, is something else, is damaged, or is of a newer format.
        """
        where = repr(str(path))

        def check(header: Header) -> None:
            version = header.metadata.get("format_version")
            if header.metadata.get("format") != FORMAT:
                raise GateMismatchError(
                    f"{where} is not a file of shared gates: its header has no format={FORMAT!r}."
                )
            if version != FORMAT_VERSION:
                raise GateMismatchError(
                    f"{where} has format_version {version!r:.40}; this mole_diffusion reads {FORMAT_VERSION}."
                )

        try:
            content = read_safetensors(Path(path), check)
            parts = parse_json(content.metadata.get("parts", ""))
        except (BadFileError, OSError) as error:
            raise GateMismatchError(f"{where} cannot be read as shared gates: {error}.") from error
        if not _describes_parts(parts):
            raise GateMismatchError(f"{where} is damaged: its header's 'parts' says no gates and bases.")
        rest = {key: value for key, value in content.metadata.items() if key not in _OWN_KEYS}
        made, tensors = cls(parts, rest), content.tensors
        wanted = made.state_dict()
        differences = [
            f"{key}: {_shape(tensors.get(key))} in the file, {_shape(value)} expected"
            for key, value in wanted.items()
            if key not in tensors or tensors[key].shape != value.shape or not is_finite(tensors[key])
        ]
        if differences:
            raise GateMismatchError(f"{where} is damaged:", differences)
        made.load_state_dict({key: tensors[key] for key in wanted})
        return made.requires_grad_(False)


def is_shared_gates(path: str | Path) -> bool:
    """Whether a file says that it holds shared gates."""
    try:
        return read_header(Path(path)).metadata.get("format") == FORMAT
    except (BadFileError, OSError):
        return False


def _places(mixture: Mixture) -> list[str]:
    return [place for group in mixture.groups for place in group.places]


def _describes_parts(parts: Any) -> bool:
    return (
        isinstance(parts, dict)
        and bool(parts)
        and all(
            isinstance(own, dict)
            and are_texts(own.get("gates"))
            and isinstance(own.get("base"), dict)
            and are_texts([*own["base"].values()])
            for own in parts.values()
        )
    )


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tuple(tensor.shape)}" + ("" if is_finite(tensor) else " with what are no finite numbers")

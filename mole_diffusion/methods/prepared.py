"""What the preparation of a method leaves behind: a folder that says what it was made for."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_diffusion.core.errors import ConfigError, GateMismatchError
from mole_diffusion.core.files import replacing
from mole_diffusion.core.fitting import fingerprint
from mole_diffusion.core.mixture_set import MixtureSet
from mole_diffusion.core.modules import base_layer
from mole_diffusion.core.networks import map_network
from mole_diffusion.methods.methods import METHODS
from mole_diffusion.pictures.choosing import Request

FORMAT = "mole-baseline"
FORMAT_VERSION = 1
FILE = "prepared.json"
#: Holds the head of `FILE` as long as the preparation is not finished.
STARTED = "started.json"
#: How far one number of each matrix may be apart: that of the same base in another data type.
_TOLERANCE = 1e-2


def describe_base(pipe: Any) -> dict[str, Any]:
    """What the networks of a pipeline are, by part: class, hash of the shapes, a number of each matrix."""
    return {part: _describe(part, network) for part, network in pipe.ensemble.networks.items()}


def _describe(part: str, network: nn.Module) -> dict[str, Any]:
    layout = map_network(network, part)
    layers = [base_layer(network.get_submodule(site.path)) for site in layout.sites]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return {**fingerprint(network, layout), "weights": [_probe(weight) for weight in weights]}


def _probe(weight: Any) -> float | None:
    """One number of a weight; None where it has no plain numbers (quantised, offloaded)."""
    if not isinstance(weight, torch.Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    return float(weight.detach().flatten()[weight.numel() // 2])


def describe_experts(pipe: Any) -> list[dict[str, Any]]:
    """Name, hash and scale of the experts, in order."""
    return [
        {"name": name, "sha256": expert.sha256, "scale": expert.scale}
        for name, expert in pipe.experts.items()
    ]


def base_differences(made_for: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sentences on what the base of a preparation and of a pipeline do not have in common."""
    found = []
    for part in dict.fromkeys([*made_for, *here]):
        if part not in made_for or part not in here:
            found.append(f"{part}: only {'here' if part in here else 'there'}")
            continue
        theirs, ours = made_for[part], here[part]
        key = "matrices" if "matrices" in theirs else "shapes"
        if theirs[key] != ours[key]:
            found.append(f"{part}: other matrices ({theirs['class']} there, {ours['class']} here)")
        elif not all(map(_close, theirs["weights"], ours["weights"])):
            found.append(f"{part}: other weights")
    return found


def _close(a: float | None, b: float | None) -> bool:
    return a is None or b is None or math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-5)


class Prepared(ABC):
    """A method that is ready to draw with: `pipe(prompt, mixture=prepared)`.

    Args:
        folder: where `prepare` wrote it.
        record: content of its `prepared.json`.

    Attributes:
        method: name of the method.
        unet_passes: what the preparation cost: "with_gradient" and "without_gradient", as gate training
            counts them.
        seconds: how long it took, concepts that were trained before for another set included.
        details: what it found or was made with (weights, density, ...).
    """

    #: Whether it is of no use without the very LoRA files it was made from.
    needs_experts = True

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self.method: str = record["method"]
        self.unet_passes: dict[str, int] = record["unet_passes"]
        self.seconds: float = record["seconds"]
        self.details: dict[str, Any] = record["details"]

    def __repr__(self) -> str:
        where = f"experts={self.expert_names}, folder={str(self.folder)!r}"
        return f"{type(self).__name__}({self.method!r}, {where})"

    @property
    def label(self) -> str:
        """How tables call it."""
        return METHODS[self.method].label

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts (or concepts) it was made for."""
        return [entry["name"] for entry in self.record["experts"]]

    def check(self, pipe: Any) -> None:
        """Raise GateMismatchError if it was made for another base or for other experts."""
        differences = base_differences(self.record["base"], describe_base(pipe))
        if self.needs_experts:
            theirs, ours = self.record["experts"], describe_experts(pipe)
            if sorted(theirs, key=_name) != sorted(ours, key=_name):
                differences.append(f"experts: {_listed(theirs)} there, {_listed(ours)} here")
        if differences:
            raise GateMismatchError(
                f"{self.label} in {str(self.folder)!r} was made for something else:", differences
            )

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute with this method inside the `with` block.

        Raises:
            GateMismatchError: it was made for another base or other experts.
            ConfigError: an option that the method cannot honour.
        """
        self.check(pipe)
        with self._engaged(pipe, request):
            yield

    @abstractmethod
    def _engaged(self, pipe: Any, request: Request) -> AbstractContextManager[None]:
        """Let the networks compute with this method inside the `with` block, which fits the pipeline."""


def standing(pipe: Any, before: MixtureSet | None, build: Callable[[], MixtureSet]) -> MixtureSet:
    """What stands in for a pipeline's experts: what was built before, while its networks are the same."""
    return before if before is not None and before.networks == pipe.ensemble.networks else build()


class PreparedMixture(Prepared):
    """A method that is a word or a weight per expert: `details["mixture"]`."""

    def _engaged(self, pipe: Any, request: Request) -> AbstractContextManager[None]:
        composing: AbstractContextManager[None] = pipe.composing(
            mixture=self.details["mixture"], **request.arguments()
        )
        return composing


def _name(expert: Mapping[str, Any]) -> str:
    name: str = expert["name"]
    return name


def _listed(experts: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{e['name']} ({e['sha256'][:8]}, scale {e['scale']:g})" for e in experts) or "none"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """What `FILE` or `STARTED` in a folder says of a preparation; None if there is no such file.

    Raises:
        ConfigError: the file is not of this format, or of another version of it.
    """
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not readable: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{str(path)!r} is not a prepared baseline")
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise ConfigError(
            f"{str(path)!r} has format_version {version!r}; this version reads {FORMAT_VERSION}"
        )
    return record

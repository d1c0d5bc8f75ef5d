"""Gates to and from safetensors, versioned; a file says what it is for and refuses what does not fit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import MoLEConfig
from .errors import GateMismatchError
from .inject import Mixture

FORMAT = "mole-gates"
FORMAT_VERSION = 1
_OWN_KEYS = ("format", "format_version", "parts")
# Settings that change what a gate's numbers mean; initial values and what is trained do not.
_STRUCTURE = ("granularity", "gate_input", "pooling", "composition", "gate_function", "timestep")


@dataclass(frozen=True)
class GatesHeader:
    """What a gate file says about itself.

    Attributes:
        version: format version.
        parts: part -> {"config", "experts": [{"name", "sha256", "ranks"}], "groups", "base"}.
        metadata: what the writer added.
    """

    version: int
    parts: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]

    def config(self, part: str) -> MoLEConfig:
        """The form of the gates of one part."""
        return MoLEConfig.from_dict(self.parts[part]["config"])

    def expert_names(self, part: str) -> tuple[str, ...]:
        """Expert names of one part in the order of the gates' rows."""
        return tuple(expert["name"] for expert in self.parts[part]["experts"])


def save_gates(
    path: str | Path, mixtures: Mapping[str, Mixture], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the gates of all mixtures into one safetensors file; it appears whole or not at all.

    Args:
        path: file to write or replace.
        mixtures: part -> mixture.
        metadata: more to note in the header, for example the prediction type or prompts.
    Raises:
        ValueError: `mixtures` is empty, or `metadata` uses a name of the format.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    taken = [key for key in metadata if key in _OWN_KEYS]
    if taken or not mixtures:
        raise ValueError(f"metadata may not use {taken}." if taken else "There are no mixtures to save.")
    tensors = {
        f"{part}/{group.name}/{key}": value.detach().to("cpu", torch.float32).contiguous().clone()
        for part, mixture in mixtures.items()
        for group in mixture.groups
        for key, value in group.gate.state_dict().items()
    }
    parts = {part: _describe(mixture) for part, mixture in mixtures.items()}
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "parts": json.dumps(parts)}
    write_safetensors(path, tensors, {**metadata, **header})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all; missing folders are made.

    Args:
        path: file to write or replace.
        tensors: contiguous tensors by key.
        metadata: the file's header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Neither mkstemp nor save_file: their files can be read by the owner alone, and these are to be shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(save(dict(tensors), metadata=dict(metadata)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_gates_header(path: str | Path) -> GatesHeader:
    """Read what a gate file says about itself, without its tensors.

    Raises:
        GateMismatchError: the file is missing, is not a gate file, or is of a newer format.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise GateMismatchError(f"{str(path)!r} cannot be read as a gate file: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise GateMismatchError(f"{str(path)!r} is not a gate file: its header has no format={FORMAT!r}.")
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) != FORMAT_VERSION:
        raise GateMismatchError(
            f"{str(path)!r} has format_version {version!r}; this mole_diffusion reads {FORMAT_VERSION}."
        )
    rest = {key: value for key, value in metadata.items() if key not in _OWN_KEYS}
    return GatesHeader(int(version), json.loads(metadata["parts"]), rest)


def load_gates(
    path: str | Path,
    mixtures: Mapping[str, Mixture],
    strict: bool = True,
    *,
    parts: Sequence[str] | None = None,
) -> dict[str, str]:
    """Load gates into mixtures; everything is checked before anything is written.

    Experts may stand in another order than in the file: their rows are moved.

    Args:
        path: file of `save_gates`.
        mixtures: part -> mixture, each part of the file and no other.
        strict: False to accept other expert files (hashes) under the same names.
        parts: the only parts of the file to read, where a host cannot offer the others; None for all.
    Returns:
        What the writer added to the header.
    Raises:
        GateMismatchError: the file does not fit; `differences` lists all reasons.
    """
    header = read_gates_header(path)
    offered = [part for part in header.parts if parts is None or part in parts]
    differences = _one_sided("part", offered, list(mixtures))
    for part in [part for part in header.parts if part in mixtures]:
        differences += _compare(part, header.parts[part], _describe(mixtures[part]), strict=strict)
    if differences:
        raise GateMismatchError(f"The gates in {str(path)!r} do not fit:", differences)
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    states: list[tuple[torch.nn.Module, dict[str, Tensor]]] = []
    for part, mixture in mixtures.items():
        names = header.expert_names(part)
        order = [names.index(name) for name in mixture.expert_names]
        for group in mixture.groups:
            stem = f"{part}/{group.name}"
            differences += _compare_tensors(stem, tensors, group.gate)
            state = {key: tensors.get(f"{stem}/{key}") for key in group.gate.state_dict()}
            moved = {k: _reorder(v, order, mixture.config) for k, v in state.items() if v is not None}
            states.append((group.gate, moved))
    if differences:
        raise GateMismatchError(f"The gates in {str(path)!r} do not fit:", differences)
    for gate, moved in states:
        gate.load_state_dict(moved)
    return dict(header.metadata)


def _compare_tensors(stem: str, tensors: Mapping[str, Tensor], gate: torch.nn.Module) -> list[str]:
    """Sentences on tensors of one gate that are missing or of another shape."""
    differences = []
    for key, value in gate.state_dict().items():
        found = tensors.get(f"{stem}/{key}")
        if found is None:
            differences.append(f"{stem}/{key}: missing in the file")
        elif found.shape != value.shape:
            differences.append(
                f"{stem}/{key}: shape {tuple(found.shape)} in the file, {tuple(value.shape)} here"
            )
    return differences


def _describe(mixture: Mixture) -> dict[str, Any]:
    experts = [
        {
            "name": expert.name,
            "sha256": expert.sha256,
            "ranks": sorted({f.rank for f in expert.factors.get(mixture.part, {}).values()}),
        }
        for expert in mixture.experts
    ]
    return {
        "config": mixture.config.to_dict(),
        "experts": experts,
        "groups": [group.name for group in mixture.groups],
        "base": mixture.base,
    }


def _compare(part: str, file: Mapping[str, Any], here: Mapping[str, Any], *, strict: bool) -> list[str]:
    """Sentences on what differs between a part of a file and a mixture."""
    # Not the bare dictionary: a file may be older than a setting.
    form = MoLEConfig.from_dict(file["config"]).to_dict()
    differences = [
        f"{part}: {field} is {form[field]!r} in the file, {here['config'][field]!r} here"
        for field in _STRUCTURE
        if form[field] != here["config"][field]
    ]
    if file["base"]["shapes"] != here["base"]["shapes"]:
        classes = f"{file['base']['class']} in the file, {here['base']['class']} here"
        differences.append(f"{part}: the base network has other matrices ({classes})")
    theirs = {expert["name"]: expert for expert in file["experts"]}
    ours = {expert["name"]: expert for expert in here["experts"]}
    differences += _one_sided(f"{part}: expert", list(theirs), list(ours))
    if strict:
        differences += [
            f"{part}: expert {name!r} has sha256 {theirs[name]['sha256'][:12]} in the file, "
            f"{ours[name]['sha256'][:12]} here"
            for name in theirs
            if name in ours and theirs[name]["sha256"] != ours[name]["sha256"]
        ]
    return differences + _one_sided(f"{part}: group", file["groups"], here["groups"])


def _one_sided(kind: str, file: Sequence[str], here: Sequence[str]) -> list[str]:
    """Sentences on names that only one side has."""
    return [f"{kind} {name!r} is in the file, not here" for name in file if name not in here] + [
        f"{kind} {name!r} is here, not in the file" for name in here if name not in file
    ]


def _reorder(value: Tensor, order: list[int], config: MoLEConfig) -> Tensor:
    """Move the experts' rows (and, for gate_input "experts", their features) of a projection."""
    if value.dim() == 0 or order == list(range(len(order))):
        return value
    value = value[..., order]
    reads_experts = config.gate_input == "experts" and value.dim() > 2  # not so the timestep's projection
    return value.index_select(-3, torch.tensor(order)) if reads_experts else value

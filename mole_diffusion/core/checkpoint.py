"""Gates to and from safetensors, versioned; a file says what it is for and refuses what does not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .config import MoLEConfig
from .errors import GateMismatchError
from .files import replacing
from .gates import Gate
from .mixture import Mixture
from .reading import BadFileError, is_finite, parse_json, read_header, read_safetensors

logger = logging.getLogger(__name__)

FORMAT = "mole-gates"
# Of `shared_gates`, which are for any experts.
SHARED_FORMAT = "mole-shared-gates"
# 1: the base's fingerprint ("shapes") knows the matrices of transformers only; 2: all of them ("matrices");
# 3: gates may have a prior, and files without any stay at 2.
FORMAT_VERSION = 3
_PLAIN_VERSION = 2
_PRIOR = "prior"
_OWN_KEYS = ("format", "format_version", "parts")
# Settings that change what a gate's numbers mean; initial values and what is trained do not.
_STRUCTURE = ("granularity", "gate_input", "pooling", "composition", "gate_function", "timestep")


@dataclass(frozen=True)
class GatesHeader:
    """What a gates file says about itself.

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
    version = FORMAT_VERSION if any(key.endswith(f"/{_PRIOR}") for key in tensors) else _PLAIN_VERSION
    header = {"format": FORMAT, "format_version": str(version), "parts": json.dumps(parts)}
    write_safetensors(path, tensors, {**metadata, **header})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all; missing folders are made.

    Args:
        path: file to write or replace.
        tensors: contiguous tensors by key.
        metadata: the file's header.
    """
    with replacing(path) as temporary:
        # Not save_file: its files can be read by the owner alone.
        temporary.write_bytes(save(dict(tensors), metadata=dict(metadata)))


def read_gates_header(path: str | Path) -> GatesHeader:
    """Read what a gates file says about itself, without its tensors.

    Raises:
        GateMismatchError: the file is missing, is not a gates file, is damaged, or is of a newer format.
    """
    try:
        metadata = read_header(Path(path)).metadata
    except (BadFileError, OSError) as error:
        raise GateMismatchError(f"{str(path)!r} cannot be read as a gates file: {error}.") from error
    if metadata.get("format") == SHARED_FORMAT:
        raise GateMismatchError(
            f"{str(path)!r} holds shared gates, which refine auto for any experts, and here those of some "
            "are needed: load_shared_gates() and mole generate --gates take it."
        )
    if metadata.get("format") != FORMAT:
        raise GateMismatchError(f"{str(path)!r} is not a gates file: its header has no format={FORMAT!r}.")
    version = metadata.get("format_version", "")
    if version not in map(str, range(1, FORMAT_VERSION + 1)):
        raise GateMismatchError(
            f"{str(path)!r} has format_version {version!r:.40}; "
            f"this mole_diffusion reads 1 to {FORMAT_VERSION}."
        )
    rest = {key: value for key, value in metadata.items() if key not in _OWN_KEYS}
    try:
        parts = parse_json(metadata.get("parts", ""))
    except BadFileError as error:
        raise GateMismatchError(f"{str(path)!r} is damaged: its header's 'parts': {error}.") from error
    wrong = _not_of_parts(parts)
    if wrong is not None:
        raise GateMismatchError(f"{str(path)!r} is damaged: its header's 'parts' has no {wrong}.")
    return GatesHeader(int(version), parts, rest)


def _not_of_parts(parts: Any) -> str | None:
    """What is missing, or of another kind, in a header's account of its parts; None if nothing is."""
    if not isinstance(parts, dict) or not parts:
        return "object with an entry for each part"
    for part, content in parts.items():
        entry = content if isinstance(content, dict) else {}
        experts, groups, base = entry.get("experts"), entry.get("groups"), entry.get("base")
        if not isinstance(entry.get("config"), dict):
            return f"config of {part!r:.40}"
        if not are_texts(groups):
            return f"list of groups of {part!r:.40}"
        if not (isinstance(base, dict) and "class" in base and are_texts([*base, *base.values()])):
            return f"base of {part!r:.40}"
        if not {"shapes", "matrices"} & set(base):
            return f"base of {part!r:.40}"
        known = [
            isinstance(one, dict)
            and are_texts([one.get("name"), one.get("sha256")])
            and _numbers(one.get("ranks"))
            for one in (experts if isinstance(experts, list) else ())
        ]
        if not known or not all(known):
            return f"list of experts of {part!r:.40}, each with name, sha256 and ranks"
    return None


def are_texts(values: Any) -> bool:
    """Whether JSON has a list of texts here."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def load_gates(
    path: str | Path,
    mixtures: Mapping[str, Mixture],
    strict: bool = True,
    *,
    parts: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Load gates into mixtures; everything is checked before anything is written.

    Experts may stand in another order than in the file: their rows are moved.

    Args:
        path: file of `save_gates`.
        mixtures: part -> mixture, each part of the file and no other.
        strict: False to load gates onto what they were not trained for, as long as every number has a place:
            other files or ranks under the same expert names, the same files under other names, another base
            network or other `facts`. A warning lists each difference that was passed over. The form of the
            gates, the groups, the shapes and the number of experts must fit in any case.
        parts: the only parts of the file to read, where a host cannot offer the others; None for all.
        facts: what else the header should say if it names it, such as the prediction type.
    Returns:
        What the writer added to the header.
    Raises:
        GateMismatchError: the file does not fit; `differences` lists all reasons.
    """
    header = read_gates_header(path)
    offered = [part for part in header.parts if parts is None or part in parts]
    differences = _one_sided("part", offered, list(mixtures))
    passable = [
        f"base model: {fact} is {header.metadata[fact]!r} in the file, {value!r} here"
        for fact, value in (facts or {}).items()
        if header.metadata.get(fact, value) != value
    ]
    orders: dict[str, list[int]] = {}
    for part in [part for part in header.parts if part in mixtures]:
        file, here = header.parts[part], _describe(mixtures[part])
        differences += _compare_form(part, file, here)
        orders[part], other_experts = _compare_experts(part, file["experts"], here["experts"], strict=strict)
        passable += _compare_base(part, file["base"], here["base"])
        (passable if orders[part] else differences).extend(other_experts)
    refused = [*differences, *passable] if strict else differences
    if refused:
        raise GateMismatchError(f"The gates in {str(path)!r} do not fit:", refused)
    _fill(path, mixtures, orders)
    if passable:
        logger.warning(
            "The gates in %r were loaded with strict=False onto what they were not trained for:\n  - %s",
            str(path),
            "\n  - ".join(passable),
        )
    return dict(header.metadata)


def _fill(path: str | Path, mixtures: Mapping[str, Mixture], orders: Mapping[str, Sequence[int]]) -> None:
    """Copy a file's tensors into gates, each expert's rows in its place.

    Raises:
        GateMismatchError: a tensor is missing or of another shape; nothing was copied.
    """
    try:
        tensors = read_safetensors(Path(path)).tensors
    except (BadFileError, OSError) as error:
        raise GateMismatchError(f"{str(path)!r} cannot be read as a gates file: {error}.") from error
    states: list[tuple[Gate, dict[str, Tensor]]] = []
    differences: list[str] = []
    for part, mixture in mixtures.items():
        order = list(orders[part])
        for group in mixture.groups:
            stem = f"{part}/{group.name}"
            differences += _compare_tensors(stem, tensors, group.gate)
            if differences:
                continue
            state = {key: tensors.get(f"{stem}/{key}") for key in _keys(group.gate)}
            moved = {k: _reorder(k, v, order, mixture.config) for k, v in state.items() if v is not None}
            states.append((group.gate, moved))
    if differences:
        raise GateMismatchError(f"The gates in {str(path)!r} do not fit:", differences)
    for gate, moved in states:
        gate.load_state_dict(moved)


def _compare_tensors(stem: str, tensors: Mapping[str, Tensor], gate: Gate) -> list[str]:
    """Sentences on tensors of one gate that are missing, of another shape, or no finite numbers."""
    differences = []
    for key, value in _keys(gate).items():
        found = tensors.get(f"{stem}/{key}")
        if found is None and key == _PRIOR:
            continue
        if found is None:
            differences.append(f"{stem}/{key}: missing in the file")
        elif found.shape != value.shape:
            differences.append(
                f"{stem}/{key}: shape {tuple(found.shape)} in the file, {tuple(value.shape)} here"
            )
        elif not found.is_floating_point() or not is_finite(found):
            differences.append(f"{stem}/{key}: holds what are no finite numbers")
    return differences


def _keys(gate: Gate) -> dict[str, Tensor]:
    """What may stand in a file for a gate, and tensors of the same shapes."""
    return {**gate.state_dict(), _PRIOR: torch.zeros(gate.experts)}


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


def _compare_form(part: str, file: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Sentences on what makes the numbers of a part of a file meaningless in a mixture."""
    # Not the bare dictionary: a file may be older than a setting.
    form = MoLEConfig.from_dict(file["config"]).to_dict()
    differences = [
        f"{part}: {field} is {form[field]!r} in the file, {here['config'][field]!r} here"
        for field in _STRUCTURE
        if form[field] != here["config"][field]
    ]
    return differences + _one_sided(f"{part}: group", file["groups"], here["groups"])


def _compare_base(part: str, file: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """A sentence where the base network is another one."""
    key = "matrices" if "matrices" in file else "shapes"
    if file[key] == here[key]:
        return []
    return [
        f"{part}: the base network has other matrices ({file['class']} in the file, {here['class']} here)"
    ]


def _compare_experts(
    part: str, file: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]], *, strict: bool
) -> tuple[list[int], list[str]]:
    """Where each expert of a mixture stands in the file, and sentences on how they differ.

    Experts are told by their names; those that are left, unless `strict`, by their hashes.

    Returns:
        A position per expert here, or none at all if the experts cannot be paired; sentences.
    """
    theirs, ours = {one["name"]: one for one in file}, {one["name"]: one for one in here}
    pairs = {name: name for name in ours if name in theirs}
    alone = [one for one in file if one["name"] not in ours]
    for name in [name for name in ours if name not in theirs]:
        same = next((one for one in alone if one["sha256"] == ours[name]["sha256"]), None)
        if same is not None and not strict:
            pairs[name] = same["name"]
            alone.remove(same)
    sentences = _one_sided(
        f"{part}: expert", [n for n in theirs if n not in pairs.values()], [n for n in ours if n not in pairs]
    )
    whole = not sentences
    for name, partner in pairs.items():
        one, other = theirs[partner], ours[name]
        if name != partner:
            sentences.append(f"{part}: expert {partner!r} of the file is called {name!r} here")
        if one["sha256"] != other["sha256"]:
            sentences.append(
                f"{part}: expert {name!r} has sha256 {one['sha256'][:12]} in the file,"
                f" {other['sha256'][:12]} here"
            )
        elif one["ranks"] != other["ranks"]:
            sentences.append(
                f"{part}: expert {name!r} has ranks {one['ranks']} in the file, {other['ranks']} here"
            )
    names = list(theirs)
    return [names.index(pairs[name]) for name in ours] if whole else [], sentences


def _one_sided(kind: str, file: Sequence[str], here: Sequence[str]) -> list[str]:
    """Sentences on names that only one side has."""
    return [f"{kind} {name!r} is in the file, not here" for name in file if name not in here] + [
        f"{kind} {name!r} is here, not in the file" for name in here if name not in file
    ]


def _reorder(name: str, value: Tensor, order: list[int], config: MoLEConfig) -> Tensor:
    """Move the experts' rows (and, for gate_input "experts", their features) of a projection."""
    if value.dim() == 0 or order == list(range(len(order))):
        return value
    if config.gate_input == "own" and not name.startswith(("timestep", _PRIOR)):
        return value.index_select(-2, torch.tensor(order))
    value = value[..., order]
    # Not so the timestep's projection and the prior.
    reads_experts = config.gate_input == "experts" and value.dim() > 2
    return value.index_select(-3, torch.tensor(order)) if reads_experts else value

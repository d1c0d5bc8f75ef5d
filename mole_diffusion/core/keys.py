"""LoRA key dialects: the roles of tensors in a file; what matrix a name means, the architectures know.

Understood: diffusers (`SLOT.` with `lora_A`/`lora_B`, `lora.down`/`lora.up`, `lora_linear_layer` or
`processor.to_q_lora`), PEFT (`base_model.model.`, with or without an adapter name), kohya and OneTrainer
(`lora_SLOT_*`, `.alpha`), ComfyUI (`diffusion_model.*`), checkpoints (`model.diffusion_model.*`). Besides
LoRA: LoCon, LoHa, LoKr, full differences and DoRA (see `lycoris`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .networks import architectures, by_name, of_matrices, readers
from .networks.base import DENOISER, Architecture, Place
from .roles import NOT_LORA, matrix_size, split_role

# Dialects that can be written.
DIALECTS = ("diffusers", "kohya")

NO_MATRIX = "no matrix of a known network has this name"
# What no network can gate, whatever its kind.
_NO_PRODUCT = (
    (
        re.compile(r"(?:^|_)(?:layer_)?norm\d?(?:$|_)"),
        "normalisation layers multiply no matrix, so there is nothing to gate",
    ),
    (
        re.compile(r"token_embedding|position_embedding"),
        "embedding tables multiply no matrix, so there is nothing to gate",
    ),
)


@dataclass(frozen=True)
class ParsedKey:
    """What a key of a LoRA file means.

    Attributes:
        module: the key without its role suffix; equal for all keys of one matrix.
        role: "down", "up", "alpha", "hada_w1_a" ...; None if the key is refused or unknown.
        network: the slot of the network, or None.
        places: the matrices that are meant: several if the file's matrix is a fused one.
        reason: why the key cannot be used; None if it can.
        dialect: who writes keys like this one, in a word or two.
        flat: name without the slot's prefix, with "_" for ".".
        architecture: name of the kind of network, or None.
    """

    module: str
    role: str | None
    network: str | None
    places: tuple[Place, ...]
    reason: str | None
    dialect: str = "unknown"
    flat: str = ""
    architecture: str | None = None

    @property
    def denoises(self) -> bool:
        """Whether its network is a denoiser."""
        architecture = by_name(self.architecture or "")
        return architecture is not None and architecture.role == DENOISER

    @property
    def matrix(self) -> str | None:
        """Canonical name, if one matrix is meant."""
        return self.places[0].matrix if len(self.places) == 1 else None


@dataclass(frozen=True)
class _Reading:
    """What one architecture makes of the name of a matrix."""

    architecture: Architecture
    slot: str
    flat: str
    places: tuple[Place, ...]


def parse_key(key: str) -> ParsedKey:
    """Read one key of a LoRA file; never fails, an unusable key carries its reason."""
    return parse_keys([key])[key]


def parse_keys(
    keys: Iterable[str], shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, ParsedKey]:
    """Read the keys of one LoRA file; never fails, an unusable key carries its reason.

    Where several kinds of networks have matrices of one name, the kind is meant whose matrices may have such
    a shape, among those the one that knows more of the file, and where two know as much, the one that
    recognises it by its names and widths together.

    Args:
        keys: of the file.
        shapes: of its tensors, as far as they are known.
    """
    split = {key: split_role(key) for key in keys}
    readings = {module: _readings(module) for module in {module: None for module, _, _ in split.values()}}
    sizes = _sizes(readings, split, shapes or {})
    _leave_out_misfits(readings, sizes)
    votes = _votes(readings, sizes)
    return {key: _parsed(key, *split[key], readings[split[key][0]], votes) for key in split}


def _readings(module: str) -> list[_Reading]:
    """What the architectures make of a name, none of those that do not know it."""
    name = _flat(module)
    asked = list(readers(name))
    if asked[0][2] != name:  # What begins as a prefix may be the beginning of a name itself.
        asked += [(architecture, architecture.slots[0], name) for architecture in architectures()]
    known: dict[str, _Reading] = {}
    for architecture, slot, flat in asked:
        places, first = architecture.read(flat), known.get(architecture.name)
        # A canonical name is meant rather than a prefix and somebody else's name.
        if places and (first is None or (first.places[0].dialect and not places[0].dialect)):
            known[architecture.name] = _Reading(architecture, slot, flat, places)
    return list(known.values())


def _sizes(
    readings: Mapping[str, Sequence[_Reading]],
    split: Mapping[str, tuple[str, str | None, str | None]],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the matrices whose names have several readings, as far as they are known."""
    unclear = {module for module, known in readings.items() if len(known) > 1}
    tensors: dict[str, dict[str, Sequence[int]]] = {}
    for key, (module, role, _) in split.items():
        if module in unclear and role is not None and key in shapes:
            tensors.setdefault(module, {})[role] = shapes[key]
    found = {module: matrix_size(roles) for module, roles in tensors.items()}
    return {module: size for module, size in found.items() if size is not None}


def _leave_out_misfits(readings: dict[str, list[_Reading]], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Of several readings of a name keep those that the size of its matrix allows, if any are left."""
    for module, size in sizes.items():
        fitting = [one for one in readings[module] if one.architecture.fits(one.flat, *size)]
        readings[module] = fitting or readings[module]


def _votes(
    readings: Mapping[str, Sequence[_Reading]], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, bool]]:
    """Name of an architecture -> how many names it knows, and whether that tells a base of its own."""
    known: dict[str, dict[str, int]] = {}
    counts: Counter[str] = Counter()
    unclear: dict[str, _Reading] = {}
    for module, own in readings.items():
        for one in own:
            name = one.architecture.name
            counts[name] += 1
            if len(own) > 1:
                unclear[name] = one
            inputs = known.setdefault(name, {})
            inputs.update((place.matrix, sizes.get(module, (0, 0))[1]) for place in one.places)
    # What tells a base of no names at all, being the only one of its kind, tells nothing by these.
    telling = {
        name
        for name, one in unclear.items()
        if one.architecture.family(one.slot, known[name]) is not None
        and one.architecture.family(one.slot, {}) is None
    }
    return {name: (count, name in telling) for name, count in counts.items()}


def _parsed(
    key: str,
    module: str,
    role: str | None,
    refused: str | None,
    readings: list[_Reading],
    votes: Mapping[str, tuple[int, bool]],
) -> ParsedKey:
    if role is None and refused is None:
        return ParsedKey(key, None, None, (), NOT_LORA)
    if not readings:
        flat = _flat(module)
        _, slot, rest = next(readers(flat), (None, None, flat))
        return ParsedKey(
            module,
            role,
            slot if rest != flat else None,
            (),
            refused or _why_not(rest),
            _dialect(key, None),
            rest,
        )
    best = max(readings, key=lambda one: votes[one.architecture.name])
    return ParsedKey(
        module,
        role,
        best.slot,
        best.places,
        refused,
        _dialect(key, best.places[0].dialect, bare=best.flat == _flat(module)),
        best.flat,
        best.architecture.name,
    )


def factor_keys(
    network: str, matrix: str, dialect: str, *, xl: bool = False, kind: Architecture | None = None
) -> dict[str, str]:
    """Keys under which a file holds one matrix; the reverse of `parse_key`.

    Args:
        network: the network's slot.
        matrix: canonical matrix name.
        dialect: one of `DIALECTS`.
        xl: whether the base has two text encoders; kohya then numbers them.
        kind: of the network, where that is known: some share names of matrices, and not what kohya writes.
    Returns:
        role ("down", "up", and "alpha" where the dialect has it) -> key.
    Raises:
        ConfigError: no known network has such a matrix.
    """
    architecture = kind or of_matrices([matrix])
    if architecture is None:
        raise ConfigError(
            f"{matrix!r} of the {network} is no matrix of a known network: files cannot name it."
        )
    prefix = architecture.prefix(network, dialect, several=xl)
    name = architecture.write(matrix, dialect)
    if dialect == "kohya":
        module = f"{prefix}{name.replace('.', '_')}"
        roles = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    else:
        module = f"{prefix}{name}"
        roles = {"down": "lora_A.weight", "up": "lora_B.weight"}
    return {role: f"{module}.{suffix}" for role, suffix in roles.items()}


def _flat(module: str) -> str:
    """A matrix's name in a file with underscores for dots, without what wrappers put around networks."""
    name = module
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.").removeprefix("model.")
    return name.replace(".processor.", ".").replace(".", "_")


def _why_not(flat: str) -> str:
    """Reason for a name that is no matrix of a known network."""
    for architecture in architectures():
        if reason := architecture.why_not(flat):
            return reason
    return next((reason for pattern, reason in _NO_PRODUCT if pattern.search(flat)), NO_MATRIX)


def _dialect(key: str, blocks: str | None, *, bare: bool = False) -> str:
    """Who writes such keys.

    Args:
        key: a whole key.
        blocks: whose names of blocks it has, if not the canonical ones.
        bare: whether nothing stands before the name of the matrix.
    """
    name = _writer(key, bare=bare)
    return f"{name}, {blocks}" if blocks and not blocks.startswith(name) else name


# Beginnings of whole keys -> who writes them.
_BEGINNINGS = (
    (re.compile(r"base_model\."), "PEFT"),
    (re.compile(r"lora_[a-z]+\d?_"), "kohya"),
    (re.compile(r"lycoris_"), "LyCORIS"),
    (re.compile(r"model\.diffusion_model\.|cond_stage_model\.|conditioner\.embedders\."), "checkpoint"),
    (re.compile(r"diffusion_model\."), "ComfyUI"),
)
# Parts of a key with nothing before the matrix's name, and of one with a slot before it -> the same.
_BARE = ((".processor.", "XLabs"), (".default.", "DiffSynth"), ("", "no prefix"))
_SLOTS = (
    (".processor.", "diffusers, attention processors"),
    (".lora_down.", "OneTrainer"),
    (".lora_up.", "OneTrainer"),
    ("lora_A", "diffusers, PEFT keys"),
    ("lora_B", "diffusers, PEFT keys"),
    ("", "diffusers"),
)


def _writer(key: str, *, bare: bool) -> str:
    """The program, or the form that several programs share."""
    known = {prefix: who for one in architectures() for prefix, who in one.writers.items()}
    if who := next((who for prefix, who in known.items() if key.startswith(prefix)), ""):
        return who
    if who := next((who for beginning, who in _BEGINNINGS if beginning.match(key)), ""):
        return who
    return next(who for part, who in (_BARE if bare else _SLOTS) if part in key)

"""Reading a LoRA file into an `Expert`, with an account of every key and of what its strength comes from."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from .alphas import NOWHERE, TENSORS, Alphas
from .collecting import Collector
from .errors import ConfigError, ExpertLoadError
from .factors import LoraFactors
from .key_table import KeyTable
from .networks import architectures, by_name, known_families, other_base
from .networks.base import Base
from .networks.families import header_name
from .peft_folder import expert_files, own_name, read_files
from .peft_options import PeftOptions
from .reading import BadFileError, Content, parse_json
from .scaling import check_scale

__all__ = ["Expert", "ExpertReport", "LoraFactors", "load_expert"]

logger = logging.getLogger(__name__)

# Reasons that an error lists.
_LISTED = 5
# A file of which less is used does not stay in memory as a whole.
_WORTH_KEEPING = 0.75


@dataclass(frozen=True)
class ExpertReport:
    """What became of each key of a file.

    Attributes:
        loaded: keys that are used.
        ignored: key -> reason.
        missing: keys that should be there and are not (the other factor of a pair).
        dialects: how the loaded keys are named, the most frequent first.
        errors: "NETWORK.MATRIX" -> relative error (Frobenius) of a delta that was compressed.
        alphas: where alphas stand ("tensors", "adapter_config.json", "header's ss_network_alpha", ...) ->
            number of matrices that take theirs from there.
        notes: sentences on what the file says of its strength or form and what was not used so.
    """

    loaded: tuple[str, ...]
    ignored: Mapping[str, str]
    missing: tuple[str, ...]
    dialects: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        reasons = sorted(set(self.ignored.values()))
        text = f"{len(self.loaded)} keys loaded, {len(self.ignored)} ignored, {len(self.missing)} missing"
        text = f"{text} ({'; '.join(reasons)})" if reasons else text
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            text += f"; {len(self.errors)} deltas compressed, error up to {self.errors[worst]:.2%} ({worst})"
        if set(self.alphas) - {TENSORS, NOWHERE}:
            text += f"; alpha from {self.origin()}"
        return "; ".join([text, *self.notes])

    def origin(self) -> str:
        """Where alphas stand, for people; empty where no matrix has one."""
        return ", ".join(
            source if len(self.alphas) == 1 else f"{source} ({count} matrices)"
            for source, count in self.alphas.items()
        )


@dataclass(frozen=True)
class Expert:
    """One trained LoRA.

    Attributes:
        name: how the user calls it.
        scale: the user's factor for it.
        sha256: hash of the file (of the factors, if it did not come from a file).
        metadata: header of the file.
        factors: slot of a network -> canonical matrix name -> factors.
        report: account of every key.
        embeddings: trigger word -> slot of a text encoder -> its vectors (n, d), where the file bundles them.
        architectures: slot -> name of the kind of network whose matrices these are.
        provisional: slot -> canonical matrix name -> name in the file, for matrices whose name means another
            one in some networks of this kind: it is read again when the network is known.
        path: where it was read from; None if it did not come from a file.
    """

    name: str
    scale: float
    sha256: str
    metadata: Mapping[str, str]
    factors: Mapping[str, Mapping[str, LoraFactors]]
    report: ExpertReport = field(repr=False)
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    architectures: Mapping[str, str] = field(default_factory=dict, repr=False)
    provisional: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    path: Path | None = field(default=None, compare=False, repr=False)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Trigger texts: bundled embeddings, and what the header names.

        In the header: `mole.trigger` (separated by "|"), `modelspec.trigger_phrase`, else kohya's top tag.
        """
        return tuple(dict.fromkeys((*self.embeddings, *named_triggers(self.metadata))))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        name: str,
        scale: float = 1.0,
        metadata: Mapping[str, str] | None = None,
        sha256: str | None = None,
        rank: int | None = None,
    ) -> Expert:
        """Build an expert from tensors in any known dialect.

        Args:
            state_dict, name, scale, metadata: content of the file, and how to use it.
            sha256: hash of the file; of the tensors if None.
            rank: compress deltas of higher rank to this one; `report.errors` has what that costs. None keeps
                every delta exact.
        Raises:
            ExpertLoadError: no key is usable, factors do not fit together, or DoRA is to be compressed.
            ConfigError: the name is empty, the scale is not a finite number, or the rank is below 1.
        """
        _check_use(name, scale, rank)
        content = Content(state_dict, dict(metadata or {}), sha256 or "")
        return _expert(
            content, {}, KeyTable.of(state_dict, _shapes(state_dict)), name=name, scale=scale, rank=rank
        )


def load_expert(
    path: str | Path,
    name: str | None = None,
    scale: float = 1.0,
    *,
    rank: int | None = None,
    base: Base | None = None,
) -> Expert:
    """Read a LoRA from a safetensors file or a PEFT folder.

    Args:
        path: a .safetensors file in any dialect of `keys`; a folder with PEFT's `adapter_config.json` and
            `adapter_model.safetensors` (or `.bin`, of which nothing is run), or with such a folder per
            network. Other pickled files are refused: they can run code.
        name: the expert's name; the file's stem if None, or the folder's name where the stem is a usual one.
        scale: the user's factor for this expert.
        rank: compress deltas of higher rank to this one; see `Expert.from_state_dict`.
        base: the base model it is for (`bases.base_of_networks`), to be named if the file is for a base of
            another kind; None where that is not known yet.
    Raises:
        ExpertLoadError: nothing is there, it cannot be read, it holds no usable LoRA, or its matrices are
            those of networks that experts cannot be attached to.
        ConfigError: see `Expert.from_state_dict`.
    """
    expert = read_expert(path, name, scale, rank=rank, base=base)
    for note in expert.report.notes:
        logger.warning("expert %r: %s", expert.name, note)
    return expert


def read_expert(
    path: str | Path,
    name: str | None = None,
    scale: float = 1.0,
    *,
    rank: int | None = None,
    base: Base | None = None,
) -> Expert:
    """`load_expert` for those who say themselves what `report.notes` has."""
    path = Path(path)
    name = own_name(path) if name is None else name
    _check_use(name, scale, rank)
    files = expert_files(path)
    tables: list[KeyTable] = []

    def check(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> None:
        """Refuse, before gigabytes are read, what is no LoRA: a whole model, for example."""
        tables.append(KeyTable.of(shapes, shapes))
        if len(files) == 1:
            _check_usable(tables[0], name, metadata, base)

    content, options = read_files(files, check)
    table = tables[0] if len(tables) == len(files) == 1 else None
    if table is None:
        table = KeyTable.of(content.tensors, _shapes(content.tensors))
    used = [*table.embeddings, *(key for roles in table.modules.values() for key in roles.values())]
    copy = _size(content, used) < _WORTH_KEEPING * _size(content, content.tensors)
    found = _expert(content, options, table, name=name, scale=scale, rank=rank, base=base, copy=copy)
    return replace(found, path=path)


def _expert(
    content: Content,
    options: Mapping[str, PeftOptions],
    table: KeyTable,
    *,
    name: str,
    scale: float,
    rank: int | None,
    base: Base | None = None,
    copy: bool = False,
) -> Expert:
    """An expert of what a file, or several, hold."""
    alphas = Alphas(content.metadata, options)
    for module, meaning in list(table.meanings.items()):
        for setting, role in alphas.expects(str(meaning.network)):
            if "down" in table.modules.get(module, {}) and role not in table.modules[module]:
                table.refuse(module, f"{setting} is set, and this matrix has no {role}")
    _check_usable(table, name, content.metadata, base)
    collector = Collector(table, content.tensors, alphas, finite=content.finite, copy=copy)
    if rank is not None:
        collector.compress(rank)
    return Expert(
        name,
        float(scale),
        content.sha256 or _hash_tensors(content.tensors),
        content.metadata,
        collector.factors,
        _report(table, collector),
        collector.embeddings,
        collector.architectures,
        collector.provisional,
    )


def _report(table: KeyTable, collector: Collector) -> ExpertReport:
    loaded = [*table.embeddings]
    dialects: Counter[str] = Counter()
    for module, roles in table.modules.items():
        loaded += roles.values()
        dialects[table.meanings[module].dialect] += len(roles)
    return ExpertReport(
        tuple(loaded),
        table.ignored,
        tuple(table.missing),
        _most_said(dialects),
        collector.errors,
        dict(collector.sources),
        tuple(collector.notes),
    )


def _most_said(dialects: Counter[str]) -> tuple[str, ...]:
    """The most frequent first, without what another one says more of: some names are everybody's."""
    return tuple(
        one
        for one, _ in dialects.most_common()
        if not any(other.startswith(f"{one}, ") for other in dialects)
    )


def _check_use(name: str, scale: float, rank: int | None) -> None:
    """Raise ConfigError for what no expert can be called, or used with."""
    if not name:
        raise ConfigError("An expert needs a name that is not empty.")
    check_scale("scale", name, scale)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank!r} of expert {name!r} is not allowed; give a whole number above 0.")


def _check_kind(table: KeyTable, name: str, metadata: Mapping[str, str], base: Base | None) -> None:
    """Raise ExpertLoadError if a file's denoiser is of another kind than the base's."""
    found = (by_name(meaning.architecture or "") for meaning in table.meanings.values() if meaning.denoises)
    kinds = {kind.name: kind for kind in found if kind is not None}
    if base is None or base.family is None or not kinds:
        return
    names = [meaning.flat for meaning in table.meanings.values() if meaning.denoises]
    fitting = [kind for kind in architectures() if base.family in kind.families]
    # Kinds share names: what the base's own kind reads as well is not another's.
    if not any(all(kind.read(name) for name in names) for kind in fitting):
        theirs = " or ".join(family for kind in kinds.values() for family in kind.families)
        said = header_name(metadata)
        header = f" (its header says {said!r})" if said else ""
        raise ExpertLoadError(f"Expert {name!r} was made for {theirs}{header}; the base here is {base}.")


def _check_usable(table: KeyTable, name: str, metadata: Mapping[str, str], base: Base | None) -> None:
    """Raise ExpertLoadError if no key can be used, or if those that matter are for a base of another kind."""
    other = other_base(table.strangers, metadata)
    if other is not None and not any(meaning.denoises for meaning in table.meanings.values()):
        known = ", ".join(known_families())
        here = f"the base here is {base}" if base else f"the bases known here are {known}"
        raise ExpertLoadError(f"Expert {name!r} was made for {other}; {here}.")
    _check_kind(table, name, metadata, base)
    if table.modules or table.embeddings:
        return
    reasons = {reason: key for key, reason in reversed(list(table.ignored.items()))}
    listed = "; ".join(f"{reason} (e.g. {key!r})" for reason, key in list(reasons.items())[:_LISTED])
    more = f"; and {len(reasons) - _LISTED} more reasons" if len(reasons) > _LISTED else ""
    raise ExpertLoadError(
        f"Expert {name!r}: none of its {len(table.ignored)} keys can be used: {listed or 'no keys'}{more}."
    )


def _size(content: Content, keys: Iterable[str]) -> int:
    """Bytes of tensors."""
    return sum(content.tensors[key].numel() * content.tensors[key].element_size() for key in keys)


def named_triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Trigger texts that the header of a LoRA file names, see `Expert.triggers`."""
    named = metadata.get("mole.trigger", "") or metadata.get("modelspec.trigger_phrase", "")
    texts = tuple(text.strip() for text in named.split("|") if text.strip())
    return texts or _kohya_triggers(metadata.get("ss_tag_frequency", ""))


def _kohya_triggers(tag_frequency: str) -> tuple[str, ...]:
    """The tag that most pictures have; none if the entry is not what kohya writes."""
    try:
        folders = parse_json(tag_frequency or "{}")
    except BadFileError:
        return ()
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, (int, float)) and math.isfinite(count):
                counts[tag.strip()] += int(count)
    best = max(counts, key=lambda tag: counts[tag], default="")
    return (best,) if best else ()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _hash_tensors(state_dict: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    return digest.hexdigest()

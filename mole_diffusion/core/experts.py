"""Reading a LoRA file into an `Expert`, with an account of every key."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .embeddings import split_embeddings
from .errors import ConfigError, ExpertLoadError
from .factors import LoraFactors, compress
from .keys import ParsedKey, parse_keys
from .lycoris import absent_roles, build_factors
from .roles import NOT_LORA

__all__ = ["Expert", "ExpertReport", "LoraFactors", "load_expert"]


@dataclass(frozen=True)
class ExpertReport:
    """What became of each key of a file.

    Attributes:
        loaded: keys that are used.
        ignored: key -> reason.
        missing: keys that should be there and are not (the other factor of a pair).
        dialects: how the loaded keys are named, the most frequent first.
        errors: "NETWORK.MATRIX" -> relative error (Frobenius) of a delta that was compressed.
    """

    loaded: tuple[str, ...]
    ignored: Mapping[str, str]
    missing: tuple[str, ...]
    dialects: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for people."""
        reasons = sorted(set(self.ignored.values()))
        text = f"{len(self.loaded)} keys loaded, {len(self.ignored)} ignored, {len(self.missing)} missing"
        text = f"{text} ({'; '.join(reasons)})" if reasons else text
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            text += f"; {len(self.errors)} deltas compressed, error up to {self.errors[worst]:.2%} ({worst})"
        return text


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

    @property
    def triggers(self) -> tuple[str, ...]:
        """Trigger texts: bundled embeddings, and what the header names.

        In the header: `mole.trigger` (separated by "|"), `modelspec.trigger_phrase`, else kohya's top tag.
        """
        named = self.metadata.get("mole.trigger", "") or self.metadata.get("modelspec.trigger_phrase", "")
        texts = tuple(text.strip() for text in named.split("|") if text.strip())
        texts = texts or _kohya_triggers(self.metadata.get("ss_tag_frequency", ""))
        return tuple(dict.fromkeys((*self.embeddings, *texts)))

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
        if not name:
            raise ConfigError("An expert needs a name that is not empty.")
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale!r} of expert {name!r} is not a finite number.")
        if rank is not None and rank < 1:
            raise ConfigError(
                f"rank={rank!r} of expert {name!r} is not allowed; give a whole number above 0."
            )
        metadata = dict(metadata or {})
        collector = _Collector(state_dict, _PeftAlphas(metadata))
        if rank is not None:
            collector.compress(rank)
        report = collector.report()
        if not report.loaded:
            reasons = {reason: key for key, reason in reversed(list(report.ignored.items()))}
            listed = "; ".join(f"{reason} (e.g. {key!r})" for reason, key in reasons.items())
            raise ExpertLoadError(
                f"Expert {name!r}: none of its {len(state_dict)} keys can be used: {listed or 'no keys'}."
            )
        return cls(
            name,
            float(scale),
            sha256 or _hash_tensors(state_dict),
            metadata,
            collector.factors,
            report,
            collector.embeddings,
            collector.architectures,
            collector.provisional,
        )


def load_expert(
    path: str | Path, name: str | None = None, scale: float = 1.0, *, rank: int | None = None
) -> Expert:
    """Read a LoRA from a safetensors file.

    Args:
        path: a .safetensors file in any dialect of `naming`. Pickled files are refused: they can run code.
        name: the expert's name; the file's stem if None.
        scale: the user's factor for this expert.
        rank: compress deltas of higher rank to this one; see `Expert.from_state_dict`.
    Raises:
        ExpertLoadError: the file is missing, is not safetensors, or holds no usable LoRA.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertLoadError(f"There is no file {str(path)!r}.")
    if path.suffix != ".safetensors":
        raise ExpertLoadError(f"{str(path)!r} is not a .safetensors file; no other format is read.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ExpertLoadError(f"{str(path)!r} cannot be read as safetensors: {error}.") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Expert.from_state_dict(
        tensors,
        name=name if name is not None else path.stem,
        scale=scale,
        metadata=metadata,
        sha256=digest,
        rank=rank,
    )


class _Collector:
    """Puts together the tensors of each matrix; every key ends up loaded or ignored.

    Args:
        state_dict: content of a file.
        alphas: what the file's header says of alphas.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], alphas: _PeftAlphas) -> None:
        self.tensors = state_dict
        self.alphas = alphas
        self.factors: dict[str, dict[str, LoraFactors]] = {}
        self.architectures: dict[str, str] = {}
        self.provisional: dict[str, dict[str, str]] = {}
        self.errors: dict[str, float] = {}
        self._missing: list[str] = []
        self._dialects: Counter[str] = Counter()
        self.embeddings, used, self._ignored = split_embeddings(state_dict)
        self._loaded = sorted(used)
        modules: dict[str, dict[str, tuple[str, ParsedKey]]] = {}
        refused: dict[str, str] = {}
        keys = [key for key in state_dict if key not in used and key not in self._ignored]
        for key, parsed in parse_keys(keys).items():
            if parsed.role is None or parsed.reason is not None:
                self._ignored[key] = parsed.reason or NOT_LORA
                refused[parsed.module] = self._ignored[key]
            else:
                modules.setdefault(parsed.module, {})[parsed.role] = (key, parsed)
        for module, roles in modules.items():
            self._add(module, roles, refused.get(module))

    def _add(self, module: str, roles: dict[str, tuple[str, ParsedKey]], refused: str | None) -> None:
        keys = [key for key, _ in roles.values()]
        absent = [f"{module} ({role})" for role in absent_roles(roles)]
        if refused or absent:
            self._ignored.update(dict.fromkeys(keys, refused or "the other factor is missing"))
            self._missing.extend(() if refused else absent)
            return
        parsed = next(iter(roles.values()))[1]
        network, matrix = str(parsed.network), parsed.places[0].matrix
        tensors = {role: self.tensors[key] for role, (key, _) in roles.items() if role != "alpha"}
        if "alpha" in roles:
            alpha: float | None = float(self.tensors[roles["alpha"][0]].float().item())
        else:
            rank = tensors["down"].shape[0] if "down" in tensors else None
            alpha = None if rank is None else self.alphas.find(network, matrix, rank=rank)
        self._place(parsed, build_factors(module, tensors, alpha))
        self._loaded.extend(keys)
        self._dialects.update(other.dialect for _, other in roles.values())

    def _place(self, parsed: ParsedKey, factors: LoraFactors) -> None:
        """Give each matrix that a name means its factors: all of them, or some rows of a fused matrix.

        Raises:
            ExpertLoadError: a matrix has factors already, or the rows cannot be shared out.
        """
        network, module = str(parsed.network), parsed.module
        own = self.factors.setdefault(network, {})
        for place in parsed.places:
            if place.matrix in own:
                raise ExpertLoadError(
                    f"{module!r} is the second entry for matrix {place.matrix!r} of the {network}."
                )
            try:
                rows = place.rows(factors.up.shape[0])
                own[place.matrix] = factors if rows is None else factors.rows_of(rows)
            except ValueError as error:
                raise ExpertLoadError(f"{module!r} fuses several matrices: {error}.") from error
            if place.provisional:
                self.provisional.setdefault(network, {})[place.matrix] = parsed.flat
        self.architectures[network] = str(parsed.architecture)

    def compress(self, rank: int) -> None:
        """Bring all deltas to `rank` at most.

        Raises:
            ExpertLoadError: a delta is DoRA's: it is known only together with a base.
        """
        for network, matrices in self.factors.items():
            for matrix, factors in matrices.items():
                if factors.magnitude is not None:
                    raise ExpertLoadError(
                        f"rank={rank} cannot compress DoRA ({network}, {matrix!r}): what it adds depends on "
                        "the base's weights and has full rank. Load it without rank."
                    )
                matrices[matrix], error = compress(factors, rank)
                if matrices[matrix] is not factors:
                    self.errors[f"{network}.{matrix}"] = error

    def report(self) -> ExpertReport:
        """What became of every key."""
        dialects = tuple(name for name, _ in self._dialects.most_common())
        return ExpertReport(tuple(self._loaded), self._ignored, tuple(self._missing), dialects, self.errors)


class _PeftAlphas:
    """LoRA alphas that diffusers writes into the header (`lora_adapter_metadata`); r where there are none."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except json.JSONDecodeError:
            values = {}
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}

    def find(self, network: str, matrix: str, *, rank: int) -> float:
        alpha = self.values.get(f"{network}.lora_alpha", rank)
        for pattern, value in (self.values.get(f"{network}.alpha_pattern") or {}).items():
            if matrix == pattern or fnmatch(matrix, f"*.{pattern.removeprefix('text_model.')}"):
                alpha = value
        if self.values.get(f"{network}.use_rslora"):
            alpha = alpha * math.sqrt(rank)
        return float(alpha)


def _kohya_triggers(tag_frequency: str) -> tuple[str, ...]:
    try:
        folders = json.loads(tag_frequency or "{}")
    except json.JSONDecodeError:
        return ()
    counts: dict[str, int] = {}
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    best = max(counts, key=lambda tag: counts[tag], default="")
    return (best,) if best else ()


def _hash_tensors(state_dict: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    return digest.hexdigest()

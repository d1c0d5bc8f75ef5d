"""Reading a LoRA file into an `Expert`, with an account of every key."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConfigError, ExpertLoadError
from .naming import ParsedKey, parse_key


@dataclass(frozen=True)
class LoraFactors:
    """Factors of one matrix: its delta is `alpha / r * up @ down`.

    Attributes:
        down: (r, in) or (r, in, 1, 1).
        up: (out, r) or (out, r, 1, 1).
        alpha: LoRA alpha; equal to r where a file has none.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """(down (r, in), up (out, r)) without the trailing axes of 1x1 convolutions."""
        return self.down.flatten(1), self.up.flatten(1)


@dataclass(frozen=True)
class ExpertReport:
    """What became of each key of a file.

    Attributes:
        loaded: keys that are used.
        ignored: key -> reason.
        missing: keys that should be there and are not (the other factor of a pair).
    """

    loaded: tuple[str, ...]
    ignored: Mapping[str, str]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """One line for people."""
        reasons = sorted(set(self.ignored.values()))
        text = f"{len(self.loaded)} keys loaded, {len(self.ignored)} ignored, {len(self.missing)} missing"
        return f"{text} ({'; '.join(reasons)})" if reasons else text


@dataclass(frozen=True)
class Expert:
    """One trained LoRA.

    Attributes:
        name: how the user calls it.
        scale: the user's factor for it.
        sha256: hash of the file (of the factors, if it did not come from a file).
        metadata: header of the file.
        factors: network ("unet", "text_encoder") -> canonical matrix name -> factors.
        report: account of every key.
    """

    name: str
    scale: float
    sha256: str
    metadata: Mapping[str, str]
    factors: Mapping[str, Mapping[str, LoraFactors]]
    report: ExpertReport = field(repr=False)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Trigger texts named in the header (`mole.trigger`, separated by "|", or kohya's most used tag)."""
        named = self.metadata.get("mole.trigger", "")
        if named:
            return tuple(text.strip() for text in named.split("|") if text.strip())
        return _kohya_triggers(self.metadata.get("ss_tag_frequency", ""))

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        name: str,
        scale: float = 1.0,
        metadata: Mapping[str, str] | None = None,
        sha256: str | None = None,
    ) -> Expert:
        """Build an expert from tensors in any known dialect.

        Raises:
            ExpertLoadError: no key is usable, or a pair of factors does not fit together.
            ConfigError: the name is empty or the scale is not a finite number.
        """
        if not name:
            raise ConfigError("An expert needs a name that is not empty.")
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale!r} of expert {name!r} is not a finite number.")
        metadata = dict(metadata or {})
        factors, report = _collect(state_dict, _PeftAlphas(metadata))
        if not report.loaded:
            reasons = {reason: key for key, reason in reversed(list(report.ignored.items()))}
            listed = "; ".join(f"{reason} (e.g. {key!r})" for reason, key in reasons.items())
            raise ExpertLoadError(
                f"Expert {name!r}: none of its {len(state_dict)} keys can be used: {listed or 'no keys'}."
            )
        return cls(name, float(scale), sha256 or _hash_tensors(state_dict), metadata, factors, report)


def load_expert(path: str | Path, name: str | None = None, scale: float = 1.0) -> Expert:
    """Read a LoRA from a safetensors file.

    Args:
        path: a .safetensors file in any dialect of `naming`. Pickled files are refused: they can run code.
        name: the expert's name; the file's stem if None.
        scale: the user's factor for this expert.
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
        tensors, name=name if name is not None else path.stem, scale=scale, metadata=metadata, sha256=digest
    )


def _collect(
    state_dict: Mapping[str, Tensor], alphas: _PeftAlphas
) -> tuple[dict[str, dict[str, LoraFactors]], ExpertReport]:
    """Pair the factors of each matrix; every key ends up loaded or ignored."""
    ignored: dict[str, str] = {}
    modules: dict[str, dict[str, tuple[str, ParsedKey]]] = {}
    refused: dict[str, str] = {}
    for key in state_dict:
        parsed = parse_key(key)
        if parsed.role is None or parsed.reason is not None:
            ignored[key] = parsed.reason or "not a LoRA key of a known dialect"
            if parsed.role is None and parsed.matrix is not None:
                refused[parsed.module] = ignored[key]
        else:
            modules.setdefault(parsed.module, {})[parsed.role] = (key, parsed)
    factors: dict[str, dict[str, LoraFactors]] = {}
    loaded: list[str] = []
    missing: list[str] = []
    for module, roles in modules.items():
        keys = [key for key, _ in roles.values()]
        absent = [f"{module} ({role} factor)" for role in ("down", "up") if role not in roles]
        reason = refused.get(module) or ("the other factor is missing" if absent else None)
        if reason is not None:
            ignored.update(dict.fromkeys(keys, reason))
            missing.extend(absent)
            continue
        parsed = roles["down"][1]
        network, matrix = str(parsed.network), str(parsed.matrix)
        if matrix in factors.setdefault(network, {}):
            raise ExpertLoadError(f"{module!r} is the second entry for matrix {matrix!r} of the {network}.")
        factors[network][matrix] = _pair(module, matrix, network, state_dict, roles, alphas)
        loaded.extend(keys)
    return {k: v for k, v in factors.items() if v}, ExpertReport(tuple(loaded), ignored, tuple(missing))


def _pair(
    module: str,
    matrix: str,
    network: str,
    state_dict: Mapping[str, Tensor],
    roles: Mapping[str, tuple[str, ParsedKey]],
    alphas: _PeftAlphas,
) -> LoraFactors:
    down, up = state_dict[roles["down"][0]], state_dict[roles["up"][0]]
    for tensor, role in ((down, "down"), (up, "up")):
        if tensor.dim() not in (2, 4) or (tensor.dim() == 4 and tensor.shape[2:] != (1, 1)):
            raise ExpertLoadError(
                f"{module!r}: {role} factor of shape {tuple(tensor.shape)}; allowed: two axes, or 1x1."
            )
    if down.shape[0] != up.shape[1]:
        raise ExpertLoadError(
            f"{module!r}: rank {down.shape[0]} of the down factor and {up.shape[1]} of the up factor differ."
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ExpertLoadError(f"{module!r}: a factor holds values that are not finite.")
    alpha = (
        float(state_dict[roles["alpha"][0]].float().item())
        if "alpha" in roles
        else alphas.find(network, matrix, rank=down.shape[0])
    )
    with torch.inference_mode(False):
        # Tensors read under inference mode (ComfyUI) could not be trained through; their clones can.
        down, up = (t.clone() if t.is_inference() else t.detach() for t in (down, up))
    return LoraFactors(down, up, alpha)


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

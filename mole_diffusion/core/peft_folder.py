"""Which files one expert consists of: a safetensors file; a PEFT folder; a folder with one per network."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .alphas import ADAPTER_CONFIG, ADAPTER_METADATA, SINGLE_ENTRIES
from .errors import ExpertLoadError
from .files import file_sha256
from .networks import architectures
from .peft_options import PeftOptions
from .reading import MAX_HEADER_BYTES, PICKLES, BadFileError, Content, parse_json, read_safetensors
from .scaling import short

ADAPTER = "adapter_model"
#: What training scripts call their file: it says nothing about the expert, the folder's name does.
USUAL_STEMS = ("pytorch_lora_weights", ADAPTER)
_SAFE, _PICKLED = ".safetensors", ".bin"
#: What PEFT saves: the first of the two files with tensors that is there counts.
ADAPTER_FILES = (f"{ADAPTER}{_SAFE}", f"{ADAPTER}{_PICKLED}", ADAPTER_CONFIG)


@dataclass(frozen=True)
class ExpertFile:
    """One file of an expert.

    Attributes:
        path: the file with the tensors.
        part: slot of the network that a folder's name gives to all of it; "" where its keys say.
        config: PEFT's `adapter_config.json` beside it, or None.
    """

    path: Path
    part: str = ""
    config: Path | None = None


def own_name(path: str | Path) -> str:
    """What an expert in a file or folder is called: usual names of files and of networks say nothing."""
    path = Path(path)
    if not path.is_dir():
        if path.stem not in USUAL_STEMS:
            return path.stem
        path = path.resolve().parent
    path = path.resolve()
    return path.parent.name if path.name in network_folders() else path.name


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is one expert, as PEFT or diffusers' networks save them."""
    return bool(_in_folder(folder))


def expert_files(path: Path) -> list[ExpertFile]:
    """The files that make up the expert at a path.

    Raises:
        ExpertLoadError: there are none.
    """
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            raise ExpertLoadError(
                f"The folder {str(path)!r} is no expert: it has no {ADAPTER}{_SAFE} or "
                f"{ADAPTER}{_PICKLED}, and none of its subfolders {', '.join(network_folders())} has one."
            )
        return found
    if not path.is_file():
        raise ExpertLoadError(f"There is no file {str(path)!r}.")
    if path.suffix != _SAFE and path.name != f"{ADAPTER}{_PICKLED}":
        pickled = " and, by its name, a pickle, which can hold programs" if path.suffix in PICKLES else ""
        raise ExpertLoadError(
            f"{str(path)!r} is not a {_SAFE} file{pickled}; no other format is read, but for PEFT's "
            f"{ADAPTER}{_PICKLED}."
        )
    return [_with_surroundings(path)]


#: Is shown the keys with the shapes of their tensors, and the header of a file, and may raise.
Check = Callable[[Mapping[str, Sequence[int]], Mapping[str, str]], None]


def read_files(files: Sequence[ExpertFile], check: Check) -> tuple[Content, dict[str, PeftOptions]]:
    """The content of all files of an expert as if it were one file, and PEFT's settings of each part.

    Args:
        files: at least one.
        check: is shown keys and header of each file before its data is read, and may raise.
    Raises:
        ExpertLoadError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    options: dict[str, PeftOptions] = {}
    finite: set[str] = set()
    hashes: list[tuple[str, str]] = []
    for file in files:
        if file.config is not None:
            raw = _bytes(file.config, MAX_HEADER_BYTES)
            label = f"{file.part}/{ADAPTER_CONFIG}".lstrip("/")
            options[file.part] = PeftOptions(label, _json(file.config, raw), complete=True)
            metadata[label] = json.dumps(options[file.part].values)
            hashes.append((file.config.name, hashlib.sha256(raw).hexdigest()))
        rename = _renaming(file.part)
        content = _read(file.path, _checking(check, rename))
        hashes.append((file.path.name, content.sha256))
        header, found = _of_part(content.metadata, file)
        if found is not None:
            options.setdefault(file.part, found)
        if twice := [key for key in content.tensors if rename(key) in tensors]:
            raise ExpertLoadError(
                f"{str(file.path)!r} has {twice[0]!r}, which another file of the folder has."
            )
        tensors |= {rename(key): tensor for key, tensor in content.tensors.items()}
        metadata = {**header, **metadata}
        finite |= {rename(key) for key in content.finite}
    return Content(tensors, metadata, _identity(hashes), frozenset(finite)), options


def expert_paths(path: str | Path) -> dict[str, Path]:
    """All files of the expert at a path, by the names under which a copy of them is the same expert.

    Raises:
        ExpertLoadError: there is no such file or folder.
    """
    found: dict[str, Path] = {}
    for file in expert_files(Path(path)):
        for one in (file.config, file.path):
            if one is not None:
                found[f"{file.part}/{one.name}".lstrip("/")] = one
    return found


def expert_facts(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file of the expert at a path does: name, time of change and size of each.

    Raises:
        ExpertLoadError: there is no such file or folder.
    """
    states = ((str(file), file.stat()) for file in expert_paths(path).values())
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


def expert_sha256(path: str | Path) -> str:
    """The hash that `load_expert` gives to the expert at a path, without looking at what is in it.

    Raises:
        ExpertLoadError: there is no such file or folder.
        OSError: it cannot be read.
    """
    return _identity([(file.name, file_sha256(file)) for file in expert_paths(path).values()])


def _identity(hashes: Sequence[tuple[str, str]]) -> str:
    """A file alone is its own hash; what belongs together has one of all."""
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in hashes).encode()).hexdigest()


def network_folders() -> list[str]:
    """What folders with a LoRA of one network are called."""
    return list(dict.fromkeys(slot for architecture in architectures() for slot in architecture.slots))


def _in_folder(folder: Path) -> list[ExpertFile]:
    names = list(ADAPTER_FILES[:2])
    for name in names:
        if (folder / name).is_file():
            return [_with_surroundings(folder / name)]
    names.insert(1, f"{USUAL_STEMS[0]}{_SAFE}")
    inside = ([folder / slot / name for name in names] for slot in network_folders())
    found = [next((path for path in paths if path.is_file()), None) for paths in inside]
    return [_with_surroundings(path) for path in found if path is not None]


def _with_surroundings(path: Path) -> ExpertFile:
    """A file with what lies beside it and what its folder's name says."""
    if path.stem not in USUAL_STEMS:
        return ExpertFile(path)
    config = path.with_name(ADAPTER_CONFIG)
    part = path.resolve().parent.name
    used = path.stem == ADAPTER and config.is_file()
    return ExpertFile(path, part if part in network_folders() else "", config if used else None)


def _renaming(part: str) -> Callable[[str], str]:
    """Keys as they are, or with the name of their network, where that is in a folder's name alone."""

    def rename(key: str) -> str:
        name = key
        while name.startswith(("base_model.", "model.")):
            name = name.removeprefix("base_model.").removeprefix("model.")
        named = not part or name.startswith((f"{part}.", "lora_", "lycoris_"))
        return key if named else f"base_model.model.{part}.{name}"

    return rename


def _checking(check: Check, rename: Callable[[str], str]) -> Check:
    return lambda shapes, metadata: check({rename(key): own for key, own in shapes.items()}, metadata)


def _of_part(metadata: Mapping[str, str], file: ExpertFile) -> tuple[dict[str, str], PeftOptions | None]:
    """A file's header with the part's name in its entries, and diffusers' settings in it, if any."""
    if not file.part:
        return dict(metadata), None
    named = {f"{file.part}.{key}" if key in SINGLE_ENTRIES else key: text for key, text in metadata.items()}
    values = named.pop(ADAPTER_METADATA, None)
    if values is None:
        return named, None
    label = f"header's {ADAPTER_METADATA}"
    return named, PeftOptions(f"{file.part}: {label}", _json(file.path, values, f"{label}: "))


def _read(path: Path, check: Check) -> Content:
    try:
        if path.suffix == _PICKLED:
            return _unpickled(path)
        return read_safetensors(path, lambda header: check(header.shapes, header.metadata))
    except (BadFileError, OSError) as error:
        kind = "PyTorch weights" if path.suffix == _PICKLED else "safetensors"
        raise ExpertLoadError(f"{str(path)!r} cannot be read as {kind}: {error}.") from error


def _unpickled(path: Path) -> Content:
    """Tensors of a `.bin` file; nothing in it is run.

    Raises:
        BadFileError: it holds anything but dense tensors by name.
    """
    raw = path.read_bytes()
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's bytes bring about
        reason = str(error).strip().partition("\n")[0]
        raise BadFileError(f"{type(error).__name__}: {reason:.200}") from error
    if not isinstance(values, dict) or not values:
        raise BadFileError(f"it holds a {type(values).__name__}, and no tensors by name")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise BadFileError(f"{short(key)} is no dense tensor")
        if tensor.is_meta or tensor.is_quantized or _bytes_of(tensor) > tensor.untyped_storage().nbytes():
            raise BadFileError(f"{key!r} is no dense tensor")
    return Content({key: t.detach() for key, t in values.items()}, {}, hashlib.sha256(raw).hexdigest())


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise ExpertLoadError(f"{str(path)!r} has {path.stat().st_size} bytes, more than {most}.")
        return path.read_bytes()
    except OSError as error:
        raise ExpertLoadError(f"{str(path)!r} cannot be read: {error}.") from error


def _json(path: Path, text: str | bytes, what: str = "") -> dict[str, Any]:
    """A JSON object.

    Raises:
        ExpertLoadError: it is none.
    """
    try:
        values = parse_json(text)
        if not isinstance(values, dict):
            raise BadFileError("it is no JSON object")
    except BadFileError as error:
        raise ExpertLoadError(f"{str(path)!r}: {what}{error}.") from error
    return values

"""Safetensors files in one pass: header, tensors, hash, and which numbers are finite, from the same bytes.

A file is read into one buffer while another thread hashes it; tensors are views of that buffer in the data
types of the file. Headers are bounded in size, depth and number of entries before they are parsed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# kohya writes megabytes of tags into headers; nothing writes more than this.
MAX_HEADER_BYTES = 32 * 2**20
_MAX_DEPTH = 32
_MAX_CONTAINERS = 2**20
_MAX_VALUES = 2**22
_MAX_DIGITS = 400
_MAX_AXES = 16
_CHUNK = 4 * 2**20
#: The largest float32, in which factors are computed with.
LARGEST = 3.4028234663852886e38
_LENGTH_BYTES = 8
# Data type in a file -> (its name in torch, bytes).
_TYPES = {
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)},
    **{"F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1)},
    **{"I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1)},
    **{"U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1)},
    **{"BOOL": ("bool", 1), "C64": ("complex64", 8)},
}
# Older torch knows none of these.
FLOATS_OF_8_BITS = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)
)
#: Endings of files that PyTorch pickles.
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_CHECKED = ("F64", "F32", "F16", "BF16")


class BadFileError(ValueError):
    """A file, or a part of it, is not what it should be; callers add its name."""


class Entry(NamedTuple):
    """Where a tensor lies in the data of a file.

    Attributes:
        dtype: as the file names it ("BF16").
        start, end: bytes, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data.

    Attributes:
        metadata: free texts.
        entries: key -> place, in the order of the data.
        raw: the bytes it was read from, with their length.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    raw: bytes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors."""
        return {key: entry.shape for key, entry in self.entries.items()}


@dataclass(frozen=True)
class Content:
    """A whole file.

    Attributes:
        tensors: key -> tensor in the data type of the file, in memory of its own.
        metadata: free texts of the header.
        sha256: hash of the file's bytes.
        finite: keys that are known to hold finite numbers only.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str
    finite: frozenset[str] = frozenset()


def read_safetensors(path: Path, check: Callable[[Header], None] | None = None) -> Content:
    """Read a file once.

    Args:
        path: the file.
        check: is shown the header before any data is read, and may raise.
    Raises:
        BadFileError: it is no safetensors file, or ends too early.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        header = _read_header(file)
        if check is not None:
            check(header)
        size = max((entry.end for entry in header.entries.values()), default=0)
        # Tensors that are made in inference mode (ComfyUI) could not be trained through.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8)
            digest = hashlib.sha256(header.raw)
            with ThreadPoolExecutor(1) as hasher:
                for chunk in _chunks(file, buffer):
                    hasher.submit(digest.update, chunk)
                tensors, finite = _tensors(buffer, header.entries)
    return Content(tensors, header.metadata, digest.hexdigest(), finite)


def read_header(path: Path) -> Header:
    """Read what a file says before its data.

    Raises:
        BadFileError: it is no safetensors file.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return _read_header(file)


def foreign_kind(head: bytes) -> str | None:
    """What a file is that is no safetensors file, in words; None where its beginning does not tell.

    Args:
        head: the first 16 bytes, or all that there are.
    """
    start = head.lstrip().lower()
    if not head:
        return "it is an empty file; perhaps its download broke off"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; perhaps the download needed a login"
    if start.startswith(b"version https:/"):
        return "it is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`"
    # A header of 640 bytes begins like a pickle of protocol 2, and goes on with its JSON.
    pickled = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[8:9] != b"{"
    if pickled or head.startswith(b"PK\x03\x04"):
        return "it is a pickle (.ckpt, .pt, .bin), which can hold programs, and is not opened"
    return None


def parse_json(text: str | bytes) -> Any:
    """JSON of bounded size, depth and number of values.

    Raises:
        BadFileError: it is no JSON, or beyond the bounds.
    """
    if len(text) > MAX_HEADER_BYTES:
        raise BadFileError(f"it has {len(text)} bytes, more than {MAX_HEADER_BYTES}")
    try:
        text = text if isinstance(text, str) else text.decode()
        _check_bounds(text)
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of characters could never be printed
        return value
    except BadFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"it is no JSON ({error})") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether floating-point numbers (of any shape) are all finite, also as float32."""
    if tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # 8-bit floats know hardly any operation
        tensor = tensor.to(torch.float16)
    try:
        # Both carry NaN on, at ten times the speed of isfinite.
        low, high = torch.aminmax(tensor.detach())
    except RuntimeError:  # older torch: not for every data type
        return bool(finite_values(tensor).all())
    return bool(low.item() >= -LARGEST and high.item() <= LARGEST)


def finite_values(tensor: Tensor) -> Tensor:
    """Where floating-point numbers (of any shape, not of 8 bits) are finite, also as float32."""
    # A half cannot be compared with a number that it does not have.
    return tensor.abs() <= LARGEST if tensor.dtype == torch.float64 else torch.isfinite(tensor)


def _check_bounds(text: str) -> None:
    """Refuse nested or endless JSON by its brackets, commas and digits outside of texts."""
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    if not outside.isascii():
        raise BadFileError("it has letters outside of texts")
    if outside.count("[") + outside.count("{") > _MAX_CONTAINERS or outside.count(",") > _MAX_VALUES:
        raise BadFileError("it has too many values")
    if len(max(_digits(outside), key=len, default="")) > _MAX_DIGITS:
        raise BadFileError("it has a number of too many digits")
    brackets = outside.translate(_ONLY_BRACKETS)
    for _ in range(_MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace("[]", "").replace("{}", "")
    if brackets:
        raise BadFileError(f"its brackets are not closed, or nest deeper than {_MAX_DEPTH}")


class _Only(dict[int, int | None]):
    """A translation table that keeps some characters and replaces or drops all others."""

    def __init__(self, kept: str, other: str | None = None) -> None:
        super().__init__({ord(letter): ord(letter) for letter in kept})
        self._other = None if other is None else ord(other)

    def __missing__(self, letter: int) -> int | None:
        return self._other


_ONLY_BRACKETS = _Only("[]{}")
_ONLY_DIGITS = _Only("0123456789", " ")


def _digits(text: str) -> list[str]:
    return text.translate(_ONLY_DIGITS).split()


def _read_header(file: FileIO) -> Header:
    foreign = foreign_kind(file.read(16))
    if foreign is not None:
        raise BadFileError(foreign)
    file.seek(0)
    first = _read(file, _LENGTH_BYTES)
    length = int.from_bytes(first, "little")
    size = file.seek(0, 2) - _LENGTH_BYTES
    if length > size:
        raise BadFileError("it has no header of the length that its first 8 bytes name")
    if length > MAX_HEADER_BYTES:
        raise BadFileError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    file.seek(_LENGTH_BYTES)
    raw = _read(file, length)
    try:
        values = parse_json(raw)
    except BadFileError as error:
        raise BadFileError(f"its header cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BadFileError("its header is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadFileError("its header has metadata that are no texts")
    found = sorted(
        ((key, _entry(key, value)) for key, value in values.items()),
        key=lambda item: (item[1].start, item[1].end),
    )
    _check_places(found, size - length)
    return Header(metadata, dict(found), first + raw)


def _entry(key: str, value: Any) -> Entry:
    """A tensor's place.

    Raises:
        BadFileError: it is not described as the format demands.
    """
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, start, end)
    except (TypeError, KeyError, ValueError):
        raise BadFileError(f"its header does not describe {key!r}") from None
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise BadFileError(f"{key!r} is of type {dtype!r:.40}; known are {', '.join(_TYPES)}")
    if len(shape) > _MAX_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise BadFileError(f"its header does not describe {key!r}")
    if end - start != math.prod(shape) * _TYPES[dtype][1]:
        raise BadFileError(f"{key!r} has {end - start} bytes, which is not {dtype} of shape {shape!r:.80}")
    return Entry(dtype, shape, start, end)


def _check_places(found: list[tuple[str, Entry]], size: int) -> None:
    """Refuse tensors that overlap, leave holes, or lie outside of the file."""
    last = 0
    for key, entry in found:
        if entry.start != last:
            raise BadFileError(f"{key!r} does not lie where the tensor before it ends")
        last = entry.end
    if last != size:
        raise BadFileError(f"it has {size} bytes of data, and its header speaks of {last}")


def _read(file: FileIO, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        block = file.read(size - len(content))
        if not block:
            raise BadFileError(f"it ends after {len(content)} of {size} bytes")
        content += block
    return bytes(content)


def _chunks(file: FileIO, buffer: Tensor) -> Iterator[memoryview]:
    """Fill a buffer (bytes) from a file, piece by piece."""
    size = buffer.numel()
    if size == 0:
        return
    memory = memoryview((ctypes.c_ubyte * size).from_address(buffer.data_ptr())).cast("B")
    done = 0
    while done < size:
        count = file.readinto(memory[done : done + _CHUNK])
        if not count:
            raise BadFileError(f"it ends after {done} of {size} bytes of data")
        yield memory[done : done + count]
        done += count


def _tensors(buffer: Tensor, entries: Mapping[str, Entry]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Tensors as views of the data, and the keys whose numbers are known to be finite."""
    tensors: dict[str, Tensor] = {}
    finite: list[str] = []
    for dtype, run in groupby(entries.items(), key=lambda item: item[1].dtype):
        members = list(run)
        whole = _numbers(buffer, dtype, members)
        sizes = [(entry.end - entry.start) // whole.element_size() for _, entry in members]
        for (key, entry), part in zip(members, whole.split_with_sizes(sizes), strict=True):
            try:
                tensors[key] = part.view(entry.shape)
            except RuntimeError as error:
                raise BadFileError(f"{key!r} cannot have the shape {entry.shape!r:.80}") from error
        # One look at all of them; where it finds something, each is looked at when it is used.
        if dtype in _CHECKED and is_finite(whole):
            finite += [key for key, _ in members]
    return tensors, frozenset(finite)


def _numbers(buffer: Tensor, dtype: str, members: Sequence[tuple[str, Entry]]) -> Tensor:
    """The numbers (n,) of tensors of one data type that lie in a row."""
    name, size = _TYPES[dtype]
    if not hasattr(torch, name):
        raise BadFileError(f"{members[0][0]!r} is of type {dtype}, which this torch does not have")
    start = members[0][1].start
    data = buffer[start : members[-1][1].end]
    if start % size:
        data = data.clone()  # other writers need not align
    numbers: Tensor = data.view(getattr(torch, name))
    return numbers

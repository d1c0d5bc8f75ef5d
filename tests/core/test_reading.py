"""Safetensors files in one pass: as safetensors reads them, bounded, checked, and not slower than a hash."""

from __future__ import annotations

import hashlib
import json
import random
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from tiny.families import make_unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mole_diffusion import Expert, load_expert
from mole_diffusion.core import reading
from mole_diffusion.core.reading import BadFileError, is_finite, parse_json, read_header, read_safetensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def some_tensors() -> dict[str, Tensor]:
    """Every data type, odd sizes, scalars, empty ones."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in (*FLOATS, *EIGHT_BITS, *OTHERS):
        for shape in ((3, 5), (7,), (), (2, 1, 3, 3), (0, 4)):
            value = torch.randn(shape, generator=generator) * 3
            tensors[f"{dtype}{shape}"] = value.to(dtype)
    return tensors


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header, also one that no writer makes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_all_types_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    save_file(some_tensors(), path, metadata={"a": "1", "schrift": "größer 猫"})
    content = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        assert content.metadata == file.metadata()
        assert set(content.tensors) == set(file.keys())
        for key, tensor in content.tensors.items():
            other = file.get_tensor(key)
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            same = (t.contiguous().flatten().view(torch.uint8) for t in (tensor, other))
            assert torch.equal(*same)
    assert content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content.finite == {key for key, tensor in content.tensors.items() if tensor.dtype in FLOATS}


def test_a_file_is_opened_once_and_closed_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, short = tmp_path / "good.safetensors", tmp_path / "short.safetensors"
    save_file(some_tensors(), good)
    short.write_bytes(good.read_bytes()[:-1])
    opened = []
    plain = Path.open

    def counting(self: Path, *args: object, **kwargs: object) -> object:
        file = plain(self, *args, **kwargs)
        opened.append(file)
        return file

    monkeypatch.setattr(Path, "open", counting)
    content = read_safetensors(good)
    with pytest.raises(BadFileError, match="bytes of data, and its header speaks of"):
        read_safetensors(short)
    assert len(opened) == 2
    assert all(file.closed for file in opened)
    # Not mapped: what happens to the file later does not reach the tensors.
    before = content.tensors["torch.float32(3, 5)"].clone()
    good.write_bytes(bytes(good.stat().st_size))
    assert torch.equal(content.tensors["torch.float32(3, 5)"], before)


def test_the_header_is_shown_before_the_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(some_tensors(), tmp_path / "all.safetensors")
    monkeypatch.setattr(reading, "_chunks", lambda *_: pytest.fail("read the data"))

    def refuse(header: reading.Header) -> None:
        raise KeyError(len(header.entries))

    with pytest.raises(KeyError):
        read_safetensors(tmp_path / "all.safetensors", refuse)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "its header cannot be read: it is no JSON"),
        (b"\xff\xff", b"", "its header cannot be read: it is no JSON"),
        ([], b"", "its header is no JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "metadata that are no texts"),
        ({"__metadata__": [1]}, b"", "metadata that are no texts"),
        ({"x": None}, b"", "its header does not describe 'x'"),
        ({"x": {"dtype": "F32", "shape": [1]}}, b"", "its header does not describe 'x'"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "does not describe 'x'"),
        ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "does not describe 'x'"),
        ({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234", "does not describe 'x'"),
        (
            {"x": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}},
            b"1234",
            "does not describe 'x'",
        ),
        ({"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "'x' is of type 'Q4'; known"),
        (
            {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            b"1234",
            "'x' has 4 bytes, which is not",
        ),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "does not lie where"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8), "its header speaks of 4"),
        (
            {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
            bytes(4),
            "which is not F32",
        ),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nest deeper than 32"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "a number of too many digits"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}', b"", "it is no JSON"),
        (b"[" + b"[]," * 2_000_000 + b"[]]", b"", "too many values"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    for read in (read_header, read_safetensors):
        with pytest.raises(BadFileError, match=message):
            read(path)


def test_lengths_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.safetensors"
    for content, message in (
        (b"", "it is an empty file"),
        (b"short", "it ends after 5 of 8 bytes"),
        ((2**63).to_bytes(8, "little"), "no header of the length that its first 8 bytes name"),
        ((100).to_bytes(8, "little") + b"{}", "no header of the length"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadFileError, match=message):
            read_header(path)
    monkeypatch.setattr(reading, "MAX_HEADER_BYTES", 64)
    raw_file(path, {"__metadata__": {"a": "x" * 100}})
    with pytest.raises(BadFileError, match=r"its header has \d+ bytes, more than 64"):
        read_header(path)


def test_damaged_files_are_read_as_safetensors_reads_them_or_refused(tmp_path: Path) -> None:
    """No byte of a header makes it read anything that safetensors does not."""
    whole = save({"a": torch.arange(4.0), "b": torch.arange(6, dtype=torch.int16).view(2, 3)}, {"k": "v"})
    end = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "damaged.safetensors"
    generator = random.Random(3)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2))):
            place = generator.randrange(end)
            damaged[place] = generator.choice((generator.randrange(256), *b'0123456789{}[]",:'))
        path.write_bytes(damaged)
        try:
            found = read_safetensors(path).tensors
        except BadFileError:
            refused += 1
            continue
        with safe_open(path, framework="pt") as file:
            assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {  # noqa: SIM118
                key: tensor.tolist() for key, tensor in found.items()
            }
    assert 700 < refused < 1500


def test_files_of_writers_that_do_not_align(tmp_path: Path) -> None:
    header = {
        "small": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "numbers": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = b"\x07" + torch.tensor([1.5, -2.0]).view(torch.uint8).numpy().tobytes()
    found = read_safetensors(raw_file(tmp_path / "odd.safetensors", header, data)).tensors
    assert found["numbers"].tolist() == [1.5, -2.0]


def test_json_is_bounded() -> None:
    text = json.dumps({"a": ["[[[[" * 50, '\\"[', {"b": [1, -2.5e3, None, True]}], "ä": '"'})
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode()) == json.loads(text)
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    deepest = "[" * 32 + "]" * 32
    assert parse_json(deepest) == json.loads(deepest)
    for bad in (f"[{deepest}]", "{", "]", "[1}", '{"a": ä}', '"\\udc00"', "nan", '"', "1" * 500):
        with pytest.raises(BadFileError):
            parse_json(bad)


@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT_BITS])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_one_bad_number_is_found_wherever_it_stands(dtype: torch.dtype, size: int) -> None:
    good = torch.linspace(-3, 3, size).to(dtype)
    assert is_finite(good)
    assert is_finite(torch.zeros(0, dtype=dtype))
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    bad += [1e300, -1e300] if dtype == torch.float64 else []  # no float32
    for value in bad:
        for place in {0, size // 2, size - 1}:
            broken = good.to(torch.float64, copy=True)
            broken[place] = value
            assert not is_finite(broken.to(dtype))
            assert not is_finite(broken.to(dtype).view(-1, 1).expand(-1, 2))
            if dtype in FLOATS:
                expected = [i != place for i in range(size)]
                assert reading.finite_values(broken.to(dtype)).tolist() == expected


def test_older_torch_looks_at_each_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tensor: Tensor) -> None:
        raise RuntimeError(f"aminmax is not implemented for {tensor.dtype}")

    monkeypatch.setattr(torch, "aminmax", missing)
    for dtype in (*FLOATS, *EIGHT_BITS):
        assert is_finite(torch.ones(3).to(dtype))
        assert not is_finite(torch.tensor([1.0, float("nan")]).to(dtype))


def big_lora(path: Path, rank: int) -> int:
    """A LoRA of SDXL's attention in bf16 as kohya writes it; its size in bytes."""
    with torch.device("meta"):
        unet = make_unet("sdxl", full=True)
    state = {}
    for name, module in unet.named_modules():
        if ".attn" in name and isinstance(module, torch.nn.Linear):
            key = f"lora_unet_{name.replace('.', '_')}"
            out, fan_in = module.weight.shape
            state[f"{key}.lora_down.weight"] = torch.full((rank, fan_in), 0.01, dtype=torch.bfloat16)
            state[f"{key}.lora_up.weight"] = torch.full((out, rank), 0.02, dtype=torch.bfloat16)
            state[f"{key}.alpha"] = torch.tensor(float(rank), dtype=torch.bfloat16)
    save_file(state, path)
    return path.stat().st_size


class Looked(TorchDispatchMode):
    """Counts the numbers that operations read; views read none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.numbers += sum(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def test_every_byte_is_read_once_hashed_once_and_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loading costs; seconds depend on what else the machine does."""
    path = tmp_path / "big.safetensors"
    size = big_lora(path, 4)
    n_numbers = sum(tensor.numel() for tensor in read_safetensors(path).tensors.values())
    read, hashed = [], []

    class Counted(FileIO):
        def read(self, size: int = -1) -> bytes:
            read.append(len(found := super().read(size)))
            return found

        def readinto(self, buffer: Any) -> int:
            read.append(super().readinto(buffer))
            return read[-1]

    class Digest:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = hashlib.sha256()
            self.update(data)

        def update(self, data: bytes | memoryview) -> None:
            hashed.append(len(data))
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Counted(self, "rb"))
    monkeypatch.setattr(reading, "hashlib", SimpleNamespace(sha256=Digest))
    with Looked() as looked:
        expert = load_expert(path)
    assert expert.sha256 == expected
    assert sum(hashed) == size
    assert size <= sum(read) < size + 64  # what kind of file it is shows in the first bytes
    # Alphas are read one by one too.
    assert n_numbers <= looked.numbers < 1.01 * n_numbers


def memory(expert: Expert) -> int:
    """Bytes of everything that the factors keep in memory."""
    tensors = [t for own in expert.factors.values() for f in own.values() for t in (f.down, f.up)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_factors_stay_in_the_type_and_memory_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    size = big_lora(path, 4)
    expert = load_expert(path)
    assert {factors.down.dtype for factors in expert.factors["unet"].values()} == {torch.bfloat16}
    assert memory(expert) < size
    same = Expert.from_state_dict(read_safetensors(path).tensors, name="same")
    for name, factors in expert.factors["unet"].items():
        assert torch.equal(factors.delta(), same.factors["unet"][name].delta())


def test_a_file_of_which_little_is_used_does_not_stay_in_memory(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    save_file(state | {"step": torch.zeros(100_000)}, tmp_path / "lora.safetensors")
    assert memory(load_expert(tmp_path / "lora.safetensors")) == 2 * 2 * 32 * 4


def test_what_is_read_in_inference_mode_can_be_trained_through(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    big_lora(path, 1)
    with torch.inference_mode():
        expert = load_expert(path)
        made = {key: tensor.clone() for key, tensor in read_safetensors(path).tensors.items()}
        other = Expert.from_state_dict(made, name="dog")
    assert next(iter(made.values())).is_inference()
    for one in (expert, other):
        for factors in one.factors["unet"].values():
            assert not factors.down.is_inference()
            assert not factors.up.is_inference()


def test_a_whole_model_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    monkeypatch.setattr(reading, "_chunks", lambda *_: pytest.fail("read the data"))
    with pytest.raises(ValueError, match="none of its 1 keys can be used"):
        load_expert(tmp_path / "base.safetensors")

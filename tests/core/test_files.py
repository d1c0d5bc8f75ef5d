"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mole_diffusion.core.errors import WriteError
from mole_diffusion.core.files import check_writable, filling, replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path, other = tmp_path / "value[1].txt", tmp_path / "value.txt"
    code = """
import sys, time
from pathlib import Path
from mole_diffusion.core.files import replacing
for name in sys.argv[1:]:
    replaced = replacing(Path(name))
    replaced.__enter__().write_text("half")
    globals()[name] = replaced
print("written", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(path), str(other)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with replacing(path) as temporary:
            temporary.write_text("ours")
        assert len(list(tmp_path.glob(".*.tmp"))) == 2, "another process is still writing"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with replacing(path) as temporary:
        temporary.write_text("ours")
    (left,) = tmp_path.glob(".*.tmp")
    assert left.name.startswith(".value.txt."), "that of another file stays for its own next write"
    host = left.name.split(".")[3].split("-")[0]
    far = tmp_path / left.name.replace(host, "elsewhere")
    left.rename(far)
    with replacing(other) as temporary:
        temporary.write_text("ours")
    assert far.exists(), "whether a process of another machine lives cannot be told"
    os.utime(far, (time.time() - 10**6,) * 2)
    with replacing(other) as temporary:
        temporary.write_text("ours")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def _fail_after_writing(path: Path) -> None:
    path.write_text("second")
    raise ValueError("later")


def test_a_folder_is_filled_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with filling(folder) as temporary:
        for name in ("config", "weights"):
            (temporary / name).write_text("first")
    (folder / "other").write_text("of somebody")
    with pytest.raises(ValueError, match="later"), filling(folder) as temporary:
        _fail_after_writing(temporary / "config")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config": "first",
        "weights": "first",
        "other": "of somebody",
    }
    code = """
import sys, os, signal
from pathlib import Path
from mole_diffusion.core.files import filling
with filling(Path(sys.argv[1])) as temporary:
    (temporary / "config").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert (
        subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    )
    assert len(list(folder.glob(".*.tmp"))) == 1
    assert (folder / "config").read_text() == "first"
    with filling(folder) as temporary:
        (temporary / "config").write_text("second")
    assert sorted(path.name for path in folder.iterdir()) == ["config", "other", "weights"]
    assert (folder / "config").read_text() == "second"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"'.*file/deeper' cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "deeper")
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is made before it is needed"


@pytest.mark.parametrize("kind", ["text", "torch", "safetensors"])
def test_a_full_disk_is_said_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    """The system refuses more bytes: as a full disk does, in the words of whoever writes."""
    resource = pytest.importorskip("resource")
    tensor = torch.zeros(10**5)
    write = {
        "text": lambda path: path.write_bytes(bytes(4 * 10**5)),
        "torch": lambda path: torch.save({"t": tensor}, path),
        "safetensors": lambda path: save_file({"t": tensor}, path),
    }[kind]
    path = tmp_path / "file"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        with pytest.raises(WriteError, match=r"'.*file' cannot be written: "), replacing(path) as temporary:
            write(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_fault_of_writing_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"), replacing(tmp_path / "file"):
        raise RuntimeError("something else")

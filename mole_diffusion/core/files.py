"""Files that appear whole or not at all, and one sentence where nothing can be written."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import WriteError

_HOST = re.sub(r"\W+", "_", platform.node())[:40] or "host"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{32}\.tmp")
#: Nobody writes one file for so long; what is older was left by a program that was killed.
_OLD_SECONDS = 24 * 3600
#: What libraries say, in errors of their own, when the system took no more bytes.
_FAILED = re.compile(
    r"no space left|file too large|fail\w* writing|write failed|i/o error|iostream error|unexpected pos",
    re.IGNORECASE,
)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; when the `with` block ends well, it takes `path`'s place.

    If the block fails, `path` is as it was and nothing else is left. What programs left that were killed
    while they wrote the same file is removed. Missing folders are made.

    Args:
        path: file to write or replace.

    Raises:
        WriteError: the folder cannot be written to, or the disk is full.
    """
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            _remove(temporary)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder` to write files to; when the `with` block ends well, they move up.

    For libraries that write several files by themselves. Each takes its place whole; files of other names
    stay as they are. If the block fails, nothing changes.

    Args:
        folder: where the files are to lie; made if it is missing.

    Raises:
        WriteError: the folder cannot be written to, or the disk is full.
    """
    path = folder / "files"
    temporary = _beside(path)
    with writing(folder):
        temporary.mkdir(parents=True)
        _remove_leftovers(path)
        try:
            yield temporary
            for file in sorted(temporary.iterdir()):
                file.replace(folder / file.name)
        finally:
            _remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in a sentence what could not be written, inside a `with` block that does nothing but write.

    Args:
        path: what is written, for the sentence.

    Raises:
        WriteError: the system refused it.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error.strerror or str(error)) from error
    except Exception as error:
        # torch and safetensors have errors of their own for a full disk.
        if _FAILED.search(str(error)) is None:
            raise
        raise WriteError(path, str(error).splitlines()[0]) from error


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Write a file for a moment where a folder is or will be: before work whose results would have no place.

    Raises:
        WriteError: the folder cannot be made or written to, or the disk is full.
    """
    place = next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), Path())
    probe = place / f".writable.{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
    with writing(folder):
        try:
            probe.write_bytes(bytes(4096))
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this path whose writers on this machine are gone."""
    for left in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        found = _TEMPORARY.fullmatch(left.name)
        if found is None or found["name"] != path.name:
            continue
        with suppress(OSError):
            dead = found["host"] == _HOST and not _alive(int(found["pid"]))
            if dead or time.time() - left.stat().st_mtime > _OLD_SECONDS:
                _remove(left)


def _beside(path: Path) -> Path:
    """A temporary path that says whose it is."""
    # Not mkstemp: its files can be read by the owner alone, and these are to be shared.
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.tmp")


def _remove(temporary: Path) -> None:
    """Take a temporary file or folder away, if it is there and can be."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        return
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

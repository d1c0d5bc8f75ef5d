"""Files that appear whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; when the `with` block ends well, it takes `path`'s place.

    If the block fails, `path` is as it was and nothing else is left. Missing folders are made.

    Args:
        path: file to write or replace.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files can be read by the owner alone, and these are to be shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""The page's state in the browser's storage: what was changed last is there before the server has it.

Every change is written there and sent to the server, both with the time of the browser's clock. A load
of the page brings what the browser has; where that is newer than what the server was told, it counts: a
reload in the middle of a change loses nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from mole_diffusion.app.session import Session

logger = logging.getLogger(__name__)

#: Of what a browser brings, more than this is not looked at.
_MOST_BYTES = 4 * 2**20
_KEY = "mole-"
# Pictures of tiles are the server's; without them a change is a few hundred bytes.
_WRITE = """(mark, ...values) => {
  const plain = (value) => (Array.isArray(value) ? value.map(({ picture, ...rest }) => rest) : value);
  const held = Object.fromEntries(NAMES.map((name, i) => [name, plain(values[i])]));
  try {
    localStorage.setItem(KEY, JSON.stringify({ mark, stamp: Date.now(), held }));
  } catch {}  // no storage, or a full one: what the server was told counts
  return [];
}"""
_READ = """() => {
  try {
    return JSON.stringify(KEYS.map((key) => JSON.parse(localStorage.getItem(key))));
  } catch {
    return '';
  }
}"""
#: For the event that tells the server: the time, in place of its first input.
STAMPED = "(before, ...values) => [Date.now(), ...values]"


def write_js(kind: str, names: Sequence[str]) -> str:
    """A page's function that writes its inputs, after `mark_of`'s, into the browser's storage.

    Args:
        kind: what they are together.
        names: of the inputs; written in the code of the app and nowhere else.
    """
    return _WRITE.replace("NAMES", json.dumps(list(names))).replace("KEY", json.dumps(_KEY + kind))


def read_js(kinds: Sequence[str]) -> str:
    """A page's function that brings what the browser has, for `newer`."""
    return _READ.replace("KEYS", json.dumps([_KEY + kind for kind in kinds]))


def mark_of(session: Session) -> str:
    """What a browser's storage tells states of different sessions and models apart by."""
    return sha256(f"{session.folder}\n{session.model}".encode()).hexdigest()[:16]


def newer(session: Session, kind: str, index: int, brought: Any) -> dict[str, Any]:
    """What the browser has and the server was never told; empty where there is nothing of the kind.

    Args:
        session: whose.
        kind: see `write_js`.
        index: its place among the kinds of `read_js`.
        brought: what that returned. It comes from outside: values may be of any kind.
    """
    if not isinstance(brought, str) or len(brought) > _MOST_BYTES:
        return {}
    try:
        entry = (json.loads(brought or "[]") + [None] * (index + 1))[index]
        if entry is None or entry["mark"] != mark_of(session):
            return {}
        if float(entry["stamp"]) <= told(session, kind):
            return {}
        return {str(name): value for name, value in entry["held"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.info("what a browser's storage has cannot be read: %s", error)
        return {}


def told(session: Session, kind: str) -> float:
    """When, by the browser's clock, the server was told last."""
    stamps = session.page.get("stamps")
    found = stamps.get(kind, 0) if isinstance(stamps, Mapping) else 0
    return float(found) if isinstance(found, (int, float)) else 0.0


def stamps(session: Session, kind: str, stamp: Any) -> dict[str, float]:
    """All times of this kind, with a new one; for the page's state."""
    before = session.page.get("stamps")
    known = dict(before) if isinstance(before, Mapping) else {}
    return {**known, kind: float(stamp)} if isinstance(stamp, (int, float)) else known

"""Who may speak to the server, and what it does for nobody: hosts, origins, logins, and URLs of visitors."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: A call's arguments as JSON; files travel on their own.
MAX_CALL_BYTES = 16 * 2**20
#: JSON up to this size is read in the event loop: quicker than asking a thread to.
_SMALL = 64 * 2**10
#: Endpoints of Gradio that fetch, run or change what this app has no use for.
_CLOSED = ("/proxy=", "/process_recording", "/vibe-", "/deep_link", "/dev/reload", "/monitoring")
_SCHEMES = ("http:", "https:", "ftp:", "file:", "data:")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_SECONDS, _MOST_WAITING = 20.0, 4
#: Wrong logins older than this are forgotten.
_MEMORY_SECONDS = 900.0


@dataclass
class Hosts:
    """The names that the server answers to.

    A page from elsewhere whose name is made to point here (DNS rebinding) would be of the same origin as the
    app; the browser still tells which name it asked for.

    Args:
        listens: the address that the server is bound to.
        more: names that its owner gave it.
    """

    listens: str = "127.0.0.1"
    more: Iterable[str] = ()
    names: set[str] = field(init=False)

    def __post_init__(self) -> None:
        """Add what the machine calls itself."""
        self.names = {*_LOOPBACK, *(name.lower() for name in self.more)}
        self.open = self.listens not in _LOOPBACK
        if self.open:
            own = {socket.gethostname().lower(), self.listens.lower()}
            self.names |= own | {f"{name}.local" for name in own if "." not in name}

    def answers(self, host: str) -> bool:
        """Whether a `Host` header or the host of an origin is one of the server's."""
        name = _name_of(host)
        # An address cannot be made to point elsewhere.
        return name in self.names or (self.open and _is_address(name))


class HostGuard:
    """Refuses requests that name another host, or that another site's page makes.

    Args:
        app: what comes next.
        hosts: names of the server.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refuse(scope, receive, send, 403, refusal)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._hosts.answers(host):
            name = _name_of(host)[:80] or "of no host"
            return (
                f"This app does not answer to the name {name!r}. If it is yours: mole app --allow-host NAME"
            )
        if origin is not None and not self._is_own(origin, host):
            return f"This app answers its own pages only, not those of {origin[:80]!r}."
        site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
        if site in ("cross-site", "same-site") and mode != "navigate":
            return "This app answers its own pages only."
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page of this origin is ours; behind a proxy, `host` may be another name of ours."""
        place = urlsplit(origin).netloc.lower()
        name = _name_of(place)
        return place == host.lower() or (name not in _LOOPBACK and name in self._hosts.names)


class CallGuard:
    """Closes endpoints that the app has no use for, and lets no call name a URL in place of a file.

    Gradio would fetch it.

    Args:
        app: what comes next.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        path = scope.get("path", "")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif any(closed in path for closed in _CLOSED):
            await refuse(scope, receive, send, 404, "There is no such page.")
        elif "/file=" in path and "://" in path.partition("/file=")[2]:
            await refuse(scope, receive, send, 403, "This app fetches nothing from other servers.")
        elif scope["method"] == "POST" and not path.rstrip("/").endswith(("/upload", "/login")):
            await self._call(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive, MAX_CALL_BYTES)
        if body is None:
            limit = f"A call may have {MAX_CALL_BYTES // 2**20} MB; send files as files."
            await refuse(scope, receive, send, 413, limit)
            return
        check = _small_check if len(body) <= _SMALL else to_thread.run_sync
        refusal = await check(_call_refusal, body)
        if refusal is not None:
            await refuse(scope, receive, send, 400, refusal)
            return
        await self._app(scope, _replayed(body, receive), send)


class LoginGuard:
    """Makes wrong logins slow: each one of an address doubles the wait for its next.

    Args:
        app: what comes next.
        first: seconds of the first wait.
    """

    def __init__(self, app: ASGIApp, first: float = 0.5) -> None:
        self._app, self._first = app, first
        self._wrong: dict[str, list[float]] = {}
        self._waiting: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self._app(scope, receive, send)
            return
        who = (scope.get("client") or ("?", 0))[0]
        if self._waiting.get(who, 0) >= _MOST_WAITING:
            await refuse(scope, receive, send, 429, "Too many wrong logins: wait a while.")
            return
        self._waiting[who] = self._waiting.get(who, 0) + 1
        try:
            await asyncio.sleep(self._delay(who))
        finally:
            self._waiting[who] -= 1
            if not self._waiting[who]:
                del self._waiting[who]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._wrong.setdefault(who, []).append(time.monotonic())
                else:
                    self._wrong.pop(who, None)
            await send(message)

        await self._app(scope, receive, noting)

    def _delay(self, who: str) -> float:
        """Seconds that the next login of an address waits, more where others of it wait already."""
        now = time.monotonic()
        recent = {
            address: [time for time in times if now - time < _MEMORY_SECONDS]
            for address, times in self._wrong.items()
        }
        self._wrong = {address: times for address, times in recent.items() if times}
        wrong = len(self._wrong.get(who, ()))
        wait = min(self._first * 2 ** (wrong - 1), _MOST_SECONDS) if wrong else 0.0
        return wait * self._waiting.get(who, 1)


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    """Answer with a line of text."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = {"x-content-type-options": "nosniff"}
    await PlainTextResponse(f"{text}\n", status, headers)(scope, receive, send)


def names_url(value: Any) -> bool:
    """Whether a call's arguments have a URL where a file belongs."""
    waiting = [value]
    while waiting:
        now = waiting.pop()
        if isinstance(now, dict):
            path = now.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(_SCHEMES):
                return True
            waiting.extend(now.values())
        elif isinstance(now, list):
            waiting.extend(now)
    return False


def _call_refusal(body: bytes) -> str | None:
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return "The call's arguments are no JSON."
    if names_url(value):
        return "This app fetches nothing from other servers: upload the file."
    return None


async def _small_check(check: Any, body: bytes) -> Any:
    return check(body)


async def _body(receive: Receive, most: int) -> bytes | None:
    """A request's body; None if it is longer."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


def _name_of(host: str) -> str:
    """The name in `name:port` or `[address]:port`, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

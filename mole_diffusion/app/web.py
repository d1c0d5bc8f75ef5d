"""What stands in front of the app: a cookie that tells browsers apart, and a guard of the uploads."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mole_diffusion.app.doors import refuse
from mole_diffusion.app.uploads import MAX_FILE_BYTES, check_upload
from mole_diffusion.core.errors import MoLEError

COOKIE = "mole_session"
_KEY = re.compile(r"[\w-]{32}")
#: Browsers keep it no longer; every visit begins the time anew.
_COOKIE_SECONDS = 400 * 24 * 3600
#: All files of one upload.
MAX_UPLOAD_BYTES = 8 * 2**30
#: What uploads leave on the disk.
SPARE_BYTES = 2**30


class SessionCookie:
    """Gives every browser a random key, which pages cannot read, for more than a year.

    Args:
        app: what comes next.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_page(message):
                key = _cookie(scope) or secrets.token_urlsafe(24)
                value = f"{COOKIE}={key}; Path=/; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Lax"
                headers = MutableHeaders(scope=message)
                headers.append("set-cookie", value)
                headers.append("content-security-policy", "frame-ancestors 'self'")
            await send(message)

        await self._app(scope, receive, with_cookie)


class UploadGuard:
    """Looks at what was uploaded, and takes back what is neither a safetensors file nor a picture.

    Files are looked at in threads, two at a time: whoever waits for something else does not notice.

    Args:
        app: what comes next.
        folder: where uploads are written.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()
        self._looking = CapacityLimiter(2)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        uploads = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload")
        if not uploads:
            await self._app(scope, receive, send)
            return
        refused = self._no_room(Headers(raw=scope.get("headers", [])))
        if refused is not None:
            await refuse(scope, receive, send, *refused)
            return
        self._running += 1
        try:
            await self._app(scope, receive, self._judging(send))
        except ClientDisconnect:
            pass
        finally:
            self._running -= 1
            if not self._running:
                await to_thread.run_sync(self._sweep)

    def _no_room(self, headers: Headers) -> tuple[int, str] | None:
        """Status and words for an upload that is too large, or larger than what the disk has left."""
        said = headers.get("content-length", "")
        # Without a length it is of one file, and Gradio stops it where that becomes too large.
        length = int(said) if said.isdigit() else MAX_FILE_BYTES
        if length > MAX_UPLOAD_BYTES:
            return 413, f"An upload may have {MAX_UPLOAD_BYTES // 2**30} GB in all."
        place = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        if shutil.disk_usage(place).free - length < SPARE_BYTES:
            return 507, "There is no room for the upload on the disk of the machine that the app runs on."
        return None

    def _judging(self, send: Send) -> Send:
        """Hold Gradio's answer until its files were looked at."""
        start: Message | None = None
        body = b""

        async def hold(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            assert start is not None
            if start["status"] == 200:
                refused = await to_thread.run_sync(self._refusal, body, limiter=self._looking)
                if refused is not None:
                    body, start["status"] = refused.encode(), 415
                    headers = MutableHeaders(scope=start)
                    headers["content-type"], headers["content-length"] = "text/plain", str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        return hold

    def _refusal(self, body: bytes) -> str | None:
        """Why the files of an upload are not taken, after removing those; None if all are."""
        said = []
        for path in map(Path, json.loads(body)):
            try:
                check_upload(path)
            except Exception as error:
                # Whatever it was: a file that cannot be looked at is no file for the app.
                own = isinstance(error, MoLEError)
                said.append(str(error) if own else f"{path.name!r} cannot be read")
                if self._folder in path.resolve().parents:
                    path.unlink(missing_ok=True)
                    with suppress(OSError):
                        path.parent.rmdir()
        return "; ".join(said) or None

    def _sweep(self) -> None:
        """Remove what uploads that broke off left behind."""
        if not self._running and self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.is_file() and path.name.startswith("tmp"):
                    path.unlink(missing_ok=True)


def _cookie(scope: Scope) -> str | None:
    """The key that the browser has; None if it has none that this module could have made."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"cookie":
            cookies: SimpleCookie = SimpleCookie()
            with suppress(CookieError):
                cookies.load(value.decode("latin-1"))
            key = key_of({name: morsel.value for name, morsel in cookies.items()})
            if key is not None:
                return key
    return None


def key_of(cookies: Mapping[str, str]) -> str | None:
    """A browser's key among its cookies; None if it has none that could have been made here."""
    key = cookies.get(COOKIE, "")
    return key if _KEY.fullmatch(key) else None


def _is_page(message: Any) -> bool:
    kind = dict(message["headers"]).get(b"content-type", b"")
    return bool(message["status"] == 200 and kind.startswith(b"text/html"))

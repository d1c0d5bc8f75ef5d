"""What stands in front of the app: a cookie that tells browsers apart, and a guard of the uploads."""

from __future__ import annotations

import json
import secrets
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mole_diffusion.app.uploads import check_upload
from mole_diffusion.core.errors import MoLEError

COOKIE = "mole_session"
_THIRTY_DAYS = 30 * 24 * 3600


class SessionCookie:
    """Gives every browser a random key, which pages cannot read, for as long as the app runs.

    Args:
        app: what comes next.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "GET" or _has_cookie(scope):
            await self._app(scope, receive, send)
            return

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_page(message):
                key = secrets.token_urlsafe(24)
                value = f"{COOKIE}={key}; Path=/; Max-Age={_THIRTY_DAYS}; HttpOnly; SameSite=Lax"
                MutableHeaders(scope=message).append("set-cookie", value)
            await send(message)

        await self._app(scope, receive, with_cookie)


class UploadGuard:
    """Takes back what was uploaded and is neither a safetensors file nor a picture.

    Args:
        app: what comes next.
        folder: where uploads are written.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        uploads = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload")
        if not uploads:
            await self._app(scope, receive, send)
            return
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
            refused = self._refusal(body) if start["status"] == 200 else None
            if refused is not None:
                body, start["status"] = refused.encode(), 415
                headers = MutableHeaders(scope=start)
                headers["content-type"], headers["content-length"] = "text/plain", str(len(body))
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, hold)

    def _refusal(self, body: bytes) -> str | None:
        """Why the files of an upload are not taken, after removing all of them; None if they are."""
        paths = [Path(path) for path in json.loads(body)]
        try:
            for path in paths:
                check_upload(path)
        except MoLEError as error:
            for path in paths:
                if self._folder in path.resolve().parents:
                    path.unlink(missing_ok=True)
            return str(error)
        return None


def _has_cookie(scope: Scope) -> bool:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"cookie":
            cookies: SimpleCookie = SimpleCookie()
            cookies.load(value.decode("latin-1"))
            if COOKIE in cookies:
                return True
    return False


def _is_page(message: Any) -> bool:
    kind = dict(message["headers"]).get(b"content-type", b"")
    return bool(message["status"] == 200 and kind.startswith(b"text/html"))

"""Who may come in, and what strangers and their files can do: hosts, origins, logins, URLs, uploads."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_tools import Server
from PIL import Image, PngImagePlugin
from starlette.responses import PlainTextResponse

from mole_diffusion.app.doors import HostGuard, Hosts, LoginGuard, names_url
from mole_diffusion.app.metadata import KEY, PictureSettings, mask_from_text, mask_to_text, read_settings
from mole_diffusion.app.uploads import check_upload, promised_size
from mole_diffusion.app.web import COOKIE, UploadGuard
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.starter.location import starter_experts


def uploads(server: Server) -> set[Path]:
    """The files that uploads left."""
    return {path for path in server.folder.glob("mole-app-*/uploads/**/*") if path.is_file()}


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/queue/join"])
def test_foreign_hosts_are_refused_everywhere(server: Server, path: str) -> None:
    """A page whose name is made to point here is of the app's own origin."""
    port = server.url.rsplit(":", 1)[1]
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", ""):
        headers = {"host": host, "origin": f"http://{host}"}
        assert httpx.get(f"{server.url}{path}", headers=headers).status_code == 403
        assert httpx.post(f"{server.url}{path}", headers=headers, json={}).status_code == 403
    answer = httpx.get(f"{server.url}{path}", headers={"host": "evil.example"})
    assert "does not answer to the name 'evil.example'" in answer.text


def test_foreign_pages_are_refused(server: Server) -> None:
    body = {"data": ["/etc/hostname", "x"], "fn_index": 1, "session_hash": "s"}
    url = f"{server.url}/gradio_api/queue/join"
    other_port = server.url.rsplit(":", 1)[0] + ":1"
    for origin in ("http://evil.example", "null", other_port, "https://localhost"):
        assert httpx.post(url, json=body, headers={"origin": origin}).status_code == 403
    for site in ("cross-site", "same-site"):
        foreign = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
        assert httpx.get(f"{server.url}/config", headers=foreign).status_code == 403
    assert httpx.get(
        server.url, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    ).is_success
    assert httpx.get(f"{server.url}/config", headers={"origin": server.url}).is_success
    assert "frame-ancestors 'self'" in httpx.get(server.url).headers["content-security-policy"]


@pytest.mark.parametrize(
    ("listens", "more", "host", "answers"),
    [
        ("127.0.0.1", (), "localhost:7860", True),
        ("127.0.0.1", (), "LOCALHOST", True),
        ("127.0.0.1", (), "[::1]:7860", True),
        ("127.0.0.1", (), "192.168.0.7", False),
        ("127.0.0.1", (), "localhost.evil.example", False),
        ("127.0.0.1", ("studio.example",), "Studio.Example:443", True),
        ("0.0.0.0", (), "192.168.0.7:7860", True),
        ("0.0.0.0", (), "[fe80::1]:7860", True),
        ("0.0.0.0", (), socket.gethostname(), True),
        ("0.0.0.0", (), "evil.example", False),
        ("0.0.0.0", (), "1.2.3.4.evil.example", False),
    ],
)
def test_hosts(listens: str, more: tuple[str, ...], host: str, answers: bool) -> None:
    assert Hosts(listens, more).answers(host) == answers


def ask(app: Any, method: str = "POST", path: str = "/login", **headers: str) -> tuple[int, str]:
    """One request to an ASGI application."""
    transport = httpx.ASGITransport(app=app)

    async def call() -> tuple[int, str]:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.request(method, path, headers=headers)
            return answer.status_code, answer.text

    return asyncio.run(call())


def test_a_proxy_may_call_the_app_by_its_public_name() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("in")(scope, receive, send)

    guard = HostGuard(app, Hosts("127.0.0.1", ["studio.example"]))
    assert ask(guard, host="127.0.0.1:7860", origin="https://studio.example") == (200, "in")
    assert ask(guard, host="127.0.0.1:7860", origin="https://other.example")[0] == 403
    assert ask(guard, host="127.0.0.1:7860", origin="http://127.0.0.1:3000")[0] == 403


def test_wrong_logins_are_slow_and_right_ones_are_not() -> None:
    right = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("", 200 if right else 400)(scope, receive, send)

    guard = LoginGuard(app, first=0.1)

    def seconds() -> float:
        start = time.monotonic()
        ask(guard)
        return time.monotonic() - start

    waits = [seconds() for _ in range(4)]
    assert [wait > 0.9 * wanted for wait, wanted in zip(waits[1:], (0.1, 0.2, 0.4), strict=True)] == [
        True
    ] * 3
    right = True
    assert seconds() > 0.7
    assert min(seconds() for _ in range(3)) < 0.1


def test_a_crowd_of_wrong_logins_is_sent_away() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("", 400)(scope, receive, send)

    guard = LoginGuard(app, first=0.2)
    transport = httpx.ASGITransport(app=guard)

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.post("/login")
            answers = await asyncio.gather(*(client.post("/login") for _ in range(12)))
            return [answer.status_code for answer in answers]

    codes = asyncio.run(crowd())
    assert codes.count(429) == 8
    assert codes.count(400) == 4


@pytest.mark.parametrize("path", ["call/add_expert", "queue/join", "run/add_expert"])
def test_a_url_named_by_a_visitor_is_not_fetched(server: Server, path: str) -> None:
    file = {"path": "http://127.0.0.1:9/a.safetensors", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file, ""], "fn_index": 3, "session_hash": "s"}
    answer = httpx.post(f"{server.url}/gradio_api/{path}", json=body)
    assert answer.status_code == 400
    assert "fetches nothing from other servers" in answer.text


@pytest.mark.parametrize(
    "path",
    ["file=http://127.0.0.1:9/x", "file=https://example.org/x", "proxy=http://127.0.0.1:9/x", "vibe-edit/"],
)
def test_doors_that_the_app_does_not_need_are_closed(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}/gradio_api/{path}").status_code in (403, 404)


def test_urls_are_found_wherever_they_stand() -> None:
    assert names_url({"data": [[{"layers": [{"path": " HTTPS://x"}]}]]})
    assert not names_url({"data": ["http://in.a/prompt", {"path": "/tmp/x", "url": "http://127.0.0.1/x"}]})


def test_calls_are_bounded(server: Server) -> None:
    url = f"{server.url}/gradio_api/call/compose"
    nested = httpx.post(url, content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert nested.status_code == 400
    assert "no JSON" in nested.text
    large = httpx.post(url, content=b" " * (17 * 2**20), headers={"content-type": "application/json"})
    assert large.status_code == 413


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + b"\0" * 8


def bomb(side: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", (side, side)).save(stream, kind)
    return stream.getvalue()


def webp_bomb() -> bytes:
    """A small WebP whose head promises 16384 x 16384 pixels."""
    content = bytearray(bomb(8, "WEBP"))
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff\x3f\0" * 2
    content[12:12] = canvas
    content[4:8] = struct.pack("<I", len(content) - 8)
    return bytes(content)


HOSTILE = {
    "nested.safetensors": (lambda: safetensors(b"[" * 200_000), "header cannot be read"),
    "list.safetensors": (lambda: safetensors(b"[1, 2]"), "header cannot be read"),
    "long.safetensors": (lambda: safetensors(b'{"a":"' + b" " * (17 * 2**20) + b'"}'), "header of 17 MB"),
    "short.safetensors": (lambda: struct.pack("<Q", 2**60) + b"{}", "it has no header"),
    "huge.png": (lambda: bomb(20_000), "400 megapixels"),
    "large.png": (lambda: bomb(13_000), "169 megapixels"),
    "huge.webp": (webp_bomb, "268 megapixels"),
    "cut.png": (lambda: bomb(64)[:40], "cannot be read as a picture"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_own_words_and_not_kept(server: Server, name: str) -> None:
    make, words = HOSTILE[name]
    before = uploads(server)
    start = time.monotonic()
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, make())}, timeout=60)
    assert answer.status_code == 415, answer.text
    assert words in answer.text
    assert not uploads(server) - before
    assert time.monotonic() - start < 20
    assert "Traceback" not in server.said


def test_one_bad_file_does_not_take_the_good_ones_with_it(server: Server) -> None:
    good = starter_experts()["cat"].path.read_bytes()
    files = [("files", ("bad.safetensors", b"x")), ("files", ("good one.safetensors", good))]
    answer = httpx.post(f"{server.url}/gradio_api/upload", files=files)
    assert answer.status_code == 415
    names = {path.name for path in uploads(server)}
    assert "bad.safetensors" not in names
    assert "good one.safetensors" in names


def test_an_upload_that_breaks_off_leaves_nothing(server: Server) -> None:
    before = uploads(server)
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000000\r\n"
        "Content-Type: multipart/form-data; boundary=B\r\n\r\n--B\r\n"
        'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + b"\x89PNG" * 300_000)
        time.sleep(1)
        assert uploads(server) != before
    until = time.monotonic() + 20
    while uploads(server) != before and time.monotonic() < until:
        time.sleep(0.1)
    assert not uploads(server) - before


def test_looking_at_files_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    entry = '"k%06d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ",".join(entry % (i, 4 * i, 4 * i + 4) for i in range(200_000)).encode()
    path.write_bytes(safetensors(b"{" + header + b"}")[:-8] + b"\0" * 800_000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = json.dumps([str(path)] * 4).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def main() -> tuple[list[dict[str, Any]], float]:
        sent: list[dict[str, Any]] = []
        longest = 0.0

        async def others() -> None:
            nonlocal longest
            while True:
                # Of this process: other programs may take the processor away for longer.
                start = time.process_time()
                await asyncio.sleep(0.01)
                longest = max(longest, time.process_time() - start)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        beat = asyncio.create_task(others())
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": []}
        await UploadGuard(app, tmp_path)(scope, None, send)  # type: ignore[arg-type]
        beat.cancel()
        return sent, longest

    sent, longest = asyncio.run(main())
    assert [message.get("status") for message in sent] == [200, None]
    assert longest < 2


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mole_diffusion.app.web.SPARE_BYTES", 2**62)
    called: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    status, text = ask(UploadGuard(app, tmp_path / "none yet"), path="/gradio_api/upload")
    assert (status, called) == (507, [])
    assert "no room for the upload" in text


def with_settings(path: Path, **changes: Any) -> Path:
    """A PNG with settings, some of them changed to anything."""
    values = {**json.loads(PictureSettings(prompt="p").to_json()), **changes}
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(values))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "1"},
        {"seed": -1},
        {"seed": 10**400},
        {"seed": True},
        {"steps": 1e9},
        {"steps": None},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"guidance": "2"},
        {"width": [128]},
        {"prompt": {"a": 1}},
        {"prompt": "x" * 30_000},
        {"experts": [{"name": 3, "sha256": ""}]},
        {"experts": [{"name": "a", "sha256": "", "strength": "1"}]},
        {"experts": [{"name": "a", "sha256": "", "strength": float("nan")}]},
        {"experts": [{"name": "a", "sha256": "", "active": "yes"}]},
        {"experts": [["a", "b"]]},
        {"experts": "boot"},
        {"experts": {"a": 1}},
        {"experts": [{"name": "a", "sha256": ""}] * 100},
        {"regions": {"boot": 7}},
        {"regions": ["boot"]},
        {"regions": {str(i): "" for i in range(100)}},
        {"regions": {"boot": "x" * (3 * 2**20)}},
        {"format_version": None},
        {"format_version": {}},
    ],
    ids=lambda changes: f"{next(iter(changes))}={str(next(iter(changes.values())))[:16]}",
)
def test_settings_of_wrong_kinds_are_refused_in_own_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"the picture's settings|cannot be read as a picture") as refused:
        read_settings(with_settings(tmp_path / "a.png", **changes))
    assert len(str(refused.value)) < 300


def test_nested_settings_are_refused_in_own_words(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, "[" * 100_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "a.png")


@pytest.mark.parametrize("side", [5_000, 13_000, 20_000])
def test_masks_in_a_picture_are_small(side: int) -> None:
    with pytest.raises(ConfigError, match=f"it has {side} x {side} pixels"):
        mask_from_text(base64.b64encode(bomb(side)).decode())


def test_masks_are_kept_small_and_keep_their_shape() -> None:
    mask = Image.new("L", (3000, 1500))
    mask.paste(255, (0, 0, 1500, 1500))
    kept = mask_from_text(mask_to_text(mask))
    assert kept.size == (1024, 512)
    assert [kept.getpixel((x, 256)) for x in (100, 500, 524, 900)] == [255, 255, 0, 0]


@pytest.mark.parametrize("lossless", [True, False])
def test_sizes_are_read_from_the_first_bytes(tmp_path: Path, lossless: bool) -> None:
    for name, options in (("a.png", {}), ("a.webp", {"lossless": lossless}), ("a.jpg", {})):
        Image.new("RGB", (130, 70), "red").save(tmp_path / name, **options)
        head = (tmp_path / name).read_bytes()[:32]
        assert promised_size(head) == ((0, 0) if name == "a.jpg" else (130, 70))
        assert check_upload(tmp_path / name) == "picture"


def test_the_key_of_a_browser_stays_and_others_are_not_taken(server: Server) -> None:
    cookie = httpx.get(server.url).cookies[COOKIE]
    again = httpx.get(server.url, cookies={COOKIE: cookie})
    assert again.cookies[COOKIE] == cookie
    assert "Max-Age=34560000" in again.headers["set-cookie"]
    for strange in ("../../etc", "short", "x" * 5000):
        assert httpx.get(server.url, cookies={COOKIE: strange}).cookies[COOKIE] != strange

"""The picture of the app in the README; `PYTHONPATH=tests python tests/app/screenshots.py` makes it."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from app_tools import ROOT, Visitor, running
from machine import browser
from PIL import Image

_OUT = ROOT / "docs" / "images" / "app.webp"
_SEED = 2


def write() -> None:
    """Draw with the gates of the starter, NLA beside them on the same seed, as a visitor does."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server, browser() as chromium:
        visitor = Visitor(chromium, server.url, width=1280, height=1000)
        visitor.page.set_default_timeout(600_000)  # a machine that is busy
        page = visitor.page
        page.locator("#beside input").check()
        visitor.unfold("#settings-box")
        visitor.number("#seed", _SEED)
        visitor.unfold("#settings-box")
        page.click("#draw")
        page.locator("#gallery .thumbnail-item").nth(1).wait_for()
        page.locator("#picture img").wait_for()
        page.locator("#nla-picture img").wait_for()
        page.wait_for_timeout(1500)
        page.mouse.move(0, 0)
        page.evaluate("window.scrollTo(0, 0)")
        Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(_OUT, quality=85)
        visitor.close()


if __name__ == "__main__":
    write()

"""A real server in a process of its own, and a real browser: Debian's chromium through Playwright."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole_diffusion.app.jobs import Job

ROOT = Path(__file__).parents[2]
_START_SECONDS = 180
# What Gradio logs when a page goes away while it listens.
_CUT_OFF = ("AbortError", "Connection errored out")


class Server:
    """`python app.py` with options, in a temporary folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ROOT / "app.py"), *options],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(_START_SECONDS)
        found = re.search(r"The app is at (\S+)", self.said)
        assert found, self.said
        self.url = found[1].rstrip("/")

    @property
    def said(self) -> str:
        """Everything on the error stream so far."""
        return "".join(self.lines)

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self._reader.join(60)
        code = self.process.wait(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "The app is at" in line:
                self._ready.set()
        self._ready.set()


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """A server inside the `with` block."""
    server = Server(folder, *options)
    try:
        yield server
    finally:
        server.stop()


def blocked(kind: str = "sleep", **options: Any) -> tuple[Job, threading.Event]:
    """A job that reports once and then waits for the event."""
    go = threading.Event()

    def work(job: Job) -> str:
        job.report(1, 4, "half asleep")
        while not go.wait(0.01):
            job.check()
        return "awake"

    return Job(kind, work, **options), go


class Visitor:
    """A browser profile of its own with the app open; collects what must not happen."""

    def __init__(
        self, browser: Any, url: str, *, width: int = 1440, height: int = 900, dark: bool = False
    ) -> None:
        self.url = url
        self.problems: list[str] = []
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self._context.set_default_timeout(90_000)
        self.page = self._context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.page.goto(url)
        self.page.wait_for_selector("#mix .tile")

    def tab(self, name: str) -> Any:
        """Open a tab, also where it is hidden in the menu of a narrow page."""
        found = self.page.get_by_role("tab", name=name, exact=True)
        if found.count() and found.first.is_visible():
            found.first.click()
        else:
            self.page.locator(".overflow-menu > button").click()
            self.page.locator(".overflow-dropdown button", has_text=name).click()
        self.page.wait_for_timeout(400)
        return self.page

    def reload(self) -> None:
        """Load the page anew; that streams of the old page end is no problem."""
        self.page.reload()
        self.page.wait_for_selector("#mix .tile")
        self.problems = [text for text in self.problems if not any(word in text for word in _CUT_OFF)]

    def number(self, selector: str, value: int) -> None:
        """Write a number into a slider's or number's field."""
        field = self.page.locator(f"{selector} input[type=number]").first
        field.fill(str(value))
        field.blur()

    def unfold(self, selector: str) -> None:
        """Open an accordion."""
        self.page.locator(f"{selector} > button").first.click()
        self.page.wait_for_timeout(300)

    def message(self, text: str) -> None:
        """Wait for a message in the page."""
        self.page.locator(".toast-body", has_text=text).first.wait_for()

    def close(self) -> None:
        """Leave; nothing may have gone wrong."""
        self._context.close()
        assert not self.problems, self.problems

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"went to the network: {request.url}")

"""A server and a browser for the tests of the app."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from app_tools import Server, Visitor, running
from machine import browser

from mole_diffusion.app.studio import Studio


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app with the starter; every test has a browser, and so a session, of its own."""
    with running(tmp_path_factory.mktemp("app")) as started:
        yield started
    assert "Traceback" not in started.said, started.said


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """The models and sessions without a page."""
    made = Studio(tmp_path_factory.mktemp("studio"), device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. Not for the whole run: Playwright allows one at a time, and other tests start theirs."""
    with browser() as running:
        yield running


@pytest.fixture
def visit(chromium: Any, server: Server) -> Iterator[Any]:
    """Opens the app in a browser profile of its own, as often as it is called."""
    visitors: list[Visitor] = []

    def open_app(**options: Any) -> Visitor:
        visitors.append(Visitor(chromium, server.url, **options))
        return visitors[-1]

    yield open_app
    for visitor in visitors:
        visitor.close()

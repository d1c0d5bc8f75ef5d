"""A test that cannot be set up is skipped on somebody's machine and fails in CI."""

import pytest
from machine import browser, lacking


@pytest.mark.parametrize("value", ["true", "1", "woodpecker"])
def test_ci_fails(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.fail.Exception, match="no such library"):
        lacking("no such library")


@pytest.mark.parametrize("value", ["", "0", "false", None])
def test_elsewhere_it_is_skipped(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("CI", raising=False)
    if value is not None:
        monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="no such library"):
        lacking("no such library")


def test_ci_fails_without_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr("machine.CHROMIUM", None)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"), browser():
        pass

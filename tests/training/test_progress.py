"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

import io
import sys

import pytest

from mole_diffusion.training import progress
from mole_diffusion.training.progress import Progress


class Watch:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    found = Watch()
    monkeypatch.setattr(progress.time, "monotonic", found)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr()
    assert not shown.out
    return shown.err.splitlines()


def test_without_a_terminal_it_is_a_line_for_every_tenth(
    watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("gates", 400) as shown:
        for done in range(1, 401):
            watch.now += 0.5
            shown.update(done, "loss 0.1")
    lines = lines_of(capsys)
    assert [line.split(",")[0] for line in lines] == [f"gates {40 * i}/400" for i in range(1, 11)]
    assert lines[0] == "gates 40/400, loss 0.1, 3:00 left"
    assert lines[-1] == "gates 400/400, loss 0.1, took 3:20"


def test_slow_work_says_a_line_every_half_minute(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pictures", 1000, 500) as shown:
        for done in range(501, 511):
            watch.now += 12.0
            shown.update(done)
    lines = lines_of(capsys)
    assert [line.split(",")[0] for line in lines] == [f"pictures {done}/1000" for done in (503, 506, 509)]
    assert lines[0] == "pictures 503/1000, 1:39:24 left"


def test_every_iteration_of_short_work_and_none_twice(
    watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("steps", 3) as shown:
        for done in (1, 1, 2, 3, 3):
            watch.now += 40.0
            shown.update(done)
    assert [line.split(",")[0] for line in lines_of(capsys)] == ["steps 1/3", "steps 2/3", "steps 3/3"]


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("gates", 4) as shown:
        shown.update(3, "loss 0.25")
    found = terminal.getvalue()
    assert "3/4" in found
    assert "loss 0.25" in found
    assert "\x1b[" in found or "\r" in found, "it is animated"


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with Progress("gates", 1) as shown:
        shown.update(1)
    assert terminal.getvalue().startswith("gates 1/1")


def test_silent_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("gates", 2, shown=False) as shown:
        shown.update(2)
    assert lines_of(capsys) == []

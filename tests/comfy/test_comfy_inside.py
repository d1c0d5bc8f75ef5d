"""Runs the tests that need ComfyUI's own modules, in ComfyUI's own environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

FILES = sorted(path.name for path in (Path(__file__).parent / "inside").glob("inside_*.py"))


def test_there_are_files_to_run() -> None:
    assert len(FILES) >= 1


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, run_inside: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """The cases of each chosen file, and what was printed: one process, since importing takes longest."""
    names = [item.callspec.params["name"] for item in request.session.items if "results" in item.fixturenames]
    report = tmp_path_factory.mktemp("inside") / "report.xml"
    printed = run_inside(*names, "--junitxml", str(report), fails=False)
    cases: dict[str, list[ElementTree.Element]] = {name: [] for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        # A file that cannot be imported has no class name.
        module = (case.get("classname") or case.get("name") or "").partition(".")[0]
        cases[f"{module}.py"].append(case)
    return cases, printed


@pytest.mark.parametrize("name", FILES)
def test_inside(name: str, results: tuple[dict[str, list[ElementTree.Element]], str]) -> None:
    cases, printed = results
    assert cases[name], printed[-8000:]
    wrong = [fault for case in cases[name] for kind in ("failure", "error") for fault in case.iter(kind)]
    if wrong:
        pytest.fail(
            "\n".join(fault.text or fault.get("message", "") for fault in wrong)[-8000:], pytrace=False
        )

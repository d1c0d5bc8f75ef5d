"""Names and trigger words come out of strangers' files: in the panels they are text, in a real browser."""

from __future__ import annotations

from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from machine import browser

from mole_diffusion.core.inspection import FileDescription
from webui_extension.heatmap import gate_map, loss_curve, region_map
from webui_extension.training_text import described, training_status
from webui_extension.ui import as_message

HOSTILE = [
    "<img src=x onerror='window.moleCame=1'>",
    "<script>window.moleCame=1</script>",
    "'/><svg onload=window.moleCame=1>",
    "</title></text></svg><img src=x onerror=window.moleCame=1>",
    '" autofocus onfocus="window.moleCame=1',
    "${window.moleCame=1}",
    "\\ &lt;b&gt;",
]
WHOLE = (0.0, 0.0, 1.0, 1.0)


def _panels(text: str) -> dict[str, str]:
    """Everything that the extension makes HTML of, with this text wherever a file or a user may have one."""
    row: dict[str, Any] = {"iteration": 1, "loss": 0.5, "weights": {text: 0.5, "cat": 0.5}}
    job: Any = SimpleNamespace(
        history=lambda: [row], seconds_left=lambda: None, iterations=2, cancelled=False, succeeded=False,
        error=text, target=Path("gates.safetensors"),
    )  # fmt: skip
    file = FileDescription("expert", text, {text: text}, {text: [text]})
    return {
        "message": as_message(text),
        "heat map": gate_map({text: {text: [0.2, 0.8]}}, [text, "cat"]),
        "regions": region_map({text: WHOLE}),
        "file": described(file),
        "running": training_status(job, True),
        "failed": training_status(job, False),
        "loss": loss_curve([0.1, 0.2]),
    }


def test_texts_of_files_and_users_are_text_in_the_panels() -> None:
    with browser() as chromium:
        page = chromium.new_page()
        for text in HOSTILE:
            for name, html in _panels(text).items():
                page.set_content(f"<body>{html}</body>")
                page.wait_for_timeout(20)
                assert page.evaluate("() => window.moleCame") is None, (name, text)
                strange = page.evaluate("() => document.querySelectorAll('img, script, [onload], b').length")
                assert strange == 0, (name, text)
                shown = page.evaluate("() => document.body.textContent")
                # Long names are cut where there is little room.
                assert name == "loss" or text[:12] in shown, (name, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_written_can_be_read_again(text: str) -> None:
    assert text in unescape(as_message(text))

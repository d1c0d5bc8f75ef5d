"""Names, phrases and prompts of strangers are text everywhere in the pages: looked at in a real browser."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from safetensors import safe_open
from safetensors.torch import save_file

import mole_diffusion.app
from mole_diffusion.app import charts, fragments, markup, show
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import ExpertUse, PictureSettings
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.starter.location import starter_experts

HOSTILE = (
    "${alert(document.domain)}",
    "`${alert(1)}`",
    "a C:\\users\\boot\\",
    "<img src=x onerror=alert(1)>",
    "</span><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    "{0} {x} %s {{#each value}}",
    "&lt;b&gt; &amp; $1 $$ \\n \\u003cb\\u003e",
    "javascript:alert(1)",
    "\u202egnol\u202c \u0000 👻",
)
PACKAGE = Path(mole_diffusion.app.__file__).parent


def lora(path: Path, phrase: str) -> Path:
    """A LoRA whose header has this trigger phrase."""
    with safe_open(starter_experts()["boot"].path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = {key: value for key, value in file.metadata().items() if key != "mole.trigger"}
    save_file(tensors, path, metadata={**metadata, "modelspec.trigger_phrase": phrase})
    return path


def test_phrases_and_prompts_run_nowhere_and_are_seen_as_they_are(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.page
    said: list[str] = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    visitor.tab("Models")
    files = [lora(tmp_path / f"hostile {i}.safetensors", phrase) for i, phrase in enumerate(HOSTILE)]
    page.locator("#lora-upload input[type=file]").set_input_files(files)
    page.locator("#library-said", has_text="Added").wait_for()
    visitor.tab("Compose")
    visitor.unfold("#library-box")
    for i, phrase in enumerate(HOSTILE):
        tile = page.locator("#library .tile", has=page.locator(f"[data-tile='hostile {i}']"))
        shown = tile.locator(".tile-text").evaluate("(node) => node.textContent")
        # Articles are added to phrases that have none.
        assert shown.removeprefix("a ") == " ".join(phrase.split()).removeprefix("a ") or phrase in shown
    page.locator("#mix [data-tile='hostile 0']").wait_for(state="attached")
    prompt = "\n".join(HOSTILE).replace("\0", "")
    page.locator("#prompt textarea").fill(prompt)
    visitor.unfold("#settings-box")
    visitor.number("#steps", 1)
    page.click("#draw")
    page.locator("#gallery .thumbnail-item").first.wait_for()
    page.locator("#gallery .thumbnail-item").first.click()
    page.locator("#details dt", has_text="Prompt").wait_for()
    assert page.locator("#details dd").first.evaluate("(node) => node.textContent") == prompt
    for tab in ("Train", "Inspect", "Compare", "Export", "Models"):
        visitor.tab(tab)
        page.wait_for_timeout(500)
    assert said == []
    assert (
        page.evaluate("() => document.querySelectorAll('img[src=x], svg[onload], #mix script').length") == 0
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_pieces_of_pages_are_markup_with_the_text_inside(text: str) -> None:
    def fail(job: Job) -> None:
        raise ConfigError(text)

    failed = Job("fail", fail)
    failed.run()
    use = ExpertUse(name=text, sha256="")
    settings = PictureSettings(prompt=text, negative=text, model=text, experts=(use,), regions={text: ""})
    pieces = [
        fragments.facts(settings),
        charts.curves(text, {text: ("#123456", [1.0, 2.0])}, 2, level=(text, 1.5)),
        show.progress_bar(failed),
        show.plain(ConfigError(text)),
        markup.dot(text, text),
        markup.notice(text),
        markup.facts({text: text}),
    ]
    for piece in pieces:
        assert isinstance(piece, Markup)
        assert markup.html("{}", text) in piece
        for dangerous in ("<img", "<svg onload", "<script", "onmouseover='"):
            assert dangerous not in piece


def test_html_is_made_in_one_place() -> None:
    """No other module escapes, or builds HTML out of an f-string."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and path.name != "markup.py":
                assert "html" not in [alias.name for alias in node.names], path.name
            if isinstance(node, ast.JoinedStr):
                constants = [part.value for part in node.values if isinstance(part, ast.Constant)]
                assert not any("</" in part or ("<" in part and ">" in part) for part in constants), (
                    f"{path.name}:{node.lineno} writes HTML by hand"
                )

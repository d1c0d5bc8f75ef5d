"""The real front end in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_browser import (
    alerts,
    api_prompt,
    front_end,
    load_workflow,
    missing_nodes,
    queue_and_wait,
    show_whole_graph,
    workflow_of,
)
from comfy_server import ROOT, ComfyServer, Prompt
from playwright.sync_api import Page
from prompts import node, sampling
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from workflows import EXAMPLES, WORKFLOWS


def test_example_workflows_open_without_complaint_and_are_the_tested_prompts(server: ComfyServer) -> None:
    with front_end(server.url) as page:
        for name, make in WORKFLOWS.items():
            load_workflow(page, EXAMPLES / f"{name}.json")
            assert missing_nodes(page) == []
            assert alerts(page) == []
            found, expected = api_prompt(page), make()
            assert sorted(found) == sorted(expected)
            for number, entry in expected.items():
                assert found[number]["class_type"] == entry["class_type"]
                inputs = found[number]["inputs"]
                assert {key: inputs.get(key) for key in entry["inputs"]} == entry["inputs"]


def test_workflow_is_queued_and_its_picture_is_seen(server: ComfyServer, tmp_path: Path) -> None:
    with front_end(server.url) as page:
        load_workflow(page, EXAMPLES / "3_region_masks.json")
        page.evaluate(
            "() => { for (const node of window.app.graph.nodes) for (const widget of node.widgets ?? [])"
            " if (widget.name === 'steps') widget.value = 2; }"
        )
        queue_and_wait(page)
        shown = page.evaluate(
            "() => window.app.graph.nodes.filter(n => n.type === 'SaveImage')"
            ".flatMap(n => (n.imgs ?? []).map(i => [i.naturalWidth, i.naturalHeight]))"
        )
        assert shown == [[128, 128]]
        assert alerts(page) == []
        page.screenshot(path=tmp_path / "page.png")


#: What a stranger's file may say of its trigger words.
HOSTILE = [
    "<img src=x onerror='window.moleCame=1'>",
    "<script>window.moleCame=1</script>",
    "</span><svg onload=window.moleCame=1>",
    "${window.moleCame=1}",
    "[[here]] javascript:window.moleCame=1",
    "\\\\ \" ' ` &lt;",
]


def test_texts_of_files_are_text_on_the_nodes(server: ComfyServer) -> None:
    """The front end takes what a node says for HTML."""
    loras = server.base / "models" / "loras"
    content = load_file(ROOT / "assets" / "starter" / "experts" / "boot.safetensors")
    for number, text in enumerate(HOSTILE):
        save_file(content, loras / f"hostile{number}.safetensors", {"mole.trigger": text})
    with front_end(server.url) as page:
        prompt: Prompt = {"1": node("MoLEStarterLoader")}
        before: dict[str, Any] = {}
        for number in range(len(HOSTILE)):
            name = f"hostile{number}.safetensors"
            prompt[str(number + 2)] = node("MoLELoadExpert", lora=name, strength=1.0, name="", **before)
            before = {"experts": [str(number + 2), 0]}
        prompt["20"] = node("MoLEApply", model=["1", 0], clip=["1", 1], **before)
        prompt = sampling(prompt, ["20", 0], ["20", 1], steps=1, at=30)
        workflow_of(page, prompt, "hostile")
        queue_and_wait(page)
        show_whole_graph(page)  # what is out of sight is not in the page
        # As a report of the file, under the node ...
        shown = page.evaluate("() => document.body.innerText")
        for text in HOSTILE:
            assert f"triggers: {text}" in shown, text
        # ... and as a note on Apply, before it runs: no prompt has these words.
        page.wait_for_function("() => document.querySelector('.mole-note')?.textContent.includes('hostile0')")
        noted = page.evaluate("() => document.querySelector('.mole-note').textContent")
        for number, text in enumerate(HOSTILE):
            assert f"No prompt names hostile{number}: write '{text}'." in noted
        assert page.evaluate("() => window.moleCame") is None
        assert page.evaluate("() => document.querySelectorAll('img[src=x]').length") == 0


def _widgets(page: Page, kind: str) -> dict[str, Any]:
    """Values of the widgets that are seen on the node of a kind, by name."""
    found: dict[str, Any] = page.evaluate(
        "kind => Object.fromEntries(window.app.graph.nodes.find(n => n.type === kind).widgets"
        ".filter(w => !w.hidden && w.name !== 'mole_note').map(w => [w.name, w.value]))",
        kind,
    )
    return found


def _set(page: Page, kind: str, name: str, value: Any) -> None:
    """Set a widget as a click does."""
    page.evaluate(
        "([kind, name, value]) => { const w = window.app.graph.nodes.find(n => n.type === kind)"
        ".widgets.find(w => w.name === name); w.value = value; w.callback?.(value); }",
        [kind, name, value],
    )


def _note(page: Page, kind: str, text: str) -> None:
    """Wait until a node says something."""
    page.wait_for_function(
        "([kind, text]) => (window.app.graph.nodes.find(n => n.type === kind)?.moleNote?.element.textContent"
        " ?? '').includes(text)",
        arg=[kind, text],
    )


def test_experts_are_chosen_and_not_typed(server: ComfyServer) -> None:
    with front_end(server.url) as page:
        load_workflow(page, EXAMPLES / "1_masked_inference.json")
        page.wait_for_function(
            "() => window.app.graph.nodes.find(n => n.type === 'MoLEMaskExperts').widgets"
            ".some(w => w.name === 'monster')"
        )
        assert _widgets(page, "MoLEMaskExperts") == {
            "boot": True, "boot: strength": 1, "monster": False, "monster: strength": 1, "clock": True,
            "clock: strength": 1,
        }  # fmt: skip
        _set(page, "MoLEMaskExperts", "monster", True)
        _set(page, "MoLEMaskExperts", "boot", False)
        _set(page, "MoLEMaskExperts", "clock: strength", 0.8)
        inputs = next(
            entry["inputs"] for entry in api_prompt(page).values() if entry["class_type"] == "MoLEMaskExperts"
        )
        assert {key: inputs[key] for key in ("active", "strengths")} == {
            "active": "monster, clock", "strengths": "clock = 0.8"
        }  # fmt: skip
        # What Python reads, and nothing of what is shown for choosing.
        assert sorted(inputs) == ["active", "experts", "strengths"]
        # An expert that gets another name is known by it at once.
        page.evaluate(
            "() => { window.app.graph.nodes.find(n => n.type === 'MoLELoadExpert'"
            " && n.widgets[0].value.endsWith('boot')).widgets.find(w => w.name === 'name').value = 'shoe'; }"
        )
        page.wait_for_function(
            "() => window.app.graph.nodes.find(n => n.type === 'MoLEMaskExperts').widgets"
            ".some(w => w.name === 'shoe')"
        )


def test_sockets_grow_as_they_are_used_and_masks_have_owners(server: ComfyServer) -> None:
    sockets = (
        "kind => window.app.graph.nodes.find(n => n.type === kind).inputs.map(i => i.name)"
        ".filter(n => /^(mask|reference)_/.test(n))"
    )
    with front_end(server.url) as page:
        load_workflow(page, EXAMPLES / "3_region_masks.json")
        page.wait_for_function(f"() => ({sockets})('MoLERegionMasks').length === 3")
        assert page.evaluate(sockets, "MoLERegionMasks") == ["mask_1", "mask_2", "mask_3"]
        page.wait_for_function(
            "() => window.app.graph.nodes.find(n => n.type === 'MoLERegionMasks').widgets"
            ".some(w => w.name === 'mask_2 is for')"
        )
        assert _widgets(page, "MoLERegionMasks") == {"mask_1 is for": "boot", "mask_2 is for": "clock"}
        _set(page, "MoLERegionMasks", "mask_1 is for", "clock")
        _set(page, "MoLERegionMasks", "mask_2 is for", "boot")
        prompt = api_prompt(page)
        (regions,) = [e["inputs"] for e in prompt.values() if e["class_type"] == "MoLERegionMasks"]
        assert regions["names"] == "clock, boot"
        assert sorted(regions) == ["experts", "mask_1", "mask_2", "names"]
        # One mask less: one socket less.
        page.evaluate(
            "() => { const n = window.app.graph.nodes.find(n => n.type === 'MoLERegionMasks');"
            " n.disconnectInput(n.inputs.findIndex(i => i.name === 'mask_2')); }"
        )
        page.wait_for_function(f"() => ({sockets})('MoLERegionMasks').length === 2")


def test_nodes_say_before_they_run_what_they_will_do(server: ComfyServer) -> None:
    folder = server.base / "models" / "mole_gates"
    folder.mkdir(exist_ok=True)
    source = ROOT / "assets" / "starter" / "experts" / "gates.safetensors"
    with safe_open(source, "pt") as file:
        header = file.metadata()
    halves = {**header, "iterations": "20", "training": json.dumps({"iterations": 400})}
    save_file(load_file(source), folder / "halves.safetensors", halves)
    with front_end(server.url) as page:
        load_workflow(page, EXAMPLES / "1_masked_inference.json")
        titles = page.evaluate(
            "() => window.app.graph.nodes.filter(n => n.type.startsWith('MoLE')).map(n => n.size[0])"
        )
        assert min(titles) >= 250
        _set(page, "MoLELoadGates", "gates", "halves.safetensors")
        _note(page, "MoLELoadGates", "half trained: 20 of 400 iterations")
        _set(page, "MoLEMaskExperts", "active", "boots")
        _note(page, "MoLEMaskExperts", "'boots' names no expert here (boot, monster, clock): Run will stop.")
        _set(page, "PrimitiveStringMultiline", "value", "a castle")
        _note(page, "MoLEApply", "No prompt names boot: write 'zorin boot'.")
        _set(page, "MoLEApply", "insert what is missing", None)
        texts = [e["inputs"].get("value") for e in api_prompt(page).values()]
        assert "a castle, zorin boot, vekka monster, kipra clock" in texts
        page.evaluate(
            "() => { const n = window.app.graph.nodes.find(n => n.type === 'MoLEApply');"
            " n.disconnectInput(n.inputs.findIndex(i => i.name === 'gates')); }"
        )
        _note(page, "MoLEApply", "No gates: words and places find their experts by the prompt.")
        _set(page, "MoLEApply", "without_gates", "equal shares")
        _note(page, "MoLEApply", "No gates: every expert counts 1/N everywhere.")
        page.evaluate(
            "() => { const [a, b] = window.app.graph.nodes.filter(n => n.type === 'MoLEApply');"
            " b.connect(0, a, 0); }"
        )
        _note(page, "MoLEApply", "This MODEL has experts already")

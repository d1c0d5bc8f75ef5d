"""The real front end in a real browser."""

from __future__ import annotations

from pathlib import Path

from comfy_browser import (
    alerts,
    api_prompt,
    front_end,
    load_workflow,
    missing_nodes,
    queue_and_wait,
)
from comfy_server import ComfyServer
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

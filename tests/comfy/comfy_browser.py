"""ComfyUI's front end in Debian's Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import browser
from playwright.sync_api import Page

_READY = "() => window.app && window.app.graph && window.app.extensionManager && window.LiteGraph"
_MILLISECONDS = 120_000
_IDLE = """async () => {
  const queue = await (await fetch("/api/queue")).json();
  const history = await (await fetch("/api/history")).json();
  return !queue.queue_running.length && !queue.queue_pending.length && Object.keys(history).length > 0;
}"""
#: The newest front ends advertise; the last button of the smallest box around the text closes that.
_CLOSE_BANNER = """() => {
  const all = [...document.querySelectorAll("*")];
  const texts = all.filter(e => e.textContent.includes("Introducing Nodes 2.0"));
  const boxes = texts.filter(e => e.querySelectorAll("button").length >= 2);
  const buttons = boxes.length ? boxes.at(-1).querySelectorAll("button") : [];
  if (buttons.length) buttons[buttons.length - 1].click();
}"""
#: Lay the nodes out, and let seeds stay as they are from run to run.
_TIDY = """() => {
  const graph = window.app.graph;
  for (const node of graph.nodes) {  // room for what they show when they have run
    if (["SaveImage", "PreviewImage", "LossGraphNode"].includes(node.type)) node.setSize([240, 300]);
    if (node.type === "MoLELoadExpert") node.setSize([270, 200]);
  }
  graph.arrange(70);
  for (const node of graph.nodes)
    for (const widget of node.widgets ?? [])
      if (widget.name === "control_after_generate") widget.value = "fixed";
}"""


@contextmanager
def front_end(url: str, *, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """A page with the front end, ready for use."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(_MILLISECONDS)
        page.goto(url)
        page.wait_for_function(_READY)
        page.wait_for_selector("canvas#graph-canvas")
        # Node definitions arrive after the canvas.
        page.wait_for_function("() => Object.keys(LiteGraph.registered_node_types).includes('MoLEApply')")
        yield page


def load_workflow(page: Page, path: Path) -> None:
    """Open a workflow file as a user does by dropping it."""
    page.evaluate("workflow => window.app.loadGraphData(workflow)", json.loads(path.read_text()))
    page.wait_for_function("() => window.app.graph.nodes.length > 0")


def missing_nodes(page: Page) -> list[str]:
    """Kinds of nodes in the workflow that this ComfyUI does not have."""
    found: list[str] = page.evaluate(
        "() => window.app.graph.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))"
    )
    return found


def api_prompt(page: Page) -> dict[str, Any]:
    """What the front end would queue."""
    prompt: dict[str, Any] = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    return prompt


def workflow_of(page: Page, prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """An API prompt as a workflow with the front end's layout."""
    page.evaluate("([prompt, name]) => window.app.loadApiJson(prompt, name)", [prompt, name])
    page.wait_for_function(f"() => window.app.graph.nodes.length === {len(prompt)}")
    page.evaluate(_TIDY)
    # As text: the driver would turn what is undefined into null.
    workflow: dict[str, Any] = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    return workflow


def queue_and_wait(page: Page, seconds: float = 400) -> None:
    """Press Run and wait until nothing is running or waiting any more.

    Raises:
        TimeoutError: it takes longer.
    """
    page.get_by_role("button", name="Run", exact=True).click()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        page.wait_for_timeout(500)
        if page.evaluate(_IDLE):
            page.wait_for_timeout(1500)  # the picture arrives
            return
    raise TimeoutError(f"the queue is not done after {seconds} s")


def alerts(page: Page) -> list[str]:
    """What the front end complains of."""
    return [
        text.strip() for text in page.locator(".p-toast-message, .p-dialog").all_inner_texts() if text.strip()
    ]


def show_whole_graph(page: Page) -> None:
    """Zoom so that the whole workflow is seen, and nothing lies over it."""
    banner = page.get_by_text("Introducing Nodes 2.0")
    if banner.count():
        page.evaluate(_CLOSE_BANNER)
    page.evaluate(
        "() => { window.app.canvas.selectItems(); window.app.canvas.fitViewToSelectionAnimated(); }"
    )
    page.wait_for_timeout(1500)
    page.evaluate("() => window.app.canvas.deselectAll()")
    page.wait_for_timeout(500)

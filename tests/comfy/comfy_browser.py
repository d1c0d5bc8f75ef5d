"""ComfyUI's front end in Debian's Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import browser
from playwright.sync_api import Page, ViewportSize

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
#: Lay the nodes out: a note, a row of groups with what there is to change, and below the rest in columns, in
#: the order in which it runs. Seeds stay as they are from run to run.
_TIDY = """([groups, note, rest]) => {
  const graph = window.app.graph, gap = 30, title = 34;
  const node = id => graph.getNodeById(Number(id));
  const wide = {SaveImage: [240, 300], PreviewImage: [240, 300], LossGraphNode: [240, 300]};
  const texts = {MoLELoadGates: 75, MoLESaveGates: 75, MoLEExportLoRA: 75, MoLETrainGates: 260};
  texts.MoLEMaskExperts = 40;
  for (const one of graph.nodes) {  // room for what they show when they have run
    const [width, height] = one.computeSize();
    const [w, h] = wide[one.type] ?? [one.type.startsWith("MoLE") ? 270 : 210, 0];
    one.setSize([Math.max(width, w), Math.max(height + (texts[one.type] ?? 0), h)]);
    if (one.type === "MoLELoadExpert") one.setSize([one.size[0], 205]);
    if (one.type === "CLIPTextEncode") one.setSize([240, 90]);
    if (one.type === "PrimitiveStringMultiline") one.setSize([300, 130]);
    for (const widget of one.widgets ?? [])
      if (widget.name === "control_after_generate") widget.value = "fixed";
  }
  const box = (name, nodes, colour) => {
    const group = new LiteGraph.LGraphGroup(name);
    const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
    const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
    group.pos = [left - 15, top - title - 45];
    group.size = [right - left + 30, bottom - top + title + 60];
    group.color = colour;
    graph.add(group);
    return group;
  };
  let right = 0, low = 0;
  const chosen = new Set(Object.values(groups).flat());
  for (const [name, ids] of Object.entries(groups)) {
    let y = 0, end = 0;
    for (let first = 0; first < ids.length; first += 3) {
      let x = right, down = 0;
      for (const one of ids.slice(first, first + 3).map(node)) {
        one.pos = [x, y];
        x += one.size[0] + gap;
        down = Math.max(down, one.size[1]);
      }
      end = Math.max(end, x);
      y += down + title + gap;
    }
    right = end + 40;
    low = Math.max(low, y);
    box(name, ids.map(node), "#3f789e");
  }
  const others = graph.nodes.filter(n => !chosen.has(String(n.id)));
  const level = new Map(), deep = one => {
    if (!others.includes(one)) return -1;
    if (!level.has(one)) {
      level.set(one, 0);
      const before = one.inputs.map((_, i) => one.getInputNode(i)).filter(Boolean);
      level.set(one, 1 + Math.max(-1, ...before.map(deep)));
    }
    return level.get(one);
  };
  others.forEach(deep);
  let x = 0;
  for (let column = 0; column <= Math.max(...level.values()); column++) {
    let top = low + 90, broad = 0;
    for (const one of others.filter(n => level.get(n) === column)) {
      one.pos = [x, top];
      top += one.size[1] + title + gap;
      broad = Math.max(broad, one.size[0]);
    }
    x += broad + 50;
  }
  box(rest, others, "#444444");
  const words = LiteGraph.createNode("MarkdownNote");
  words.size = [900, 130];
  words.pos = [0, -270];
  graph.add(words);
  words.widgets[0].value = note;
}"""
#: Title of the group that nobody needs to touch.
_REST = "Works as it is"


@dataclass(frozen=True)
class Layout:
    """How a workflow is shown.

    Attributes:
        groups: what there is to change: title -> ids of nodes.
        note: what the workflow does, in Markdown.
    """

    groups: dict[str, list[str]]
    note: str


@contextmanager
def front_end(
    url: str, *, width: int = 1600, height: int = 900, pixels_per_point: float = 1
) -> Iterator[Page]:
    """A page with the front end, ready for use."""
    with browser() as chromium:
        viewport = ViewportSize(width=width, height=height)
        page = chromium.new_page(viewport=viewport, device_scale_factor=pixels_per_point)
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


def workflow_of(
    page: Page, prompt: dict[str, Any], name: str, layout: Layout | None = None
) -> dict[str, Any]:
    """An API prompt as a workflow."""
    page.evaluate("([prompt, name]) => window.app.loadApiJson(prompt, name)", [prompt, name])
    page.wait_for_function(f"() => window.app.graph.nodes.length === {len(prompt)}")
    page.wait_for_timeout(1000)  # the nodes have their sockets and lists
    if layout is not None:
        page.evaluate(_TIDY, [layout.groups, layout.note, _REST])
    # As text: the driver would turn what is undefined into null.
    workflow: dict[str, Any] = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    return workflow


def queue_and_wait(page: Page, seconds: float = 400) -> None:
    """Press Run and wait until nothing is running or waiting any more.

    Raises:
        TimeoutError: it takes longer.
    """
    # Newer front ends call the menu beside the button so too.
    page.get_by_role("button", name="Run", exact=True).first.click()
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


#: Left, top, width and height in pixels of the page of all nodes and groups, and a margin around them.
_GRAPH = """(margin) => {
  const { graph, ds, canvas } = window.app.canvas, page = canvas.getBoundingClientRect();
  const boxes = [...graph.nodes.map((node) => node.boundingRect ?? [...node.pos, ...node.size]),
    ...graph.groups.map((group) => [...group.pos, ...group.size])];
  const least = (axis) => Math.min(...boxes.map((box) => box[axis]));
  const most = (axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2]));
  const seen = (value, axis) => (value + ds.offset[axis]) * ds.scale;
  const x = page.left + seen(least(0), 0) - margin, y = page.top + seen(least(1), 1) - margin;
  return { x, y, width: (most(0) - least(0)) * ds.scale + 2 * margin,
    height: (most(1) - least(1)) * ds.scale + 2 * margin };
}"""


#: Menus, panels, what says how many jobs are done, and messages lie over the canvas.
_ALONE = """.comfyui-body > :not(#graph-canvas-container), body > :not(#vue-app) { visibility: hidden; }"""


def graph_picture(page: Page, margin: int = 12) -> bytes:
    """The whole workflow as a PNG, and nothing around it."""
    show_whole_graph(page)
    page.add_style_tag(content=_ALONE)
    shot: bytes = page.screenshot(clip=page.evaluate(_GRAPH, margin))
    return shot


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

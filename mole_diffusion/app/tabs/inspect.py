"""The Inspect tab: what the gates did in the last picture, and what a file contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from mole_diffusion.app import charts, markup, show
from mole_diffusion.app.maps import maps_html
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import COLOURS
from mole_diffusion.app.studio import Studio
from mole_diffusion.core.inspection import FileDescription, describe_file
from mole_diffusion.core.records import GateWeights, in_order
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.training.heat_map import gate_heat_map

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_NETWORKS = {
    "UNet": "unet",
    "Text encoder": "text_encoder",
    "Second text encoder": "text_encoder_2",
    "Transformer": "transformer",
}
#: Readable on light and on dark ground.
_INK, _GREY = "#8a8379", (138, 131, 121)
_EMPTY = markup.html(
    '<div class="empty-view"><p><b>What did the gates do?</b></p><p>Draw a picture with gates in Compose: its'
    " weights appear here, expert by expert and gate by gate.</p></div>"
)


@dataclass
class InspectTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=7, min_width=320):
                with gr.Row(equal_height=True):
                    self.network = gr.Radio(
                        list(_NETWORKS)[:2], value="UNet", label="Network", elem_id="network"
                    )
                    self.step = gr.Slider(
                        0, 1, 0, step=1, label="Step", info="0: the mean of all steps", elem_id="gate-step"
                    )
                self.empty = gr.HTML(_EMPTY)
                self.maps = gr.HTML(elem_id="expert-maps")
                self.heat = gr.Image(
                    label="Gate weights: experts × gates",
                    elem_id="heat",
                    visible=False,
                    format="png",
                    type="pil",
                    interactive=False,
                )
                self.steps = gr.HTML(elem_id="over-steps")
            with gr.Column(scale=5, min_width=320):
                self.known = gr.Dropdown([], label="An expert of your library", elem_id="known-file")
                self.upload = gr.File(
                    label="Or a LoRA or gates file (safetensors)",
                    file_types=[".safetensors"],
                    height=140,
                    elem_id="inspect-upload",
                )
                self.contents = gr.HTML(elem_id="contents")
        self._connect(demo)

    def _connect(self, demo: gr.Blocks) -> None:
        quick: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
        view = [self.empty, self.maps, self.heat, self.steps, self.step, self.network]
        for changed in (self.network.input, self.step.release):
            changed(self.show_weights, [self.network, self.step], view, **quick)
        self.known.input(self.describe_known, self.known, self.contents, **quick)
        self.upload.upload(self.describe_upload, self.upload, self.contents, **quick)
        self.refreshed = (self.refresh, [self.network, self.step], [*view, self.known])
        demo.load(self.refresh, [self.network, self.step], [*view, self.known], **quick)

    @show.friendly
    def refresh(self, network: str, step: Any, request: gr.Request) -> list[Any]:
        """The last picture's weights, and the files that are known."""
        session = show.session_of(self.studio, request)
        return [*_weights(session, network, step), gr.update(choices=list(session.library))]

    @show.friendly
    def show_weights(self, network: str, step: Any, request: gr.Request) -> list[Any]:
        """The heat map of one network, at one step or over all."""
        return _weights(show.session_of(self.studio, request), network, step)

    @show.friendly
    def describe_known(self, name: str | None, request: gr.Request) -> Markup:
        """An expert's file."""
        session = show.session_of(self.studio, request)
        card = session.library.get(name or "")
        return markup.NOTHING if card is None else description_html(describe_file(card.path))

    @show.friendly
    def describe_upload(self, path: str | None) -> Markup:
        """An uploaded file."""
        return markup.NOTHING if path is None else description_html(describe_file(Path(path)))


def _weights(session: Session, network: str, step: Any) -> list[Any]:
    rows = session.weights
    part = _NETWORKS.get(network, "unet")
    found = GateWeights() if rows is None else rows.where(network=part, branch="prompt")
    choices = [label for label, name in _NETWORKS.items() if rows is not None and rows.where(network=name)]
    if not found:
        update = gr.update(choices=choices or list(_NETWORKS)[:2])
        return [gr.update(visible=True), _maps(session), gr.update(visible=False), "", gr.skip(), update]
    names = list(session.weights_of)
    n_steps = max((row.step for row in found if row.step is not None), default=-1) + 1
    at = min(int(step or 0), n_steps)
    shown = found if at == 0 else found.where(step=at - 1)
    # Without a ground of its own, in a grey that can be read on light and on dark.
    heat = gate_heat_map(in_order(shown.means(), names), names, ink=_GREY, paper=(*_GREY, 0))
    return [
        gr.update(visible=False),
        _maps(session),
        gr.update(value=heat, visible=True),
        _over_steps(session, found, names, n_steps),
        gr.update(maximum=max(n_steps, 1), value=at, interactive=n_steps > 0),
        gr.update(choices=choices, value=network if network in choices else choices[0]),
    ]


def _maps(session: Session) -> Markup:
    """Where in the last picture each expert acted."""
    with session.lock:
        maps, picture, names = session.maps, session.maps_of, session.weights_of
    if not maps or picture is None or not picture.path.is_file():
        return markup.NOTHING
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    return maps_html(open_picture(picture.path), maps, colours)


def _over_steps(session: Session, rows: GateWeights, names: Sequence[str], n_steps: int) -> Markup:
    """Mean weight of each expert at every step."""
    if n_steps < 2:
        return markup.NOTHING
    means = rows.mean("step", "expert")
    series = {
        name: (
            session.colour(name) if name in session.chosen else _INK,
            [means.get((step, name), 0.0) for step in range(n_steps)],
        )
        for name in names
    }
    drawn = charts.curves("Mean weight at each step", series, n_steps, bottom=0.0)
    return markup.html('<div class="charts">{}</div>', drawn)


def description_html(description: FileDescription) -> Markup:
    """A file's description as a page fragment; ignored keys stand out."""
    return markup.html(
        '<div class="report"><div class="section-title">{}</div>{}{}</div>',
        description.title,
        markup.facts(description.facts),
        markup.join(_section(name, lines) for name, lines in description.sections.items()),
    )


def _section(name: str, lines: Sequence[str]) -> Markup:
    opened = Markup("open") if name in ("networks", "ignored keys", "missing") else ""
    alarm = Markup(' class="alarm"') if name in ("ignored keys", "missing") else ""
    items = markup.join(markup.html("<li>{}</li>", line) for line in lines)
    head = markup.html("<summary>{} ({})</summary>", name, len(lines))
    return markup.html("<details {}{}>{}<ul>{}</ul></details>", opened, alarm, head, items)

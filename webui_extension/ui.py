"""The panel in txt2img and img2img. Only what gradio 3.41 and 4.40 have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .heatmap import gate_map, region_map
from .library import Library
from .settings import AUTO, EVERYWHERE, NAMED_REGIONS, Settings, SettingsError, parse_region

REFRESH, FILL, INSERT = "\U0001f504", "\U00002935\ufe0f", "\U0001f4dd"


class Panel:
    """The accordion's components.

    Args:
        library: files to choose from.
        last_run: gate weights of the last generation, or None.
        rows: how many experts can be chosen.
        elem_id: makes an id unique within the page.
        widgets: the host's `InputAccordion` and `ToolButton`.
        prompt: the tab's prompt, where the host showed it before the panel.

    Attributes:
        controls: components in the order of `Settings.from_args`.
        infotext_fields: (component, function of the PNG info) pairs.
    """

    def __init__(
        self,
        library: Library,
        last_run: Callable[[], Any],
        rows: int,
        elem_id: Callable[[str], str],
        widgets: Any,
        prompt: Any = None,
    ) -> None:
        self._prompt = prompt
        self._library = library
        self._last_run = last_run
        self._rows = rows
        self._id = elem_id
        self._widgets = widgets
        self._row_groups: list[Any] = []
        with widgets.InputAccordion(
            False, label="MoLE: several LoRAs in one picture", elem_id=elem_id("mole")
        ) as on:
            gates, record = self._gates_row()
            self._message = gr.HTML("", elem_id=elem_id("mole_message"))
            with gr.Column(elem_classes=["mole-rows"]):
                cells = [self._expert_row(index) for index in range(rows)]
            self._sketch = gr.HTML("", elem_id=elem_id("mole_sketch"))
            self._heat_map_row()
        self.controls = [on, gates, record, *(cell for row in cells for cell in row)]
        self._experts = [row[1] for row in cells]
        self._regions = [row[3] for row in cells]
        self._connect(gates)
        self.infotext_fields = [(c, _pasted(i, rows)) for i, c in enumerate(self.controls) if c is not record]

    def _gates_row(self) -> tuple[Any, Any]:
        with gr.Row(elem_classes=["mole-head"]):
            gates = gr.Dropdown(
                label="Gates",
                choices=self._library.gates(),
                value=AUTO,
                allow_custom_value=True,
                elem_id=self._id("mole_gates"),
            )
            self._fill = self._widgets.ToolButton(
                FILL,
                elem_id=self._id("mole_fill"),
                tooltip="Choose the experts that these gates were trained for",
            )
            self._refresh = self._widgets.ToolButton(
                REFRESH, elem_id=self._id("mole_refresh"), tooltip="Look for new LoRAs and gates"
            )
            if self._prompt is not None:
                self._insert = self._widgets.ToolButton(
                    INSERT,
                    elem_id=self._id("mole_insert"),
                    tooltip="Write the phrases of experts that the prompt does not name into it",
                )
            record = gr.Checkbox(label="Record gate weights", value=True, elem_id=self._id("mole_record"))
        return gates, record

    def _expert_row(self, index: int) -> tuple[Any, Any, Any, Any]:
        # Rows appear as they are needed; the first two always.
        with gr.Row(visible=index < 2, elem_classes=["mole-row"]) as group:
            active = gr.Checkbox(
                label="On", value=True, scale=1, min_width=60, elem_id=self._id(f"mole_on_{index}")
            )
            expert = gr.Dropdown(
                label=f"Expert {index + 1}",
                choices=["", *self._library.experts()],
                value="",
                allow_custom_value=True,
                scale=4,
                elem_id=self._id(f"mole_expert_{index}"),
            )
            # Floats: pasting PNG info casts to the type of the default, and turns 0.5 into 500 for an int.
            scale = gr.Slider(
                label="Strength",
                minimum=-1.0,
                maximum=2.0,
                step=0.05,
                value=1.0,
                scale=3,
                elem_id=self._id(f"mole_scale_{index}"),
            )
            region = gr.Dropdown(
                label="Region",
                choices=list(NAMED_REGIONS),
                value=EVERYWHERE,
                allow_custom_value=True,
                scale=3,
                elem_id=self._id(f"mole_region_{index}"),
            )
        self._row_groups.append(group)
        return active, expert, scale, region

    def _heat_map_row(self) -> None:
        with gr.Row():
            self._show = gr.Button("Show gate weights of the last picture", elem_id=self._id("mole_show"))
        self._heat_map = gr.HTML("", elem_id=self._id("mole_heat_map"))

    def _connect(self, gates: Any) -> None:
        pickers = [*self._experts, *self._regions]
        for picker in pickers:
            picker.change(self.update_rows, pickers, [*self._row_groups, self._sketch], show_progress=False)
        # Read when it is opened, so that a training's result is there at once.
        gates.focus(lambda: gr.update(choices=self._library.gates()), [], [gates], show_progress=False)
        self._refresh.click(self.refresh, [], [gates, *self._experts], show_progress=False)
        self._fill.click(self.fill, [gates], [*self._experts, self._message], show_progress=False)
        if self._prompt is not None:
            inserted = [self._prompt, self._message]
            self._insert.click(self.insert, [self._prompt, *self._experts], inserted, show_progress=False)
        self._show.click(self.heat_map, [], [self._heat_map], show_progress=False)

    def update_rows(self, *values: str) -> list[Any]:
        """Show one free row after the last chosen expert, and a sketch of the regions."""
        experts, regions = values[: self._rows], values[self._rows :]
        used = max((i for i, name in enumerate(experts) if name), default=0)
        return [
            *(gr.update(visible=i <= max(used + 1, 1)) for i in range(self._rows)),
            _sketch(experts, regions),
        ]

    def refresh(self) -> list[Any]:
        """Read the folders anew."""
        experts = ["", *self._library.experts()]
        return [
            gr.update(choices=self._library.gates()),
            *(gr.update(choices=experts) for _ in self._experts),
        ]

    def fill(self, gates: str) -> list[Any]:
        """Choose the experts of a gates file."""
        from mole_diffusion import MoLEError

        try:
            names = self._library.experts_of(gates or AUTO)
            if len(names) > self._rows:
                raise SettingsError(
                    f"these gates have {len(names)} experts; set more rows in Settings > MoLE"
                )
        except (SettingsError, MoLEError) as error:
            return [*(gr.update() for _ in self._experts), as_message(str(error))]
        if not names:
            note = "These go with any experts: choose them below."
            return [*(gr.update() for _ in self._experts), as_message(note)]
        padded = [*names, *[""] * (self._rows - len(names))]
        return [*(gr.update(value=name) for name in padded), ""]

    def insert(self, prompt: str, *experts: str) -> list[Any]:
        """Write what the chosen experts are called by into the prompt."""
        from mole_diffusion import MoLEError

        try:
            written, said = self._library.with_phrases(prompt or "", [name for name in experts if name])
        except (SettingsError, MoLEError) as error:
            return [gr.update(), as_message(str(error))]
        return [written, as_message(said) if said else ""]

    def heat_map(self) -> str:
        """Gate weights of the last generation."""
        run = self._last_run()
        return gate_map({} if run is None else run.weights, () if run is None else run.experts)


def as_message(text: str) -> str:
    """A sentence for the user as HTML."""
    from html import escape

    return f"<p class='mole-note'>{escape(text)}</p>"


def _sketch(experts: Sequence[str], regions: Sequence[str]) -> str:
    placed = {}
    for name, region in zip(experts, regions, strict=True):
        if name:
            try:
                placed[name] = parse_region(region, name)
            except SettingsError as error:
                return as_message(str(error))
    return region_map(placed)


def _pasted(index: int, rows: int) -> Callable[[dict[str, Any]], Any]:
    """What one component becomes when PNG info is pasted; as it was where the info is broken."""

    def value(params: dict[str, Any]) -> Any:
        try:
            settings = Settings.from_infotext(params)
        except SettingsError:
            return None
        # Nothing but the switch changes for pictures that were made without experts.
        if not settings.enabled:
            return False if index == 0 else None
        return settings.to_args(rows)[index]

    return value


__all__ = ["Panel", "as_message"]

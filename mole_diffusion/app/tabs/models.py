"""The Models tab: the base model, and the LoRAs and gates that a user brings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusion.app import markup, show
from mole_diffusion.app.library import add_file, add_gates, add_source
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.pictures.opening import STARTER

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_OWN, _OTHER = "The starter that ships with the project", "Another Stable Diffusion"


@dataclass
class ModelsTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=1, min_width=320):
                self._build_base()
            with gr.Column(scale=1, min_width=320):
                self._build_experts()
        self._connect(demo)

    def _build_base(self) -> None:
        self.now = gr.HTML(elem_id="model-now")
        self.kind = gr.Radio([_OWN, _OTHER], value=_OWN, label="Base model", elem_id="model-kind")
        self.source = gr.Textbox(
            label="File, folder or hub id",
            placeholder="/models/sd15.safetensors   or   owner/name",
            info="Only a hub id that you write here is fetched from the network.",
            elem_id="model-source",
        )
        self.open = gr.Button("Open this model", variant="primary", elem_id="open-model")
        self.bar = gr.HTML(show.progress_bar(None), elem_id="model-progress", elem_classes="progress-place")
        gr.HTML(
            '<p class="hint">Stable Diffusion 1, 2 and XL, as one file or as a diffusers folder. Experts and'
            " gates belong to a base model: opening another one starts with an empty library.</p>"
        )

    def _build_experts(self) -> None:
        self.upload = gr.File(
            label="Add LoRAs (safetensors)",
            file_count="multiple",
            file_types=[".safetensors"],
            height=150,
            elem_id="lora-upload",
        )
        with gr.Row(equal_height=True):
            self.lora = gr.Textbox(label="Or by file, folder or hub id", scale=3, elem_id="lora-source")
            self.name = gr.Textbox(label="Name", placeholder="its own", scale=1, elem_id="lora-name")
        self.add = gr.Button("Add this LoRA", size="sm", elem_id="add-lora")
        with gr.Row(equal_height=True):
            self.own = gr.Dropdown([], label="Experts you brought", elem_id="own-experts", scale=3)
            self.remove = gr.Button(
                "Remove", size="sm", elem_id="remove-lora", elem_classes="slim", scale=1, min_width=90
            )
        self.gates = gr.File(
            label="Load trained gates (safetensors)",
            file_types=[".safetensors"],
            height=120,
            elem_id="gates-upload",
        )
        self.said = gr.HTML(elem_id="library-said")

    def _connect(self, demo: gr.Blocks) -> None:
        quick: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
        state = [self.now, self.own, self.said]
        self.open.click(
            self.open_model,
            [self.kind, self.source],
            [self.bar, *state],
            show_progress="hidden",
            concurrency_limit=None,
            **_PRIVATE,
        )
        self.upload.upload(self.add_files, self.upload, [*state, self.upload], **quick)
        self.add.click(self.add_named, [self.lora, self.name], [*state, self.lora, self.name], **quick)
        self.remove.click(self.remove_own, self.own, state, **quick)
        self.gates.upload(self.load_gates, self.gates, [*state, self.gates], **quick)
        self.refreshed: tuple[Any, list[Any], list[Any]] = (self.refresh, [], state)
        demo.load(self.refresh, None, state, **quick)

    @show.friendly
    def refresh(self, request: gr.Request) -> list[Any]:
        """What the session has."""
        return _state(show.session_of(self.studio, request))

    @show.friendly
    async def open_model(self, request: gr.Request, kind: str, source: str) -> AsyncIterator[Any]:
        """Open another base model."""
        session = show.session_of(self.studio, request)
        model = STARTER if kind == _OWN else self.studio.check_source(source)

        def work(job: Any) -> None:
            job.report(0, 0, f"Opening {model}")
            self.studio.base(model)
            if session.model != model:
                session.use_model(model)

        job = self.studio.submit(session, "open", Work(work, Setup(model)))
        async for bar in show.watch(self.studio, job):
            yield bar, gr.skip(), gr.skip(), gr.skip()
        yield show.progress_bar(job), *_state(session)
        show.raise_if_failed(job)

    @show.friendly
    def add_files(self, files: list[str] | None, request: gr.Request) -> list[Any]:
        """Uploaded LoRAs."""
        session = show.session_of(self.studio, request)
        names = []
        for file in files or ():
            with show.warned():
                names.append(add_file(self.studio, session, Path(file)).name)
        # Cleared of refused files too: they would be sent again with the next one.
        return [*_state(session, f"Added: {', '.join(names)}." if names else ""), None]

    @show.friendly
    def add_named(self, source: str, name: str, request: gr.Request) -> list[Any]:
        """A LoRA by path or hub id."""
        session = show.session_of(self.studio, request)
        card = add_source(self.studio, session, source, name)
        return [*_state(session, f"Added: {card.name}."), "", ""]

    @show.friendly
    def remove_own(self, name: str | None, request: gr.Request) -> list[Any]:
        """Take an expert out."""
        session = show.session_of(self.studio, request)
        if name is None:
            return _state(session)
        session.remove(name)
        return _state(session, f"Removed: {name}.")

    @show.friendly
    def load_gates(self, path: str | None, request: gr.Request) -> list[Any]:
        """Uploaded gates."""
        session = show.session_of(self.studio, request)
        if path is None:
            return [*_state(session), None]
        said = ""
        with show.warned():
            said = f"Gates for {', '.join(add_gates(session, Path(path)))} are in use."
        return [*_state(session, said), None]


def _state(session: Session, said: str = "") -> list[Any]:
    model = "the starter" if session.model == STARTER else session.model
    own = [name for name, card in session.library.items() if card.own]
    count = f" · {len(session.library)} experts in the library, {len(session.chosen)} chosen"
    return [
        markup.notice(markup.html("<b>{}</b>{}", model, count)),
        gr.update(choices=own, value=own[-1] if own else None),
        markup.notice(said),
    ]

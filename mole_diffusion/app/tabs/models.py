"""The Models tab: the base model, and the LoRAs and gates that a user brings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mole_diffusion.app import markup, show, tiles
from mole_diffusion.app.folders import LoraFile, loras_in
from mole_diffusion.app.library import add_file, add_gates, add_source
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.app.teaching import TeachRequest, teach
from mole_diffusion.app.uploads import PICTURE_SUFFIXES
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks import families
from mole_diffusion.starter.location import STARTER

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
#: Files of a folder whose pictures are shown.
_PREVIEWS = 60
_PREVIEW_SIDE = 256
_SHARED = "(shared gates)"
_SHARED_SAID = (
    "These shared gates refine auto from now on, whichever experts are chosen; under What you brought they"
    " can be removed."
)
_OWN, _OTHER = "The starter that ships with the project", "Another model"
_WHOLE = (families.SD1, families.SD2, families.SDXL)
_TRANSFORMERS = (
    families.SD3,
    families.FLUX1,
    families.FLUX2,
    families.CHROMA,
    families.QWEN_IMAGE,
    families.Z_IMAGE,
    families.KREA2,
    families.ANIMA,
)
BASES = (
    f"{', '.join(_WHOLE)}: one file or a diffusers folder. {', '.join(_TRANSFORMERS)}: a diffusers folder, or"
    " a transformer's file that lies in one."
)


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
            markup.html(
                '<p class="hint">{} Experts and gates belong to a base model: opening another one starts with'
                " an empty library.</p>",
                BASES,
            )
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
            self.own = gr.Dropdown([], label="What you brought", elem_id="own-experts", scale=3)
            self.remove = gr.Button(
                "Remove", size="sm", elem_id="remove-lora", elem_classes="slim", scale=1, min_width=90
            )
        self._build_folder()
        self._build_teaching()
        self.gates = gr.File(
            label="Load trained or shared gates (safetensors)",
            file_types=[".safetensors"],
            height=150,
            elem_id="gates-upload",
        )
        self.said = gr.HTML(elem_id="library-said")

    def _build_folder(self) -> None:
        with gr.Accordion("A folder of LoRAs on this machine", open=False, elem_id="folder-box"):
            with gr.Row(equal_height=True):
                self.folder = gr.Textbox(
                    label="Folder", placeholder="/models/loras", scale=3, elem_id="folder"
                )
                self.look = gr.Button("Look", size="sm", elem_id="look", scale=1, min_width=90)
            self.found = gr.Dropdown(
                [], label="LoRAs in it (type to search)", multiselect=True, elem_id="found-loras"
            )
            self.previews = gr.Gallery(
                label="Pictures beside them",
                elem_id="lora-previews",
                elem_classes="thumbs",
                columns=5,
                height="auto",
                allow_preview=False,
                buttons=[],
            )
            self.take = gr.Button("Add these", size="sm", elem_id="add-found")

    def _build_teaching(self) -> None:
        with gr.Accordion("Train an expert on pictures", open=False, elem_id="teach-box"):
            self.photos = gr.File(
                label="Pictures of one subject (png, jpg, webp)",
                file_count="multiple",
                file_types=list(PICTURE_SUFFIXES),
                height=150,
                elem_id="teach-pictures",
            )
            with gr.Row():
                self.text = gr.Textbox(
                    label="Words for it, with a trigger", placeholder="a sks dog", elem_id="teach-text"
                )
                self.called = gr.Textbox(label="Name", placeholder="from the words", elem_id="teach-name")
            self.steps = gr.Slider(10, 2000, 300, step=10, label="Steps", elem_id="teach-steps")
            with gr.Row(equal_height=True):
                self.teach = gr.Button("Train this expert", size="sm", elem_id="teach")
                self.stop_teaching = gr.Button("Cancel", size="sm", elem_id="cancel-teach")
            self.taught = gr.HTML(show.progress_bar(None), elem_id="teach-progress")

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
        folder = [self.folder, self.found, self.previews]
        self.look.click(self.look_into, self.folder, folder, **quick)
        self.folder.submit(self.look_into, self.folder, folder, **quick)
        self.take.click(self.add_found, self.found, [*state, self.found], **quick)
        self.teach.click(
            self.train_expert,
            [self.photos, self.text, self.called, self.steps],
            [self.taught, *state, self.photos],
            concurrency_limit=None,
            **quick,
        )
        self.stop_teaching.click(self.cancel_teaching, None, None, **quick)
        self.refreshed: tuple[Any, list[Any], list[Any]] = (self.refresh, [], state)
        demo.load(self.refresh, None, state, **quick)
        demo.load(self.look_again, None, folder, **quick)

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
    def look_into(self, folder: str, request: gr.Request) -> list[Any]:
        """What a folder of LoRAs has; it is remembered."""
        session = show.session_of(self.studio, request)
        found = loras_in(self.studio.check_source(folder))
        session.set_page(folder=folder)
        return _folder(folder, found)

    def look_again(self, request: gr.Request) -> list[Any]:
        """The folder that was named before."""
        folder = show.session_of(self.studio, request).page.get("folder")
        if not isinstance(folder, str) or not self.studio.trusted:
            return [gr.skip()] * 3
        try:
            return _folder(folder, loras_in(folder))
        except ConfigError:  # it is gone
            return _folder(folder, [])

    @show.friendly
    def add_found(self, paths: list[str] | None, request: gr.Request) -> list[Any]:
        """LoRAs of the folder."""
        session = show.session_of(self.studio, request)
        names = []
        for path in paths or ():
            with show.warned():
                names.append(add_source(self.studio, session, path).name)
        return [*_state(session, f"Added: {', '.join(names)}." if names else ""), []]

    @show.friendly
    async def train_expert(
        self, request: gr.Request, files: list[str] | None, text: str, name: str, steps: Any
    ) -> AsyncIterator[Any]:
        """Train an expert on pictures, into the library."""
        session = show.session_of(self.studio, request)
        wanted = TeachRequest(
            pictures=tuple(map(Path, files or ())), text=text or "", name=name or "", steps=int(steps)
        )
        job = self.studio.submit(session, "teach", teach(self.studio, session, wanted))
        async for bar in show.watch(self.studio, job):
            yield bar, gr.skip(), gr.skip(), gr.skip(), gr.skip()
        said = f"Trained and added: {job.result.name}." if job.state == "done" else ""
        yield show.progress_bar(job), *_state(session, said), None
        show.raise_if_failed(job)

    def cancel_teaching(self, request: gr.Request) -> None:
        """Stop the training of an expert."""
        show.session_of(self.studio, request).cancel("teach")

    @show.friendly
    def remove_own(self, name: str | None, request: gr.Request) -> list[Any]:
        """Take an expert out."""
        session = show.session_of(self.studio, request)
        if name is None:
            return _state(session)
        if name == _SHARED:
            session.set_shared(None)
        else:
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
            names = add_gates(session, Path(path))
            said = f"Gates for {', '.join(names)} are in use." if names else _SHARED_SAID
        return [*_state(session, said), None]


def _folder(folder: str, found: list[LoraFile]) -> list[Any]:
    choices = [(lora.label, str(lora.path)) for lora in found]
    seen = ((preview_of(lora), lora.label) for lora in found if lora.preview)
    shown = list(islice((one for one in seen if one[0] is not None), _PREVIEWS))
    return [folder, gr.update(choices=choices, value=[]), gr.update(value=shown, visible=bool(shown))]


def preview_of(lora: LoraFile) -> Image.Image | None:
    """The picture beside a LoRA, small; None where there is none that can be read."""
    if lora.preview is None:
        return None
    try:
        return tiles.thumbnail(lora.preview, _PREVIEW_SIDE)
    except ConfigError:  # one that is broken takes nothing from the others
        return None


def _state(session: Session, said: str = "") -> list[Any]:
    model = "the starter" if session.model == STARTER else session.model
    own = [name for name, card in session.library.items() if card.own]
    own += [_SHARED] if session.shared is not None else []
    count = f" · {len(session.library)} experts in the library, {len(session.chosen)} chosen"
    return [
        markup.notice(markup.html("<b>{}</b>{}", model, count)),
        gr.update(choices=own, value=own[-1] if own else None),
        markup.notice(said),
    ]

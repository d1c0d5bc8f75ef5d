"""The Compare tab: several methods side by side on one seed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusion.app import fragments, markup, page, show
from mole_diffusion.app.composing import MAX_STEPS, ComposeRequest, compose
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.session import Picture, Session
from mole_diffusion.app.stopping import stoppable
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.app.training import concept_of
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.methods import METHODS, prepare
from mole_diffusion.pictures.files import open_picture, write_picture
from mole_diffusion.pictures.grid import GridRow, picture_grid
from mole_diffusion.pictures.training import TrainingConfig

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_FIRST = ("gates", "la", "nla", "none")


@dataclass
class CompareTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=4, min_width=320):
                self._build_request()
            with gr.Column(scale=7, min_width=320):
                self.gallery = gr.Gallery(
                    label="Same seed, one picture per method",
                    elem_id="comparison",
                    elem_classes="strip",
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                )
                self.file = gr.DownloadButton(
                    "Download as one picture", elem_id="comparison-file", interactive=False, size="sm"
                )
        self._connect(demo)

    def _build_request(self) -> None:
        self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=5, elem_id="compare-prompt")
        self.methods = gr.CheckboxGroup([], label="Methods", elem_id="methods")
        with gr.Row():
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="compare-seed"
            )
            self.steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", elem_id="compare-steps")
        with gr.Row(equal_height=True):
            self.go = gr.Button("Compare", variant="primary", elem_id="compare", scale=3, min_width=120)
            self.cancel = gr.Button("Cancel", elem_id="cancel-compare", scale=1, min_width=90)
        self.bar = gr.HTML(show.progress_bar(None), elem_id="compare-progress", elem_classes="progress-place")
        with gr.Accordion(
            "Methods that are prepared first", open=False, elem_id="prepare-box", elem_classes="late"
        ):
            gr.HTML(
                '<p class="hint">Merges are computed once for the chosen experts, others search or train for'
                " the prompt. Then they stand in the list above.</p>"
            )
            self.which = gr.Radio([], label="Method to prepare", elem_id="prepare-which")
            self.prepare = gr.Button("Prepare", size="sm", elem_id="prepare")
        self.explained = gr.HTML(elem_classes="late")

    def _connect(self, demo: gr.Blocks) -> None:
        live: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, **_PRIVATE}
        quick: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
        results = [self.bar, self.gallery, self.file]
        self.go.click(self.compare, [self.prompt, self.methods, self.seed, self.steps], results, **live)
        self.cancel.click(self.stop, None, None, **quick)
        lists = [self.methods, self.which, self.explained]
        self.prepare.click(
            self.make_ready, [self.which, self.prompt, self.methods], [self.bar, *lists], **live
        )
        self.refreshed = (self.refresh, [self.prompt, self.methods], [self.prompt, *lists])
        demo.load(self.refresh, [self.prompt, self.methods], [self.prompt, *lists], **quick)

    @show.friendly
    def refresh(self, prompt: str, chosen: list[str] | None, request: gr.Request) -> list[Any]:
        """The methods that there are for the session's experts."""
        session = show.session_of(self.studio, request)
        carried = page.carried(session, "compare", prompt or "")
        return [*show.news([carried], [prompt]), *_lists(session, chosen, held=chosen)]

    @show.friendly
    async def compare(
        self, request: gr.Request, prompt: str, names: list[str], seed: Any, steps: Any
    ) -> AsyncIterator[Any]:
        """Draw the prompt with each method."""
        session = show.session_of(self.studio, request)
        wanted = self._request(session, prompt, names, seed, steps)
        job = self.studio.submit(session, "compare", compose(self.studio, session, wanted, names))
        async for bar in show.watch(self.studio, job):
            yield bar, gr.skip(), gr.skip()
        if job.state == "done":
            yield show.progress_bar(None), *_results(session, wanted, job.result)
        show.raise_if_failed(job)

    @show.friendly
    async def make_ready(
        self, request: gr.Request, name: str | None, prompt: str, chosen: list[str] | None
    ) -> AsyncIterator[Any]:
        """Do the work of a method that needs it."""
        session = show.session_of(self.studio, request)
        job = self.studio.submit(session, "compare", self._preparation(session, name, prompt))
        async for bar in show.watch(self.studio, job):
            yield bar, gr.skip(), gr.skip(), gr.skip()
        more = [*(chosen or ()), name] if job.state == "done" and name else chosen
        yield show.progress_bar(job), *_lists(session, more)
        show.raise_if_failed(job)

    def stop(self, request: gr.Request) -> None:
        """Cancel."""
        show.session_of(self.studio, request).cancel("compare")

    def _request(
        self, session: Session, prompt: str, names: list[str], seed: Any, steps: Any
    ) -> ComposeRequest:
        if not names:
            raise ConfigError("no method is chosen: tick at least one")
        if not session.chosen:
            raise ConfigError("no expert is chosen: choose some in Compose")
        return ComposeRequest(prompt=prompt or "", seed=int(seed or 0), steps=int(steps))

    def _preparation(self, session: Session, name: str | None, prompt: str) -> Work:
        if name is None or name not in METHODS:
            raise ConfigError("no method is chosen: choose one to prepare")
        if not prompt.strip():
            raise ConfigError("the prompt is empty: methods are prepared for a prompt")
        setup, folder = session.setup(), session.new_path("prepared", "")

        def work(job: Job) -> None:
            job.report(0, 0, f"Preparing {METHODS[name].label}")
            with self.studio.opened(setup) as pipe, stoppable(pipe, job.check):
                made = prepare(
                    name,
                    pipe,
                    prompts=[prompt],
                    concepts=[concept_of(card) for card in setup.cards],
                    config=TrainingConfig(progress=False),
                    folder=folder,
                )
            session.keep_prepared(name, setup, made)

        return Work(work, setup)


def _lists(session: Session, chosen: list[str] | None, held: list[str] | None = None) -> list[Any]:
    """Updates of the list of methods, of the list of those to prepare, and what they are.

    Args:
        session: whose.
        chosen: what is to be ticked; None is the first choice.
        held: what the page has ticked now. The same is not sent again: it would undo a tick set meanwhile.
    """
    prepared = session.prepared_for(session.setup())
    ready = {
        name: method
        for name, method in METHODS.items()
        if not method.needs_preparation or name == "gates" or name in prepared
    }
    rest = [name for name in METHODS if name not in ready]
    ticked = [name for name in (chosen or _FIRST) if name in ready]
    value = {} if ticked == held else {"value": ticked}
    return [
        gr.update(choices=[(method.label, name) for name, method in ready.items()], **value),
        gr.update(choices=[(METHODS[name].label, name) for name in rest], value=next(iter(rest), None)),
        markup.facts({method.label: method.description for method in METHODS.values()}),
    ]


def _results(
    session: Session, wanted: ComposeRequest, pictures: list[Picture]
) -> tuple[list[tuple[str, str]], Any]:
    """The strip of pictures, and the same as one file."""
    # By what drew them: without trained gates, "gates" is auto.
    labels = [fragments.label_of(picture.settings) for picture in pictures]
    images = [open_picture(picture.path) for picture in pictures]
    path: Path = session.new_path("comparison", ".png")
    row = GridRow(f"seed {wanted.seed}", images, f"{wanted.steps} steps", labels)
    write_picture(picture_grid([row], title=wanted.prompt), path)
    strip = [(str(picture.path), label) for picture, label in zip(pictures, labels, strict=True)]
    return strip, gr.update(value=str(path), interactive=True)

"""The Train tab: experts, prompt, reference pictures; curves and previews while the gates learn."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from markupsafe import Markup

from mole_diffusion.app import charts, markup, page, show, tiles
from mole_diffusion.app.jobs import Job, QueueFullError
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import COLOURS
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.train_request import TrainRequest
from mole_diffusion.app.training import (
    can_resume,
    resume_training,
    start_training,
    uniform_entropy,
)
from mole_diffusion.app.trainings import Training
from mole_diffusion.app.uploads import PICTURE_SUFFIXES, check_upload
from mole_diffusion.core.errors import ConfigError

OBJECTIVES = {
    "Collages of the reference pictures": "collage",
    "CLIP guidance (the paper)": "clip",
    "Collages, then CLIP": "both",
}
_EMPTY = markup.html(
    '<div class="empty-view"><p><b>Gates learn who acts where.</b></p><p>The LoRAs stay as they are.'
    " Loss, entropy and each expert's share appear here, and a preview every 50 iterations.</p></div>"
)
_MAX_REFERENCES = 24
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


@dataclass
class TrainTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                self._build_request()
                self._build_concepts()
            with gr.Column(scale=6, min_width=320):
                self._build_view()
        self._connect(demo)

    def _build_request(self) -> None:
        with gr.Group(elem_classes="card"):
            gr.HTML('<div class="section-title">Experts whose gates are trained</div>')
            self.experts = tiles.tiles("Experts whose gates are trained", "train-experts")
        self.prompt = gr.Textbox(
            label="Prompts, one per line",
            info="Between them they name every expert's subject.",
            lines=2,
            max_lines=6,
            elem_id="train-prompt",
        )
        with gr.Row():
            self.iterations = gr.Slider(
                10, 2000, 400, step=10, label="Iterations", info="400 are a good start", elem_id="iterations"
            )
        with gr.Row(equal_height=True):
            self.go = gr.Button("Train gates", variant="primary", elem_id="train", scale=3, min_width=130)
            self.cancel = gr.Button("Cancel", elem_id="cancel-train", scale=1, min_width=90)
            self.more = gr.Button("Resume", elem_id="resume-train", scale=1, min_width=90, interactive=False)
        self.bar = gr.HTML(show.progress_bar(None), elem_id="train-progress", elem_classes="progress-place")
        with gr.Accordion("Settings", open=False, elem_id="train-settings", elem_classes="late"):
            self.objective = gr.Radio(
                list(OBJECTIVES), value=next(iter(OBJECTIVES)), label="Trained on", elem_id="objective"
            )
            with gr.Row():
                self.batch = gr.Number(
                    0,
                    elem_id="train-batch",
                    label="Pictures per iteration",
                    info="0: the default",
                    precision=0,
                    minimum=0,
                    maximum=64,
                )
                self.seed = gr.Number(0, label="Seed", info="Of everything drawn", precision=0, minimum=0)

            self.backgrounds = gr.Checkbox(
                True,
                label="Let the base draw backgrounds that fit the prompt (starts later, learns better)",
                elem_id="backgrounds",
            )

    def _build_concepts(self) -> None:
        with gr.Accordion(
            "Concepts: phrases and reference pictures",
            open=False,
            elem_id="concepts-box",
            elem_classes="late",
        ):
            self.concept = gr.Radio([], label="Concept of", elem_id="concept")
            with gr.Row():
                self.text = gr.Textbox(
                    label="Phrase with the trigger", placeholder="a zorin boot", elem_id="concept-text"
                )
                self.class_text = gr.Textbox(
                    label="The same without it", placeholder="a boot", elem_id="concept-class"
                )
            self.pictures = gr.Gallery(
                label="Reference pictures",
                elem_id="references",
                elem_classes="thumbs",
                columns=5,
                height="auto",
                allow_preview=False,
                buttons=[],
            )
            self.upload = gr.File(
                label="Add pictures of it (png, jpg, webp)",
                file_count="multiple",
                file_types=list(PICTURE_SUFFIXES),
                height=130,
                elem_id="reference-upload",
            )
            #: Another value whenever a concept is another than before.
            self.changes = gr.State("")
            with gr.Row():
                self.keep = gr.Button("Save phrases", size="sm", elem_id="save-concept")
                self.clear = gr.Button("Remove pictures", size="sm", elem_id="clear-references")

    def _build_view(self) -> None:
        self.view = gr.HTML(_curves(None), elem_id="curves")
        self.previews = gr.Gallery(
            label="Previews, one every 50 iterations",
            elem_id="previews",
            elem_classes="thumbs",
            columns=5,
            height="auto",
            object_fit="contain",
            buttons=["fullscreen"],
        )
        self.said = gr.HTML(elem_id="train-said")
        with gr.Row(equal_height=True):
            self.file = gr.DownloadButton(
                "Download the gates", elem_id="gates-file", interactive=False, size="sm"
            )
            self.use = gr.Button("Use these gates", elem_id="use-gates", interactive=False, size="sm")

    def _connect(self, demo: gr.Blocks) -> None:
        results = [self.bar, self.view, self.previews, self.file, self.more, self.said, self.use]
        self.use.click(self.use_gates, None, results, **_PRIVATE)
        wanted = [self.prompt, self.iterations, self.objective, self.batch, self.seed, self.backgrounds]
        live: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, **_PRIVATE}
        quick: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
        self.go.click(self.train, wanted, results, **live)
        self.more.click(self.go_on, None, results, **live)
        self.cancel.click(self.stop, None, None, **quick)
        demo.load(self.rejoin, None, results, **live)
        concept = [self.text, self.class_text, self.pictures]
        shown = [self.experts, self.prompt, self.concept, *concept]
        self.experts.select(self.choose, [self.experts, self.prompt, self.concept], shown, **quick)
        phrases = [self.concept, self.text, self.class_text]
        self.keep.click(self.save_phrases, phrases, self.changes, **quick)
        self.upload.upload(
            self.add_pictures, [self.concept, self.upload], [self.upload, self.changes], **quick
        )
        self.clear.click(self.remove_pictures, self.concept, self.changes, **quick)
        # One listener for all: of two, the answer about the concept before might come last.
        gr.on(
            [self.concept.change, self.changes.change],
            self.show_concept,
            self.concept,
            concept,
            trigger_mode="always_last",
            **quick,
        )
        self.refreshed = (self.refresh, [self.experts, self.prompt, self.concept], shown)
        demo.load(self.refresh, [self.experts, self.prompt, self.concept], shown, **quick)

    @show.friendly
    def refresh(self, values: Any, prompt: str, concept: str | None, request: gr.Request) -> list[Any]:
        """Experts, a prompt that names them, and the concept shown."""
        experts, carried, *rest = self._shown(show.session_of(self.studio, request), prompt, concept)
        return [*show.news([experts, carried], [values, prompt]), *rest]

    @show.friendly
    def choose(self, values: Any, prompt: str, concept: str | None, request: gr.Request) -> list[Any]:
        """Other experts."""
        session = show.session_of(self.studio, request)
        kept = prompt if page.is_own(session, "train", prompt or "") else ""
        with show.warned():
            page.choose(session, tiles.active(tiles.read(values)), page.controls(session)["prompt"])
        return self._shown(session, kept, concept)

    @show.friendly
    def show_concept(self, name: str | None, request: gr.Request) -> list[Any]:
        """Phrases and pictures of one expert."""
        return _concept(show.session_of(self.studio, request), name)

    @show.friendly
    def save_phrases(self, name: str | None, text: str, class_text: str, request: gr.Request) -> str:
        """Keep what the user wrote; as all that change a concept, returns what no other change has."""
        session = show.session_of(self.studio, request)
        if name is None or not text.strip():
            raise ConfigError("choose a concept and write its phrase first")
        session.describe(name, text=text.strip(), class_text=class_text.strip())
        gr.Info(markup.html("Saved for {}.", name))
        return uuid4().hex

    @show.friendly
    def add_pictures(
        self, name: str | None, files: list[str] | None, request: gr.Request
    ) -> tuple[None, str]:
        """Put uploaded pictures to an expert's references; the place for uploads is empty then."""
        session = show.session_of(self.studio, request)
        if name is None:
            raise ConfigError("choose a concept first")
        card = session.library[name]
        added: list[Path] = []
        for file in files or ():
            with show.warned():
                if len(card.references) + len(added) >= _MAX_REFERENCES:
                    raise ConfigError(f"{Path(file).name!r} is one too many: {_MAX_REFERENCES} per concept")
                if check_upload(Path(file)) != "picture":
                    raise ConfigError(f"{Path(file).name!r} is no picture")
                kept = session.new_path("references", Path(file).suffix.lower())
                shutil.copyfile(file, kept)
                added.append(kept)
        if added:
            references = (*card.references, *added)
            session.describe(name, references=references, picture=card.picture or references[0])
        return None, uuid4().hex

    @show.friendly
    def remove_pictures(self, name: str | None, request: gr.Request) -> str:
        """No references: the expert then draws its own."""
        session = show.session_of(self.studio, request)
        if name is not None:
            session.describe(name, references=())
        return uuid4().hex

    @show.friendly
    async def train(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """Queue a training and show it."""
        session = show.session_of(self.studio, request)
        if session.running("train"):
            raise QueueFullError("your last training is not done yet: wait for it, or cancel it first")
        training = start_training(self.studio, session, self._request(*values))
        async for update in self._follow(session, training):
            yield update

    @show.friendly
    async def go_on(self, request: gr.Request) -> AsyncIterator[Any]:
        """Go on with the training that was stopped."""
        session = show.session_of(self.studio, request)
        training = resume_training(self.studio, session)
        async for update in self._follow(session, training):
            yield update

    async def rejoin(self, request: gr.Request) -> AsyncIterator[Any]:
        """After a reload: the training as it is, and on from there."""
        session = show.session_of(self.studio, request)
        if session.training is None:
            yield self._view(session, None, None)
        elif session.training.job.finished:
            yield self._view(session, session.training, session.training.job)
        else:
            async for update in self._follow(session, session.training):
                yield update

    def stop(self, request: gr.Request) -> None:
        """Cancel the training; what it has is kept."""
        show.session_of(self.studio, request).cancel("train")

    @show.friendly
    def use_gates(self, request: gr.Request) -> tuple[Any, ...]:
        """Draw with the gates of the last training, also where it was stopped before its end."""
        session = show.session_of(self.studio, request)
        training = session.training
        if training is None or training.gates is None:
            raise ConfigError("there are no trained gates yet")
        session.set_gates(training.setup.cards, training.gates)
        return self._view(session, training, training.job)

    def _request(
        self, prompt: str, iterations: float, objective: str, batch: Any, seed: Any, backgrounds: bool
    ) -> TrainRequest:
        lines = [line.strip() for line in (prompt or "").splitlines() if line.strip()]
        return TrainRequest(
            prompts=tuple(lines),
            iterations=int(iterations),
            objective=OBJECTIVES.get(objective, "collage"),
            batch=int(batch or 0),
            seed=int(seed or 0),
            backgrounds=bool(backgrounds),
        )

    async def _follow(self, session: Session, training: Training) -> AsyncIterator[Any]:
        job = training.job
        async for _ in job.follow():
            yield self._view(session, training, job)
        show.raise_if_failed(job)

    def _view(self, session: Session, training: Training | None, job: Job | None) -> tuple[Any, ...]:
        gates = training.gates if training is not None else None
        position = self.studio.worker.place(job) if job is not None else None
        return (
            show.progress_bar(job, position),
            _curves(training, session),
            list(training.previews) if training is not None else None,
            gr.update(value=str(gates.path) if gates else None, interactive=gates is not None),
            gr.update(interactive=can_resume(training)),
            what_now(session, training, job),
            gr.update(interactive=gates is not None and not in_use(session, training)),
        )

    def _shown(self, session: Session, prompt: str, concept: str | None) -> list[Any]:
        name = concept if concept in session.chosen else next(iter(session.chosen), None)
        return [
            tiles.library_tiles(session),
            page.carried(session, "train", prompt or ""),
            gr.update(choices=list(session.chosen), value=name),
            *_concept(session, name),
        ]


def in_use(session: Session, training: Training | None) -> bool:
    """Whether pictures are drawn with the gates of a training."""
    return training is not None and session.gates(training.names) == training.gates


def what_now(session: Session, training: Training | None, job: Job | None) -> Markup:
    """What there is after a training, and what can be done with it."""
    if training is None or job is None or not job.finished:
        return markup.NOTHING
    if training.gates is None:
        again = " <b>Resume</b> goes on with what was prepared." if can_resume(training) else ""
        return markup.notice(markup.html("No iteration was made; there are no gates yet." + again))
    done = training.gates.iterations or len(training.history)
    if in_use(session, training):
        text = "<b>Compose</b> draws {} with these gates now ({} iterations)."
        return markup.notice(markup.html(text, ", ".join(training.names), done))
    text = (
        "Stopped after {} of {} iterations. The gates are kept and not in use: <b>Resume</b> goes on,"
        " <b>Use these gates</b> draws with them as they are."
    )
    return markup.notice(markup.html(text, done, training.iterations))


def _concept(session: Session, name: str | None) -> list[Any]:
    if name is None or name not in session.library:
        return ["", "", None]
    card = session.library[name]
    return [card.text, card.class_text, [str(path) for path in card.references]]


def _curves(training: Training | None, session: Session | None = None) -> Markup:
    """Loss, entropy and mean weights over the iterations."""
    if training is None or session is None or not training.history:
        return _EMPTY
    rows, total = training.history, training.iterations
    losses = charts.smoothed([row["loss"] for row in rows])
    weights = {
        name: (
            session.colour(name) if name in session.chosen else "#7a7268",
            [row["weights"][name] for row in rows],
        )
        for name in rows[-1]["weights"]
    }
    uniform = uniform_entropy(training.names)
    return markup.html(
        '<div class="charts">{}{}{}</div>',
        charts.curves("Loss (smoothed)", {"loss": (COLOURS[0], losses)}, total),
        charts.curves(
            "Entropy of the gates",
            {"entropy": ("#3a86c8", [row["entropy"] for row in rows])},
            total,
            level=("all alike", uniform),
            bottom=0.0,
        ),
        charts.curves("Mean weight of each expert", weights, total, bottom=0.0),
    )

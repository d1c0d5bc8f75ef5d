"""The Export tab: the mixture as one plain LoRA, and how far it is from the gates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from mole_diffusion.app import markup, page, show
from mole_diffusion.app.composing import MAX_STEPS
from mole_diffusion.app.exporting import FORMATS, MAX_RANK, ExportRequest, export
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.export import ExportReport

_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_EMPTY = markup.html(
    '<div class="empty-view"><p><b>One file for every program.</b></p><p>The gates are frozen at their mean'
    " over your prompts, and the mixture becomes one LoRA. The report says how far that is from the gates."
    "</p></div>"
)


@dataclass
class ExportTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                self.who = gr.HTML(elem_id="export-who")
                self.prompt = gr.Textbox(
                    label="Prompts like those the LoRA is for, one per line", lines=2, elem_id="export-prompt"
                )
                self.form = gr.Radio(
                    [(label, name) for name, label in FORMATS.items()],
                    value="kohya",
                    label="Format",
                    elem_id="export-format",
                )
                self.rank = gr.Slider(
                    0,
                    MAX_RANK,
                    0,
                    step=1,
                    label="Rank",
                    info="0: exact, nothing is lost",
                    elem_id="export-rank",
                )
                with gr.Row():
                    self.steps = gr.Slider(
                        1, MAX_STEPS, 20, step=1, label="Steps per prompt", elem_id="export-steps"
                    )
                self.half = gr.Checkbox(False, label="Half precision: half the size", elem_id="export-half")
                with gr.Row(equal_height=True):
                    self.go = gr.Button("Export", variant="primary", elem_id="export", scale=3, min_width=120)
                    self.cancel = gr.Button("Cancel", elem_id="cancel-export", scale=1, min_width=90)
                self.bar = gr.HTML(
                    show.progress_bar(None), elem_id="export-progress", elem_classes="progress-place"
                )
            with gr.Column(scale=6, min_width=320):
                self.report = gr.HTML(_EMPTY, elem_id="export-report")
                self.pair = gr.Gallery(
                    label="Before and after, on one seed",
                    elem_id="export-pair",
                    elem_classes="strip",
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    visible=False,
                    buttons=["fullscreen"],
                )
                self.file = gr.DownloadButton(
                    "Download the LoRA", elem_id="export-file", interactive=False, variant="secondary"
                )
        self._connect(demo)

    def _connect(self, demo: gr.Blocks) -> None:
        quick: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}
        wanted = [self.prompt, self.form, self.rank, self.steps, self.half]
        self.go.click(
            self.export,
            wanted,
            [self.bar, self.report, self.file, self.pair],
            show_progress="hidden",
            concurrency_limit=None,
            **_PRIVATE,
        )
        self.cancel.click(self.stop, None, None, **quick)
        self.refreshed = (self.refresh, [self.prompt], [self.who, self.prompt])
        demo.load(self.refresh, [self.prompt], [self.who, self.prompt], **quick)

    @show.friendly
    def refresh(self, prompt: str, request: gr.Request) -> list[Any]:
        """Which experts go into the file."""
        session = show.session_of(self.studio, request)
        return [_who(session), *show.news([page.carried(session, "export", prompt or "")], [prompt])]

    @show.friendly
    async def export(
        self, request: gr.Request, prompt: str, form: str, rank: Any, steps: Any, half: bool
    ) -> AsyncIterator[Any]:
        """Queue an export and show it."""
        session = show.session_of(self.studio, request)
        wanted = self._request(session, prompt, form, rank, steps, half)
        job = self.studio.submit(session, "export", export(self.studio, session, wanted))
        async for bar in show.watch(self.studio, job):
            yield bar, gr.skip(), gr.skip(), gr.skip()
        if job.state == "done":
            made = job.result
            file = gr.update(value=str(made.report.path), interactive=True)
            pair = [(str(made.before), "with the gates"), (str(made.after), "with the exported LoRA")]
            shown = gr.update(value=pair, visible=True)
            yield show.progress_bar(job), report_html(made.report), file, shown
        show.raise_if_failed(job)

    def stop(self, request: gr.Request) -> None:
        """Cancel."""
        show.session_of(self.studio, request).cancel("export")

    def _request(
        self, session: Session, prompt: str, form: str, rank: Any, steps: Any, half: bool
    ) -> ExportRequest:
        if not session.chosen:
            raise ConfigError("no expert is chosen: choose some in Compose")
        lines = tuple(line.strip() for line in (prompt or "").splitlines() if line.strip())
        return ExportRequest(prompts=lines, form=form, rank=int(rank), steps=int(steps), half=bool(half))


def report_html(report: ExportReport) -> Markup:
    """What was written and how far it is from the gates."""
    size = report.path.stat().st_size / 2**20
    ranks = ", ".join(f"{part} {rank}" for part, rank in report.ranks.items())
    prompts = "1 prompt" if len(report.prompts) == 1 else f"{len(report.prompts)} prompts"
    facts = {
        "Experts": ", ".join(report.experts),
        "Format": report.format,
        "Rank": ranks,
        "Matrices": report.matrices,
        "Size": f"{size:.1f} MB",
        "Frozen over": f"{prompts}, {report.steps} steps",
    }
    bars = [
        ("Noise prediction, against the gates", report.noise_difference, "how far the pictures drift"),
        (
            "Share of what the gates change",
            report.effect_difference,
            "0 % is the gates themselves, 100 % the base",
        ),
    ]
    if report.compression_error:
        bars.append(("Lost by the lower rank", report.compression_error, "of the exact static mixture"))
    return markup.html(
        '<div class="report">{}{}{}</div>',
        markup.facts(facts),
        markup.join(_bar(*bar) for bar in bars),
        markup.hint("Load the file with weight 1; strengths and gates are inside."),
    )


def _bar(name: str, share: float, note: str) -> Markup:
    return markup.html(
        '<div class="meter"><div class="work-line"><b>{}</b><span>{:.1%}</span></div>'
        '<div class="work-bar"><i style="width: {:.1f}%"></i></div>{}</div>',
        name,
        share,
        min(share, 1.0) * 100,
        markup.hint(note),
    )


def _who(session: Session) -> Markup:
    if not session.chosen:
        return markup.notice("No expert is chosen. Choose some in Compose.")
    states = {
        "trained": "trained gates",
        "partly trained": "gates whose training was stopped before its end",
        "fresh": "no trained gates: the file is the experts' plain mean",
    }
    state = states[session.setup().gates_state]
    return markup.notice(markup.html('<div class="legend">{}</div>{}', markup.dots(session.chosen), state))

"""The Compose tab: prompt, experts as tiles, regions, and the pictures."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mole_diffusion.app import fragments, markup, regions, show, tiles
from mole_diffusion.app.composing import MAX_SIDE, MAX_STEPS, ComposeRequest, compose
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import PictureSettings, mask_from_text, read_settings
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.core.errors import MoLEError
from mole_diffusion.starter.location import GUIDANCE

MIXTURES = {
    "Gates": "gates",
    "All in full (LA)": "la",
    "Averaged (NLA)": "nla",
    "Base model only": "none",
}
FIRST_PROMPT = "a zor boot, a vek monster and a kip clock on the beach"


@dataclass
class ComposeTab:
    """The tab's controls and what they do."""

    studio: Studio

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out and connect it; inside its `gr.Tab`."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                self._build_prompt()
                self._build_experts()
                self._build_regions()
                self._build_settings()
            with gr.Column(scale=6, min_width=320):
                self._build_result()
                self._build_gallery()
        self._connect(demo)

    def _build_prompt(self) -> None:
        self.prompt = gr.Textbox(
            FIRST_PROMPT,
            label="Prompt",
            lines=2,
            max_lines=5,
            placeholder="What the picture shows",
            elem_id="prompt",
        )
        with gr.Row(equal_height=True):
            self.go = gr.Button("Draw", variant="primary", elem_id="draw", scale=3, min_width=120)
            self.cancel = gr.Button("Cancel", elem_id="cancel-draw", scale=1, min_width=90)
        self.bar = gr.HTML(show.progress_bar(None), elem_id="draw-progress", elem_classes="progress-place")
        self.beside = gr.Checkbox(
            False, label="Draw NLA beside it, on the same seed", elem_id="beside", container=False
        )

    def _build_experts(self) -> None:
        with gr.Group(elem_classes=["card", "late"]):
            gr.HTML('<div class="section-title">Experts in this picture</div>')
            self.mix = tiles.tiles("Experts in this picture", "mix")
            self.notice = gr.HTML(elem_id="gates-notice")
        with gr.Accordion("Choose other experts", open=False, elem_id="library-box", elem_classes="late"):
            gr.HTML(
                '<p class="hint">Tap to put an expert in or take it out. Gates are trained for a set of'
                " experts: another set starts with gates of its own.</p>"
            )
            self.library = tiles.tiles("All experts", "library")

    def _build_regions(self) -> None:
        with gr.Accordion(
            "Regions: paint where an expert counts", open=False, elem_id="regions-box", elem_classes="late"
        ):
            self.legend = gr.HTML(elem_id="legend")
            self.canvas = gr.ImageEditor(
                label="Regions",
                type="pil",
                image_mode="RGBA",
                canvas_size=(regions.CANVAS, regions.CANVAS),
                fixed_canvas=True,
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=60, colors=["#e4572e"], color_mode="fixed"),
                elem_id="canvas",
                height=420,
            )
            with gr.Row():
                self.over = gr.Button("Paint over the last picture", size="sm", elem_id="paint-over")
                self.clear = gr.Button("Clear regions", size="sm", elem_id="clear-regions")

    def _build_settings(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings-box", elem_classes="late"):
            self.negative = gr.Textbox("", label="Negative prompt", lines=1, elem_id="negative")
            self.mixture = gr.Radio(
                list(MIXTURES), value="Gates", label="How experts are mixed", elem_id="mixture"
            )
            with gr.Row(equal_height=True):
                self.seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed"
                )
                self.dice = gr.Button("New seed", elem_id="dice", elem_classes="slim", min_width=110, scale=0)
            with gr.Row():
                self.steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", elem_id="steps")
                self.guidance = gr.Slider(
                    0,
                    20,
                    GUIDANCE,
                    step=0.5,
                    label="Guidance",
                    info=f"{GUIDANCE:g} suits the starter, 7.5 most other models",
                    elem_id="guidance",
                )
            with gr.Row():
                self.width = gr.Number(
                    0,
                    label="Width",
                    info="0: the model's own",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SIDE,
                    step=8,
                )
                self.height = gr.Number(
                    0,
                    label="Height",
                    info="0: the model's own",
                    precision=0,
                    minimum=0,
                    maximum=MAX_SIDE,
                    step=8,
                )

    def _build_result(self) -> None:
        with gr.Row(equal_height=True):
            options = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
            self.picture = gr.Image(
                label="Picture",
                elem_id="picture",
                elem_classes="canvas",
                height=480,
                min_width=240,
                **options,
            )
            self.nla = gr.Image(
                label="NLA, same seed",
                elem_id="nla-picture",
                elem_classes="canvas",
                height=480,
                min_width=240,
                visible=False,
                **options,
            )

    def _build_gallery(self) -> None:
        self.gallery = gr.Gallery(
            label="Pictures of this session",
            elem_id="gallery",
            elem_classes="last",
            columns=4,
            height="auto",
            object_fit="cover",
            buttons=["download", "fullscreen"],
            allow_preview=True,
            preview=False,
        )
        self.selected = gr.State(None)
        self.details = gr.HTML(elem_id="details", elem_classes="last")
        with gr.Row(elem_classes="last"):
            self.reuse = gr.Button("Use these settings", size="sm", elem_id="reuse", interactive=False)
        self.dropped = gr.File(
            label="Take settings from a picture (PNG)",
            file_types=[".png"],
            elem_id="drop",
            elem_classes="last",
            height=140,
        )

    def _connect(self, demo: gr.Blocks) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        results = [self.bar, self.picture, self.nla, self.gallery]
        inputs = [self.prompt, self.negative, self.mixture, self.seed, self.steps, self.guidance]
        inputs += [self.width, self.height, self.mix, self.canvas, self.beside]
        gr.on(
            [self.go.click, self.prompt.submit],
            self.draw,
            inputs,
            results,
            show_progress="hidden",
            concurrency_limit=None,
            **private,
        )
        self.cancel.click(self.stop, None, None, **private)
        self.dice.click(lambda: random.randrange(2**32), None, self.seed, **private)
        self.beside.change(
            lambda on: gr.update(visible=on),
            self.beside,
            self.nla,
            show_progress="hidden",
            **private,
        )
        shown = [self.library, self.mix, self.notice, self.legend, self.canvas]
        self.library.select(self.choose, [self.library, self.mix], shown, show_progress="hidden", **private)
        quiet: dict[str, Any] = {"show_progress": "hidden", **private}
        self.over.click(self.paint_over, None, self.canvas, **quiet)
        self.clear.click(lambda: regions.EMPTY, None, self.canvas, **quiet)
        self.gallery.select(
            self.select,
            None,
            [self.selected, self.details, self.reuse],
            show_progress="hidden",
            **private,
        )
        controls = [self.prompt, self.negative, self.mixture, self.seed, self.steps, self.guidance]
        controls += [self.width, self.height, self.library, self.mix, self.notice, self.legend, self.canvas]
        self.reuse.click(self.use_selected, self.selected, controls, **private)
        self.dropped.upload(self.use_dropped, self.dropped, [*controls, self.dropped], **private)
        demo.load(self.refresh, self.mix, [*shown, self.gallery], show_progress="hidden", **private)
        demo.load(self.rejoin, None, results, show_progress="hidden", concurrency_limit=None, **private)
        self.refreshed = (self.refresh, [self.mix], [*shown, self.gallery])

    @show.friendly
    def refresh(self, values: Any, request: gr.Request) -> list[Any]:
        """What the session has: tiles, notice, legend, brush colours, gallery."""
        session = show.session_of(self.studio, request)
        return [*self._experts(session, values), fragments.gallery(session)]

    @show.friendly
    def choose(self, library: Any, values: Any, request: gr.Request) -> list[Any]:
        """Other experts."""
        session = show.session_of(self.studio, request)
        try:
            session.choose(tiles.active(tiles.read(library)))
        except MoLEError as error:
            gr.Warning(show.plain(error))
        return self._experts(session, values)

    @show.friendly
    async def draw(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        """Queue a picture and show how it comes along."""
        session = show.session_of(self.studio, request)
        wanted = self._request(values, session)
        mixtures = [wanted.mixture, "nla"] if values[-1] and wanted.mixture != "nla" else [wanted.mixture]
        work = compose(self.studio, session, wanted, mixtures)
        job = self.studio.submit(session, "compose", work)
        async for update in self._follow(session, job):
            yield update

    async def rejoin(self, request: gr.Request) -> AsyncIterator[Any]:
        """After a reload: show the drawing that is under way, or the last picture."""
        session = show.session_of(self.studio, request)
        if job := session.running("compose"):
            async for update in self._follow(session, job):
                yield update
        elif session.pictures:
            yield show.progress_bar(None), str(session.pictures[0].path), gr.skip(), gr.skip()
        else:
            yield show.progress_bar(None), gr.skip(), gr.skip(), gr.skip()

    def stop(self, request: gr.Request) -> None:
        """Cancel the drawing."""
        show.session_of(self.studio, request).cancel("compose")

    def paint_over(self, request: gr.Request) -> Any:
        """The last picture as the editor's background."""
        session = show.session_of(self.studio, request)
        if not session.pictures:
            gr.Info("There is no picture yet: draw one first.")
            return gr.skip()
        path = str(session.pictures[0].path)
        return {"background": path, "layers": [], "composite": path}

    def select(self, event: gr.SelectData, request: gr.Request) -> tuple[Any, str, Any]:
        """A picture of the gallery: its settings."""
        session = show.session_of(self.studio, request)
        if not 0 <= event.index < len(session.pictures):
            return None, "", gr.update(interactive=False)
        settings = session.pictures[event.index].settings
        return settings.to_json(), fragments.facts(settings), gr.update(interactive=True)

    @show.friendly
    def use_selected(self, text: str | None, request: gr.Request) -> list[Any]:
        """The settings of the selected picture into the controls."""
        if text is None:
            return [gr.skip()] * 13
        return self._fill(show.session_of(self.studio, request), PictureSettings.from_json(text))

    @show.friendly
    def use_dropped(self, path: str | None, request: gr.Request) -> list[Any]:
        """The settings of a picture that was dropped into the controls."""
        filled = [gr.skip()] * 13
        if path is not None:
            with show.warned():
                filled = self._fill(show.session_of(self.studio, request), read_settings(path))
        return [*filled, None]

    def _request(self, values: tuple[Any, ...], session: Session) -> ComposeRequest:
        prompt, negative, mixture, seed, steps, guidance, width, height, mix, canvas, _ = values
        shown = tiles.read(mix)
        return ComposeRequest(
            prompt=prompt or "",
            negative=negative or "",
            mixture=MIXTURES.get(mixture, "gates"),
            seed=int(seed or 0),
            steps=int(steps),
            guidance=float(guidance),
            width=int(width or 0),
            height=int(height or 0),
            active=tiles.active(shown),
            strengths={tile["name"]: tile["strength"] for tile in shown},
            regions=regions.read_regions(session, canvas),
        )

    async def _follow(self, session: Session, job: Job) -> AsyncIterator[Any]:
        preview = None
        async for bar in show.watch(self.studio, job):
            fresh = job.preview if job.preview is not preview and not job.finished else None
            preview = job.preview
            yield bar, gr.skip() if fresh is None else fresh, gr.skip(), gr.skip()
        if job.state == "done":
            paths = [str(picture.path) for picture in job.result]
            yield (
                show.progress_bar(None),
                paths[0],
                paths[1] if len(paths) > 1 else None,
                fragments.gallery(session),
            )
        else:
            yield show.progress_bar(job), gr.skip(), gr.skip(), fragments.gallery(session)
        show.raise_if_failed(job)

    def _experts(self, session: Session, values: Any) -> list[Any]:
        colours = [session.colour(name) for name in session.chosen] or ["#7a7268"]
        brush = gr.Brush(default_size=60, colors=colours, default_color=colours[0], color_mode="fixed")
        return [
            tiles.library_tiles(session),
            tiles.mixing_tiles(session, values),
            fragments.notice(session),
            fragments.legend(session),
            gr.update(brush=brush),
        ]

    def _fill(self, session: Session, settings: PictureSettings) -> list[Any]:
        missing = [use.name for use in settings.experts if use.name not in session.library]
        if settings.model != session.model:
            gr.Warning(markup.html("That picture was drawn with another model: {}.", settings.model))
        if missing:
            gr.Warning(markup.html("Not in your library: {}. Upload them in Models.", ", ".join(missing)))
        session.choose([use.name for use in settings.experts if use.name in session.library])
        before = [
            {"name": use.name, "on": use.active, "strength": use.strength}
            for use in settings.experts
            if use.name in session.chosen
        ]
        masks = {name: mask_from_text(text) for name, text in settings.regions.items()}
        words = {word: label for label, word in MIXTURES.items()}
        *experts, canvas = self._experts(session, before)
        return [
            settings.prompt,
            settings.negative,
            words.get(settings.mixture, "Gates"),
            settings.seed,
            settings.steps,
            settings.guidance,
            settings.width,
            settings.height,
            *experts,
            {**canvas, "value": regions.paint_regions(session, masks)},
        ]

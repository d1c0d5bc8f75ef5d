"""The layout of the Compose tab: prompt, experts as tiles, regions, settings, and the pictures."""

from __future__ import annotations

import gradio as gr

from mole_diffusion.app import regions, show, tiles
from mole_diffusion.app.composing import MAX_COUNT, MAX_SIDE, MAX_STEPS
from mole_diffusion.methods import METHODS
from mole_diffusion.pictures.samplers import SAMPLERS
from mole_diffusion.starter.location import GUIDANCE

#: What Compose offers; everything else that mixes experts is in Compare.
_MIXTURES = ("gates", "auto", "la", "nla", "none")
FIRST_PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"
_OWN_SAMPLER = "The model's own"
#: Shown name -> name, of the samplers.
SAMPLER_CHOICES = [(_OWN_SAMPLER, ""), *((name, name) for name in SAMPLERS)]
_REGION_HINT = (
    '<p class="hint">Choose an expert and paint where it counts; one without paint counts everywhere. Regions'
    " place no subjects: what stands there is up to prompt and seed.</p>"
)
_WORDS = """
<details class="words"><summary>What do the words mean?</summary><dl class="facts">
<dt>Expert</dt><dd>one LoRA; its phrase has the trigger word it was trained on</dd>
<dt>gates</dt><dd>small networks that decide, place by place and word by word, how much each expert counts;
they are trained for a set of experts and leave the LoRAs as they are</dd>
<dt>auto</dt><dd>gates without training: words go to their experts by the prompt, places by what looks at
those words; used until gates are trained for the set</dd>
<dt>LA</dt><dd>linear arithmetic: all experts added up in full</dd>
<dt>NLA</dt><dd>the same, each at an equal share (1/N)</dd>
<dt>base</dt><dd>the model without any expert</dd>
<dt>Region</dt><dd>where an expert counts; what stands there is still up to prompt and seed</dd>
<dt>Entropy</dt><dd>how undecided gates are: 0 where one counts alone, highest where all count equally</dd>
</dl></details>
"""


class ComposeLayout:
    """The tab's controls."""

    def lay_out(self) -> None:
        """Build them; inside the tab."""
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                self._build_prompt()
                self._build_experts()
                self._build_regions()
                self._build_settings()
            with gr.Column(scale=6, min_width=320):
                self._build_result()
                self._build_gallery()

    def _build_prompt(self) -> None:
        self.prompt = gr.Textbox(
            FIRST_PROMPT,
            label="Prompt",
            lines=2,
            max_lines=5,
            placeholder="What the picture shows",
            elem_id="prompt",
        )
        # What the browser's storage needs to be told, and tells.
        self.mark = gr.Textbox(visible=False)
        self.stamp = gr.Number(visible=False)
        self.brought = gr.Textbox(visible=False)
        with gr.Row(equal_height=True, elem_classes="phrases"):
            self.unnamed = gr.HTML(elem_id="unnamed")
            self.insert = gr.Button(
                "Insert the phrases",
                size="sm",
                elem_id="insert-phrases",
                visible=False,
                scale=0,
                min_width=150,
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
        gr.HTML(_WORDS, elem_classes="late")

    def _build_regions(self) -> None:
        with gr.Accordion(
            regions.title(), open=False, elem_id="regions-box", elem_classes="late"
        ) as self.regions_box:
            gr.HTML(_REGION_HINT)
            self.canvas = regions.sheet()
            with gr.Row():
                self.over = gr.Button("Paint over the last picture", size="sm", elem_id="paint-over")
                self.clear = gr.Button("Clear regions", size="sm", elem_id="clear-regions")

    def _build_settings(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings-box", elem_classes="late"):
            self.negative = gr.Textbox("", label="Negative prompt", lines=1, elem_id="negative")
            self.mixture = gr.Radio(
                [(METHODS[name].label, name) for name in _MIXTURES],
                value="gates",
                label="How experts are mixed",
                elem_id="mixture",
            )
            with gr.Row(equal_height=True):
                self.seed = gr.Number(
                    0,
                    label="Seed",
                    info="-1: a new one for every drawing",
                    precision=0,
                    minimum=-1,
                    maximum=2**32 - 1,
                    elem_id="seed",
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
            self._build_size()
            with gr.Row():
                self.count = gr.Slider(
                    1,
                    MAX_COUNT,
                    1,
                    step=1,
                    label="Pictures",
                    info="one seed after the other",
                    elem_id="count",
                )
                self.sampler = gr.Dropdown(SAMPLER_CHOICES, value="", label="Sampler", elem_id="sampler")
            self._build_begin()

    def _build_size(self) -> None:
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

    def _build_begin(self) -> None:
        with gr.Accordion("Begin from a picture", open=False, elem_id="begin-box"):
            self.image = gr.Image(
                label="Picture to begin from",
                type="pil",
                image_mode="RGB",
                sources=["upload"],
                height=220,
                elem_id="begin-from",
            )
            self.denoising = gr.Slider(
                0.05,
                1,
                0.6,
                step=0.05,
                label="How much of it is drawn anew",
                elem_id="denoising",
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
            allow_preview=False,
        )
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

"""How the app looks: colours, type and spacing; system fonts only, so that nothing comes from the network."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes

_STATIC = Path(__file__).with_name("static")
STYLE = _STATIC / "style.css"

_VERMILION = colors.Color(
    name="vermilion",
    c50="#fff4ef",
    c100="#ffe5da",
    c200="#fecab5",
    c300="#fba687",
    c400="#f57f58",
    c500="#e4572e",
    c600="#c8441e",
    c700="#a53719",
    c800="#832f19",
    c900="#6b2a19",
    c950="#3a130a",
)
_CLAY = colors.Color(
    name="clay",
    c50="#faf8f5",
    c100="#f3f0eb",
    c200="#e7e2da",
    c300="#d3ccc1",
    c400="#a59d91",
    c500="#7a7268",
    c600="#5b544c",
    c700="#433e38",
    c800="#2a2723",
    c900="#1d1b18",
    c950="#141210",
)


def static(name: str) -> str:
    """A component's program or template, for `gr.HTML`; values that were put into it would be part of it."""
    return (_STATIC / name).read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Warm paper with vermilion; charcoal in the dark."""
    made = gr.themes.Base(
        primary_hue=_VERMILION,
        secondary_hue=_VERMILION,
        neutral_hue=_CLAY,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_lg,
        # The stacks are in style.css: Gradio puts names such as system-ui in quotes, where they mean nothing.
        font=fonts.Font("sans-serif"),
        font_mono=fonts.Font("monospace"),
    )
    return made.set(
        body_background_fill="*neutral_100",
        body_background_fill_dark="*neutral_950",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_950",
        block_background_fill="#ffffff",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="0 1px 2px rgba(40, 30, 20, 0.04)",
        block_shadow_dark="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_text_weight="600",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_400",
        input_border_color_focus_dark="*primary_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="*neutral_200",
        button_secondary_background_fill_hover="*neutral_300",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_large_radius="*radius_lg",
        slider_color="*primary_500",
        color_accent="*primary_500",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*neutral_800",
    )

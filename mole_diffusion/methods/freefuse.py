"""FreeFuse's form: each LoRA acts in full, and only where cross-attention sees its words.

arXiv 2510.23515. Theirs watches one layer for ten steps, votes over superpixels, and begins
the picture anew with the masks; here the masks are the places of `mixture="auto"` without anything in between
them, and the picture goes on. What is compared is the form: hard masks over the whole picture, every LoRA at
1, and in the text encoder as in the denoiser.
"""

from __future__ import annotations

from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.choosing import register

FREEFUSE = "freefuse"
#: Softmax of such sharpness is the highest alone.
_HARD = 1e4

# All that `AutoSettings` has, so that other defaults there do not change this form.
MIXTURE = AutoMixture(
    AutoSettings(
        words=1.0,
        sharpness=_HARD,
        strength=1.0,
        detail=1.0,
        until=0.8,
        floor=0.0,
        style=1.0,
        style_inside=1.0,
        style_words=1.0,
        style_text=1.0,
        balance=0.0,
    )
)

register(FREEFUSE, MIXTURE)

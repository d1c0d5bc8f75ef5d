"""Denoisers out of pipelines of diffusers."""

from __future__ import annotations

from typing import Any

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.modules import unwrapped
from mole_diffusion.pictures.denoisers.anima import AnimaDenoiser
from mole_diffusion.pictures.denoisers.diffusion import DiffusionDenoiser
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser
from mole_diffusion.pictures.denoisers.flux import ChromaDenoiser, FluxDenoiser
from mole_diffusion.pictures.denoisers.flux2 import Flux2Denoiser
from mole_diffusion.pictures.denoisers.krea2 import Krea2Denoiser
from mole_diffusion.pictures.denoisers.qwen_image import QwenImageDenoiser
from mole_diffusion.pictures.denoisers.sd3 import SD3Denoiser
from mole_diffusion.pictures.denoisers.z_image import ZImageDenoiser

# Class of a pipeline's transformer -> its family.
_FAMILIES: dict[str, type[FlowDenoiser]] = {
    "FluxTransformer2DModel": FluxDenoiser,
    "ChromaTransformer2DModel": ChromaDenoiser,
    "CosmosTransformer3DModel": AnimaDenoiser,
    "Flux2Transformer2DModel": Flux2Denoiser,
    "Krea2Transformer2DModel": Krea2Denoiser,
    "QwenImageTransformer2DModel": QwenImageDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "ZImageTransformer2DModel": ZImageDenoiser,
}


def denoiser_of(pipe: Any, size: tuple[int, int] | None = None) -> DiffusionDenoiser | FlowDenoiser:
    """A pipeline of diffusers as a denoiser; reads whatever the pipeline holds at the time.

    Args:
        pipe: the pipeline.
        size: height and width of its pictures in pixels; None for its own.

    Raises:
        TrainingError: its transformer is of no family known here.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return DiffusionDenoiser(pipe, size)
    name = type(unwrapped(transformer)).__name__
    if name not in _FAMILIES:
        raise TrainingError(f"{name} is not known as a denoiser; known are {', '.join(_FAMILIES)}")
    return _FAMILIES[name](pipe, size)


def own_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a pipeline draws when nobody says otherwise."""
    return denoiser_of(pipe).picture_size

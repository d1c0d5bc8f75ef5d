"""Denoisers out of pipelines of diffusers."""

from __future__ import annotations

from typing import Any

from mole_diffusion.pictures.denoisers.diffusion import DiffusionDenoiser


def denoiser_of(pipe: Any, size: tuple[int, int] | None = None) -> DiffusionDenoiser:
    """A pipeline of diffusers as a denoiser; reads whatever the pipeline holds at the time.

    Args:
        pipe: the pipeline.
        size: height and width of its pictures in pixels; None for its own.
    """
    return DiffusionDenoiser(pipe, size)


def own_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a pipeline draws when nobody says otherwise."""
    return denoiser_of(pipe).picture_size

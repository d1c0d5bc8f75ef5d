"""Denoisers out of pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def before_each_pass(pipe: Any, look: Callable[[], object]) -> Iterator[None]:
    """Call something before every forward of a pipeline's denoising network, inside the `with` block.

    What it raises ends the work: this is how long work is cancelled.
    """
    handle = denoiser_of(pipe).network.register_forward_pre_hook(lambda *_: _nothing(look()))
    try:
        yield
    finally:
        handle.remove()


def _nothing(_: object) -> None:
    """A hook that returns something would change the input."""

"""ComfyUI nodes: several LoRA experts in one picture, mixed by gates, on ComfyUI's own MODEL and CLIP."""

from __future__ import annotations

from ._core import provide_core

provide_core()

from .extension import comfy_entrypoint  # noqa: E402 - the core must be found first

#: Where ComfyUI finds what belongs into the browser.
WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

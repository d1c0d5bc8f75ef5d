"""Makes a clone of this repository a ComfyUI node pack: ComfyUI imports custom_nodes/NAME/__init__.py.

The Python package is `mole_diffusion`; this file is no part of it.
"""

from typing import Any

#: Where ComfyUI finds what belongs into the browser.
WEB_DIRECTORY = "./comfy_nodes/web"


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI. Nothing is imported before: test runners and builders come by here too."""
    from .comfy_nodes import comfy_entrypoint as entrypoint

    return await entrypoint()

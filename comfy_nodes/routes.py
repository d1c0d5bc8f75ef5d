"""What the nodes' front end asks the server for: what is in the files that a node names, before it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from mole_diffusion.core.errors import MoLEError
from mole_diffusion.core.experts import named_triggers
from mole_diffusion.core.reading import BadFileError, read_header

from . import places
from .experts import GatesFile


def register() -> None:
    """Offer the routes; does nothing without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for name, describe in (("expert", describe_expert), ("gates", describe_gates)):
        server.routes.get(f"/mole/{name}")(_route(describe))


def describe_expert(choice: str) -> dict[str, Any]:
    """Trigger words of a LoRA file of `places.expert_choices`."""
    return {"triggers": list(named_triggers(read_header(places.expert_file(choice)).metadata))}


def describe_gates(choice: str) -> dict[str, Any]:
    """Experts of a gates file of `places.gates_choices`, and whether its training was finished.

    Shared gates are for any experts: None.
    """
    file = GatesFile(places.gates_file(choice))
    names = dict.fromkeys(name for own in file.expert_names.values() for name in own)
    return {"experts": None if file.shared else list(names), "unfinished": file.unfinished}


def _route(describe: Callable[[str], dict[str, Any]]) -> Callable[[web.Request], Any]:
    async def answer(request: web.Request) -> web.Response:
        try:
            found = await asyncio.to_thread(describe, request.query.get("choice", ""))
        except (MoLEError, BadFileError, OSError) as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.json_response(found)

    return answer

"""Lines of text under a node while and after it runs."""

from __future__ import annotations

from server import PromptServer


def show_text(node: str | None, text: str) -> None:
    """Show a text under the node with this id; does nothing without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node is not None:
        server.send_progress_text(text, node)

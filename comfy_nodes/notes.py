"""Lines of text under a node while and after it runs."""

from __future__ import annotations

from html import escape

from server import PromptServer


def show_text(node: str | None, text: str) -> None:
    """Show a text under the node with this id; does nothing without a server.

    The front end takes what it is sent for HTML, and names and trigger words come out of strangers' files:
    this is the one place where they are made plain text.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and node is not None:
        server.send_progress_text(escape(text), node)

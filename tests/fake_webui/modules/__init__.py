"""Replays the order in which AUTOMATIC1111 and Forge call extensions, and nothing else of them."""

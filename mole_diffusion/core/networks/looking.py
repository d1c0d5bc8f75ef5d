"""Where a network's image tokens look at its text, behind norms and rotations of queries and keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .base import Looking, Site


@dataclass(frozen=True)
class Looks:
    """What a row of blocks has of it.

    Attributes:
        queries: the leaf that makes the image tokens' queries.
        apart: whether the layer attends to the text alone; else to image and text in one sequence, in which
            the text is rewritten too.
    """

    queries: str
    apart: bool = False


def looking(rows: Iterable[tuple[str, Looks | None]], sites: Sequence[Site]) -> Looking | None:
    """See `Architecture.looking`, for rows of blocks.

    Args:
        rows: path of each row of blocks, and what it has.
        sites: of a network.
    """
    known = {path: looks for path, looks in rows if looks is not None}
    modules: dict[str, bool] = {}
    for site in sites:
        # "ROW.NUMBER" with the leaf behind it; what is outside of blocks has no row.
        looks = known.get(site.block.rpartition(".")[0])
        if looks is None or site.name != f"{site.block}.{looks.queries}":
            continue
        # Hosts compute joint attention in the block itself, and have no module for it.
        path = site.layer_path if looks.apart else site.block_path
        if path is not None:
            modules[path] = looks.apart
    if not modules:
        return None
    return Looking(tuple(modules), rewrites=not all(modules.values()))

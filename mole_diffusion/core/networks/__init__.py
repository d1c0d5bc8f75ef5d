"""What networks experts can be attached to: one file each, and the registry that everything else asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..errors import InjectionError
from .anima import ANIMA_STACK
from .base import DENOISER, Architecture, NetworkMap
from .clip import CLIP
from .families import header_name, named_family
from .flux import FLUX
from .flux2 import FLUX2_STACK
from .foreign import foreign_family
from .krea2 import KREA2_STACK
from .qwen_image import QWEN_IMAGE_STACK
from .sd3 import SD3
from .t5 import T5_DECODER, T5_ENCODER
from .unet import UNet
from .z_image import Z_IMAGE_STACK

_REGISTERED: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Let networks of one more kind be recognised, and their names be read in files.

    Raises:
        ValueError: another architecture has the name.
    """
    if _REGISTERED.get(architecture.name, architecture) is not architecture:
        raise ValueError(f"an architecture named {architecture.name!r} is registered already")
    _REGISTERED[architecture.name] = architecture


def unregister(name: str) -> None:
    """Forget an architecture; one that is not registered does no harm."""
    _REGISTERED.pop(name, None)


def architectures() -> tuple[Architecture, ...]:
    """All, in the order in which they are asked."""
    return tuple(_REGISTERED.values())


def by_name(name: str) -> Architecture | None:
    """A registered architecture; None if there is none of this name."""
    return _REGISTERED.get(name)


def find_network(network: nn.Module, part: str | None = None) -> NetworkMap | None:
    """As `map_network`; None for a network of no known kind."""
    for architecture in architectures():
        sites = architecture.sites(network)
        if sites:
            return NetworkMap(architecture, part or architecture.slots[0], sites)
    return None


def map_network(network: nn.Module, part: str | None = None) -> NetworkMap:
    """Find out what a network is, and its matrices.

    Args:
        network: of any registered kind.
        part: what the host calls it; None for the usual name of its kind.
    Raises:
        InjectionError: it is of no known kind.
    """
    found = find_network(network, part)
    if found is not None:
        return found
    kinds = " or ".join(architecture.name for architecture in architectures())
    examples = ", ".join(repr(architecture.example) for architecture in architectures())
    raise InjectionError(
        f"{type(network).__name__} has no matrices of a known {kinds}; looked for names such as {examples}."
    )


def of_matrices(matrices: Iterable[str]) -> Architecture | None:
    """The architecture that has most of these canonical names; None if none has any."""
    names = list(matrices)
    counts = {one.name: sum(one.write(name, "") != "" for name in names) for one in architectures()}
    best = max(counts, key=lambda name: counts[name], default="")
    return by_name(best) if counts.get(best) else None


def readers(flat: str) -> Iterator[tuple[Architecture, str, str]]:
    """Who may know a name in a file: (architecture, slot, name without the slot's prefix).

    The longest prefix counts. A name without any is offered to all.
    """
    found = [
        (len(prefix), architecture, slot)
        for architecture in architectures()
        for slot, prefixes in architecture.prefixes.items()
        for prefix in prefixes
        if flat.startswith(prefix)
    ]
    longest = max((length for length, _, _ in found), default=0)
    for length, architecture, slot in found:
        if length == longest:
            yield architecture, slot, flat[length:]
    if not found:
        for architecture in architectures():
            yield architecture, architecture.slots[0], flat


def known_families() -> tuple[str, ...]:
    """The base models whose denoisers experts can be attached to."""
    known = [family for one in architectures() if one.role == DENOISER for family in one.families]
    return tuple(dict.fromkeys(known))


def other_base(strangers: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The base that a file is for if it is of no kind known here, and what tells; else None.

    Args:
        strangers: names in the file, with "_" for ".", that no architecture reads.
        metadata: the file's header.
    """
    names = list(strangers)
    family, header = foreign_family(names), header_name(metadata)
    if family is not None:
        told = f"its header says {header!r}" if header else "told by the names of its matrices"
        return f"{family} ({told})"
    named = named_family(metadata)
    if not names or named is None or named in known_families():
        return None
    return f"{named} (its header says {header!r})"


for _architecture in (
    UNet(),
    CLIP,
    FLUX,
    FLUX2_STACK,
    SD3,
    QWEN_IMAGE_STACK,
    KREA2_STACK,
    ANIMA_STACK,
    Z_IMAGE_STACK,
    T5_ENCODER,
    T5_DECODER,
):
    register(_architecture)

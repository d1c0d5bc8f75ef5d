"""Grids of image tokens where squares of a latent's pixels are one token, most often two by two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ConfigError
from ..torch_state import is_compiling
from .base import CONTEXT


def patched_grid(size: Sequence[int], patch: int = 2) -> tuple[int, int]:
    """(height, width) in tokens of a latent, whose sides are padded to whole patches."""
    height, width = size
    return -(-height // patch), -(-width // patch)


def grid_of(grid: tuple[int, int]) -> Callable[[int], tuple[int, int] | None]:
    """The `Forward.grid` of networks with one grid alone."""
    return lambda tokens: grid if tokens == grid[0] * grid[1] else None


def counting(
    tokens_of_a_text: int, patch: int = 2
) -> Callable[[nn.Module, str, tuple[int, int] | int | None], int]:
    """The `counter` of a network that reads texts and patched latents, for pooling "flatten".

    Args:
        tokens_of_a_text: as pipelines pad it.
        patch: side of the square that is one token.
    """

    def count(network: nn.Module, stream: str, given: tuple[int, int] | int | None) -> int:
        if stream == CONTEXT:
            return tokens_of_a_text
        if not isinstance(given, (tuple, list)):
            raise ConfigError(
                "pooling='flatten' needs the latent's size: pass flatten_tokens=(height, width)."
            )
        rows, columns = patched_grid(given, patch)
        return rows * columns

    return count


def any_length(
    family: str, multiple: int = 1
) -> Callable[[nn.Module, str, tuple[int, int] | int | None], int]:
    """The `counter` of a network whose texts are as long as they are: the image alone has a fixed size.

    Args:
        family: its name.
        multiple: the image is padded to a multiple of so many tokens.
    """
    of_the_image = counting(0)

    def count(network: nn.Module, stream: str, given: tuple[int, int] | int | None) -> int:
        if stream == CONTEXT:
            raise ConfigError(
                f"pooling='flatten' needs texts of one length, and those of {family} are as long as they "
                "are; use pooling='token' or 'mean'."
            )
        tokens = of_the_image(network, stream, given)
        return tokens + -tokens % multiple

    return count


# Places of tokens -> what is below.
_pictures: Any = WeakTensorKeyDictionary()


def picture_of(places: Tensor, start: int = 0) -> tuple[int, tuple[int, int] | None]:
    """`packed_tokens` of the places from one on, asked once for all steps: the answer is on the device.

    Compiled networks ask nobody: all tokens are of the picture, and their grid is not known.
    """
    if is_compiling():
        return places.shape[-2] - start, None
    found: tuple[int, tuple[int, int] | None] | None = _pictures.get(places)
    if found is None:
        found = _pictures[places] = packed_tokens(places[..., start:, :])
    return found


def packed_tokens(ids: Tensor) -> tuple[int, tuple[int, int] | None]:
    """Tokens of the picture that is drawn, and their grid, told by the places of all tokens.

    Args:
        ids: (L, axes) or (B, L, axes): number of the picture, row, column.
    Returns:
        Number of tokens at the beginning that have the number of the first, and (height, width) if they are
        the places of a whole grid, row by row; else None.
    """
    places = (ids[0] if ids.dim() == 3 else ids).round().long().cpu()
    same = places[:, 0] == places[0, 0]
    count = len(same) if bool(same.all()) else int((~same).long().argmax())
    rows, columns = (places[:count, axis] - places[0, axis] for axis in (1, 2))
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    numbers = rows * width + columns
    whole = height * width == count and bool((numbers == numbers.new_tensor(range(count))).all())
    return count, (height, width) if whole else None

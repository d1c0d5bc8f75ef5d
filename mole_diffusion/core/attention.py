"""Reading cross-attention: how much each image token looks at the words of each expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modules import base_layer
from .networks.base import Site
from .torch_state import without_autocast

#: Number of image tokens -> their (height, width).
Grid = Callable[[int], tuple[int, int]]


class AttentionMaps:
    """Watches the queries and keys of cross-attention layers and keeps what their words are looked at with.

    Only where it is asked to, in the forwards that it is asked to; the layers compute as ever.

    Args:
        network: the network.
        layers: the matrices of queries and of keys, layer by layer.
    """

    def __init__(self, network: nn.Module, layers: Sequence[tuple[Site, Site]]) -> None:
        self._words: Tensor | None = None
        self._grid: Grid | None = None
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._maps: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._network, self._layers = network, layers

    def attach(self) -> None:
        """Put the hooks on; doing it twice does no harm."""
        for index, sites in enumerate(() if self._handles else self._layers):
            holder = self._network.get_submodule(sites[0].path.rpartition(".")[0])
            heads = int(getattr(holder, "heads", 1))
            for site, kept in zip(sites, (self._queries, self._keys), strict=True):
                module = base_layer(self._network.get_submodule(site.path))
                watch = self._watcher(index, site.rows, kept, heads)
                self._handles.append(module.register_forward_hook(watch))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, words: Tensor | None, grid: Grid | None) -> None:
        """A forward begins.

        Args:
            words: (B, L, N) whose words the tokens of the texts are; None to read nothing.
            grid: of the image tokens.
        """
        if words is not None:
            self.attach()
        self._words, self._grid = words, grid
        self._queries.clear()
        self._keys.clear()
        self._maps = []

    def taken(self) -> Tensor | None:
        """(B, N, H, W) mean over the layers of the last forward on their finest grid; None if nothing was."""
        maps, self._maps = self._maps, []
        if not maps:
            return None
        finest = max((one.shape[-2:] for one in maps), key=lambda size: size[0] * size[1])
        resized = [F.interpolate(one, size=finest, mode="bilinear", align_corners=False) for one in maps]
        return torch.stack(resized).mean(0)

    def _watcher(
        self, index: int, rows: slice | None, kept: dict[int, Tensor], heads: int
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._words is None:
                return
            kept[index] = output if rows is None else output[..., rows]
            if index in self._queries and index in self._keys:
                self._read(self._queries.pop(index), self._keys.pop(index), heads)

        return watch

    @torch.no_grad()
    def _read(self, queries: Tensor, keys: Tensor, heads: int) -> None:
        """Add the map of one layer: queries (B, T, d), keys (B, L, d)."""
        words, grid = self._words, self._grid
        if words is None or grid is None or keys.shape[:2] != words.shape[:2]:
            return
        height, width = grid(queries.shape[1])
        batch = queries.shape[0]
        with without_autocast(queries.device):
            q, k = (
                one.float().view(batch, one.shape[1], heads, -1).transpose(1, 2) for one in (queries, keys)
            )
            looks = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1).mean(1)
            share = looks @ words / words.sum(1, keepdim=True).clamp_min(1.0)
        self._maps.append(share.transpose(1, 2).reshape(batch, -1, height, width))

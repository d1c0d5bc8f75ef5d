"""Reading cross-attention: how much each image token looks at the words of each expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modules import base_layer
from .networks.base import Forward, Site
from .torch_state import without_autocast


class Watcher(Protocol):
    """Reads how a denoiser's image tokens look at words."""

    def begin(self, words: Tensor | None, forward: Forward) -> None:
        """A forward begins; see `AttentionMaps` and `SeenAttention`."""

    def taken(self) -> Tensor | None:
        """(B, N, H, W) of the last forward; None if nothing was seen."""

    def remove(self) -> None:
        """Take what watches off the network."""


@dataclass(eq=False)
class _Layer:
    """One cross-attention layer in the current forward.

    Attributes:
        heads: number of heads.
        queries, keys: as they were computed, until both are there.
        seen: (B, N, H, W) how much each image token looks at the words of each expert.
    """

    heads: int
    queries: Tensor | None = None
    keys: Tensor | None = None
    seen: Tensor | None = None


class AttentionMaps:
    """Watches the queries and keys of cross-attention layers and keeps what their words are looked at with.

    Only where it is asked to, in the forwards that it is asked to; the layers compute as ever.

    Args:
        network: the network.
        layers: the matrices of queries and of keys, layer by layer.
    """

    def __init__(self, network: nn.Module, layers: Sequence[tuple[Site, Site]]) -> None:
        self._words: Tensor | None = None
        self._forward = Forward()
        self._network, self._sites = network, layers
        self._layers: list[_Layer] = []
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on; doing it twice does no harm."""
        for queries, keys in () if self._handles else self._sites:
            holder = self._network.get_submodule(queries.path.rpartition(".")[0])
            # Each layer has its own place, so that equal blocks compile to one graph, see `Voice`.
            layer = _Layer(int(getattr(holder, "heads", 1)))
            self._layers.append(layer)
            for site in (queries, keys):
                module = base_layer(self._network.get_submodule(site.path))
                watch = self._watcher(layer, site.rows, queries=site is queries)
                self._handles.append(module.register_forward_hook(watch))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.clear()

    def begin(self, words: Tensor | None, forward: Forward) -> None:
        """A forward begins.

        Args:
            words: (B, L, N) whose words the tokens of the texts are; None to read nothing.
            forward: what its inputs say.
        """
        if words is not None:
            self.attach()
        self._words, self._forward = words, forward
        for layer in self._layers:
            layer.queries = layer.keys = layer.seen = None

    def taken(self) -> Tensor | None:
        """(B, N, H, W) mean over the layers of the last forward on their finest grid; None if nothing was."""
        maps = [layer.seen for layer in self._layers if layer.seen is not None]
        for layer in self._layers:
            layer.seen = None
        if not maps:
            return None
        finest = max((one.shape[-2:] for one in maps), key=lambda size: size[0] * size[1])
        resized = [F.interpolate(one, size=finest, mode="bilinear", align_corners=False) for one in maps]
        return torch.stack(resized).mean(0)

    def _watcher(
        self, layer: _Layer, rows: slice | None, *, queries: bool
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._words is None:
                return
            own = output if rows is None else output[..., rows]
            if queries:
                layer.queries = own
            else:
                layer.keys = own
            if layer.queries is not None and layer.keys is not None:
                layer.seen = self._read(layer.queries, layer.keys, layer.heads)
                layer.queries = layer.keys = None

        return watch

    @torch.no_grad()
    def _read(self, queries: Tensor, keys: Tensor, heads: int) -> Tensor | None:
        """The map of one layer: queries (B, T, d), keys (B, L, d); None where the keys are no words."""
        words, grid = self._words, self._forward.grid
        size = None if grid is None else grid(queries.shape[1])
        if words is None or size is None or keys.shape[:2] != words.shape[:2]:
            return None
        batch = queries.shape[0]
        with without_autocast(queries.device):
            q, k = (
                one.float().view(batch, one.shape[1], heads, -1).transpose(1, 2) for one in (queries, keys)
            )
            looks = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1).mean(1)
            share = looks @ words / words.sum(1, keepdim=True).clamp_min(1.0)
        return share.transpose(1, 2).reshape(batch, -1, *size)

"""Reading attention where queries and keys are changed behind their matrices: at torch's own function.

Norms and rotations stand between the matrices of a transformer and its attention, and each family has its
own. So what is read is what the network gives to `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .networks.base import CONTEXT, TOKENS, Forward, Looking
from .torch_state import eager, is_compiling, without_autocast

# Of a network's layers, so many are read, from this part of its depth to that: the first ones know little of
# what will be where, and reading costs as much as half of a layer's attention.
_LAYERS = 4
_FROM, _TO = 0.3, 0.6
# Attention is computed for so many numbers at a time.
_NUMBERS = 2**26

# How many layers are inside a forward that is read.
_reading: ContextVar[int] = ContextVar("reading", default=0)

#: Told of queries (B, H, T, d), keys (B, H, L, d) and the other arguments of attention.
Told = Callable[[Tensor, Tensor, Mapping[str, Any]], None]


def is_reading() -> bool:
    """Whether attention that is computed now is read: hosts with functions of their own take torch's then."""
    return _reading.get() > 0


class _Watching(TorchFunctionMode):
    """Tells of every attention of torch that is computed while it is entered."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._told(given["query"], given["key"], given)
        return func(*args, **kwargs)


class SeenAttention:
    """Watches some layers in the forwards that it is asked to, and keeps what the texts' words are looked at
    with; the layers compute as ever, and nothing is on the network between such forwards.

    Blocks that are compiled one by one run as they were written for that long.

    Args:
        network: the network.
        looking: where its image tokens look at text.
    """

    def __init__(self, network: nn.Module, looking: Looking) -> None:
        self._network = network
        self._modules = middle(looking.modules)
        self._handles: list[RemovableHandle] = []
        self._inside: list[_Watching] = []
        self._around = ExitStack()
        self._words: Tensor | None = None
        self._forward = Forward()
        self._seen: list[Tensor] = []

    def begin(self, words: Tensor | None, forward: Forward) -> None:
        """A forward begins.

        Args:
            words: (B, L, N) whose words the tokens of the texts are; None to read nothing.
            forward: what its inputs say.
        """
        self.remove()
        self._seen.clear()
        if words is None or is_compiling():
            return
        self._words, self._forward = words, forward
        self._around.enter_context(eager())
        for path in self._modules:
            module = self._network.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(self._network.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Take everything off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._inside:
            self._leave()
        self._around.close()
        self._words = None

    def taken(self) -> Tensor | None:
        """(B, N, H, W) mean over the layers of the last forward; None if nothing was seen."""
        maps = torch.stack(self._seen).mean(0) if self._seen else None
        self._seen.clear()
        return maps

    def told(self, queries: Tensor, keys: Tensor, given: Mapping[str, Any]) -> None:
        """A layer attends.

        Args:
            queries: (B, H, T, d).
            keys: (B, H or fewer, L, d).
            given: "attn_mask" and "scale" as torch knows them.
        """
        if self._words is None or not isinstance(queries, Tensor) or queries.dim() != 4:
            return
        found = self._places(queries.shape[-2], keys.shape[-2])
        if found is not None and queries.shape[0] == keys.shape[0] == self._words.shape[0]:
            seen = looked_at(queries, keys, self._words, *found, given)
            grid = self._grid(found[0].stop - found[0].start)
            self._seen.append(seen.transpose(1, 2).reshape(len(seen), -1, *grid))

    def _places(self, queries: int, keys: int) -> tuple[slice, slice] | None:
        """Where the picture lies among the queries and the text among the keys; None if they do not."""
        assert self._words is not None
        spans, text = self._forward.spans, self._words.shape[1]
        if spans and queries == keys == sum(one.stop - one.start for one in spans.values()):
            start, words = spans[TOKENS].start, spans[CONTEXT].start
            image = slice(start, spans[TOKENS].stop - self._forward.references)
        elif not spans and keys == text:
            image, words = slice(0, queries), 0
        else:
            return None
        known = self._grid(image.stop - image.start) is not None
        return (image, slice(words, words + text)) if known else None

    def _grid(self, tokens: int) -> Any:
        return None if self._forward.grid is None else self._forward.grid(tokens)

    def _enter(self, *_: Any) -> None:
        mode = _Watching(self.told)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._inside.append(mode)
        _reading.set(_reading.get() + 1)

    def _leave(self, *_: Any) -> None:
        if self._inside:
            self._inside.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _reading.set(_reading.get() - 1)

    def _end(self, *_: Any) -> None:
        self.remove()


def middle(modules: Sequence[str]) -> tuple[str, ...]:
    """Those of a network's layers that are read: all of a few, else some in the middle."""
    if len(modules) <= _LAYERS:
        return tuple(modules)
    first, last = _FROM * len(modules), _TO * len(modules)
    step = (last - first) / (_LAYERS - 1)
    return tuple(modules[one] for one in sorted({int(first + step * index) for index in range(_LAYERS)}))


@torch.no_grad()
def looked_at(
    queries: Tensor, keys: Tensor, words: Tensor, image: slice, text: slice, given: Mapping[str, Any]
) -> Tensor:
    """How much image tokens look at words: attention, mean over heads and over each expert's words.

    Rows whose words are nobody's are left out.

    Args:
        queries: (B, H, T, d).
        keys: (B, H or fewer, L, d).
        words: (B, W, N) whose words the text's tokens are.
        image: where the image tokens lie among the queries.
        text: where the text lies among the keys.
        given: "attn_mask" and "scale" of `scaled_dot_product_attention`.
    Returns:
        (B, number of image tokens, N) float32.
    """
    batch, heads, _, width = queries.shape
    scale = given.get("scale") or 1 / math.sqrt(width)
    mask = _mask(given.get("attn_mask"), queries, keys)
    found = words.new_zeros(batch, image.stop - image.start, words.shape[-1], dtype=torch.float32)
    with without_autocast(queries.device):
        for row in words.flatten(1).any(1).nonzero().flatten().tolist():
            k = keys[row].float().repeat_interleave(heads // keys.shape[1], dim=0).transpose(-1, -2)
            own = words[row].float() / words[row].sum(0).clamp_min(1.0)
            step = max(_NUMBERS // (heads * k.shape[-1]), 1)
            for start in range(image.start, image.stop, step):
                rows = slice(start, min(start + step, image.stop))
                scores = (queries[row, :, rows].float() @ k) * scale
                if mask is not None:
                    scores = scores + mask[row, :, rows].float()
                looks = torch.softmax(scores, dim=-1)[..., text].mean(0)
                found[row, rows.start - image.start : rows.stop - image.start] = looks @ own
    return found


def _mask(mask: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor | None:
    """(B, H or 1, T, L) what is added to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask.expand(queries.shape[0], mask.shape[1], queries.shape[-2], keys.shape[-2])

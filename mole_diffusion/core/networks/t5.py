"""T5 and its relatives (T5 1.1, Flan, mT5): a stack that reads a text, and one that writes.

Each `T5Stack` is a network of its own, since generation runs the encoder alone and the decoder once per
token. Names of matrices in files have the stack's name in front, as in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .base import CONTEXT, LANGUAGE, TOKENS, Forward, Site
from .stacks import Blocks, Leaf, Stack

#: What hosts, and gates files, call the two stacks.
READER, WRITER = "encoder", "decoder"
_CROSS = ".EncDecAttention."


def _leaves(*, writes: bool) -> tuple[Leaf, ...]:
    """The matrices of a block in execution order."""
    own = "layer.0.SelfAttention"
    leaves = [Leaf(f"{own}.{x}", source=own, layer="layer.0") for x in "qkv"] + [
        Leaf(f"{own}.o", layer="layer.0")
    ]
    if writes:
        cross = "layer.1.EncDecAttention"
        # Keys and values of the text that was read are made in the first step and kept.
        leaves += [
            Leaf(f"{cross}.q", layer="layer.1"),
            Leaf(f"{cross}.k", CONTEXT, cross, "layer.1"),
            Leaf(f"{cross}.v", CONTEXT, cross, "layer.1"),
            Leaf(f"{cross}.o", layer="layer.1"),
        ]
    layer = f"layer.{2 if writes else 1}"
    feed = f"{layer}.DenseReluDense"
    # Gated ones have wi_0 and wi_1, the first T5 has wi.
    leaves += [Leaf(f"{feed}.{x}", source=feed, layer=layer) for x in ("wi", "wi_0", "wi_1")]
    return (*leaves, Leaf(f"{feed}.wo", layer=layer))


@dataclass(frozen=True, eq=False)
class _T5Stack(Stack):
    """One of the two stacks; they look alike but for the attention to what was read."""

    def sites(self, network: nn.Module) -> tuple[Site, ...]:
        """See `Architecture`: none of a whole model, whose stacks run apart."""
        paths = [name for name, _ in network.named_modules()]
        writes = any(_CROSS in path for path in paths)
        whole = writes and any(path.startswith(f"{READER}.") for path in paths)
        if whole or writes != (self.slots[0] == WRITER):
            return ()
        return tuple(
            replace(site, layer_path=f"{site.block_path}{site.layer.removeprefix(site.block)}")
            for site in super().sites(network)
        )

    def prefix(self, slot: str, dialect: str, *, several: bool) -> str:
        """See `Architecture`: names of matrices have the stack's name in them."""
        if dialect == "kohya":
            raise ConfigError(
                "kohya has no names for the matrices of a language model; use 'diffusers' (PEFT)."
            )
        return ""


def _text(value: Any) -> Tensor | None:
    """(B, L) mask of a text."""
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _read(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """(token ids (B, L), attention mask (B, L) or None, ...)."""
    mask = _text(args[1] if len(args) > 1 else kwargs.get("attention_mask"))
    return Forward(masks={} if mask is None else {TOKENS: mask})


def _write(args: tuple[Any, ...], kwargs: Mapping[str, Any], given: tuple[int, int] | None) -> Forward:
    """(token ids (B, T), mask of all tokens so far, the encoder's states (B, L, d), their mask, ...)."""
    named = dict(
        zip(
            ("input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
            args,
            strict=False,
        )
    ) | dict(kwargs)
    masks = {}
    tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
    own, read = _text(named.get("attention_mask")), _text(named.get("encoder_attention_mask"))
    if own is not None and isinstance(tokens, Tensor) and own.shape[1] >= tokens.shape[1]:
        masks[TOKENS] = own[:, -tokens.shape[1] :]
    if read is not None:
        masks[CONTEXT] = read
    kept = any(named.get(name) is not None for name in ("past_key_values", "cache")) or bool(
        named.get("use_cache")
    )
    return Forward(masks=masks, memory=named.get("encoder_hidden_states"), keeps=kept)


def _count(network: nn.Module, stream: str, given: tuple[int, int] | int | None) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ConfigError(
            f"flatten_tokens={given!r} is not allowed for a text of any length; give the one number of "
            "tokens that every text is padded to, or use pooling='mean' or 'token'."
        )
    return given


T5_ENCODER = _T5Stack(
    name="t5-encoder",
    role=LANGUAGE,
    slots=(READER,),
    prefixes={},
    blocks=(Blocks("encoder.block", _leaves(writes=False), also=("block",)),),
    inputs=_read,
    counter=_count,
)
T5_DECODER = _T5Stack(
    name="t5-decoder",
    role=LANGUAGE,
    slots=(WRITER,),
    prefixes={},
    blocks=(Blocks("decoder.block", _leaves(writes=True), also=("block",)),),
    inputs=_write,
    counter=_count,
    causal=True,
)

"""What the end of a LoRA file's key says: which tensor of its matrix it is, whatever the matrix is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

_ADAPTER = r"(?:\.[^.]+)?"
_ROLES = (
    (
        "down",
        rf"\.lora_A{_ADAPTER}\.weight|\.lora_A|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    ),
    ("up", rf"\.lora_B{_ADAPTER}\.weight|\.lora_B|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"),
    ("down", r"\.lora_down\.weight"),
    # XLabs' processors.
    ("down", r"(?<=_lora[12])\.down\.weight"),
    ("up", r"(?<=_lora[12])\.up\.weight"),
    ("up", r"\.lora_up\.weight"),
    ("mid", r"\.lora_mid\.weight"),
    ("up_bias", rf"\.lora_B{_ADAPTER}\.bias|\.(?:lora_up|lora\.up)\.bias"),
    ("alpha", r"\.alpha"),
    ("magnitude", rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?"),
    ("dora_scale", r"\.dora_scale"),
    ("diff", r"\.diff"),
    ("diff_b", r"\.diff_b"),
    *(
        (role, rf"\.{role}{_ADAPTER}")
        for kind in ("hada_w1", "hada_w2")
        for role in (f"{kind}_a", f"{kind}_b")
    ),
    *((role, rf"\.{role}{_ADAPTER}") for role in ("hada_t1", "hada_t2", "lokr_t2")),
    *((f"lokr_{w}{f}", rf"\.lokr_{w}{f}{_ADAPTER}") for w in ("w1", "w2") for f in ("", "_a", "_b")),
)
_ROLE_PATTERNS = tuple((role, re.compile(f"(?:{pattern})$")) for role, pattern in _ROLES)
_ON_BASE = "changes the base's weights by a factor instead of adding to them; only additions can be gated"
_REFUSED = (
    (
        re.compile(r"\.(?:w_norm|b_norm)$"),
        "normalisation layers multiply no matrix, so there is nothing to gate",
    ),
    (re.compile(r"\.(?:oft_\w+|rescale)(?:\.[^.]+)*$"), f"OFT {_ON_BASE}"),
    (re.compile(r"\.(?:on_input|ia3_l(?:\.[^.]+)?)$"), f"(IA)^3 {_ON_BASE}"),
    (re.compile(r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$"), f"GLoRA {_ON_BASE}"),
    (re.compile(r"\.lora_embedding_[AB](?:\.[^.]+)?$"), "LoRA of an embedding table multiplies no matrix"),
    (re.compile(r"\.set_weight$"), "whole weights are no differences"),
)
NOT_LORA = "not a LoRA key of a known dialect"
# Roles that say something of a matrix's size.
_SIZED = (
    "diff",
    "up",
    "down",
    *(f"{kind}{f}" for kind in ("hada_w1", "lokr_w1", "lokr_w2") for f in ("", "_a", "_b")),
)
# A role is told by this many dotted words at most ("OFT" aside, whose roles end in words of their own).
_WORDS = 4


def split_role(key: str) -> tuple[str, str | None, str | None]:
    """Take the role off a key.

    Returns:
        module: the key without its role, equal for all keys of one matrix; the whole key if it has no role.
        role: "down", "up", "alpha", "hada_w1_a" ...; None if the key is refused or unknown.
        reason: why a key of this kind cannot be used; None if it can, or is unknown.
    """
    # Thousands of keys of a file end in a few dozen ways.
    start = len(key)
    for _ in range(_WORDS):
        start = key.rfind(".", 0, start)
        if start < 0:
            start = 0
            break
    size, role, reason = _role_of(key[start:])
    return key[: len(key) - size], role, reason


@lru_cache(maxsize=4096)
def _role_of(end: str) -> tuple[int, str | None, str | None]:
    """(length of the role at the end, role, reason it is refused)."""
    for pattern, reason in _REFUSED:
        if match := pattern.search(end):
            return len(end) - match.start(), None, reason
    for role, pattern in _ROLE_PATTERNS:
        if match := pattern.search(end):
            return len(end) - match.start(), role, None
    return 0, None, None


def matrix_size(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int] | None:
    """Outputs and inputs of a matrix; None where they cannot be told.

    Args:
        shapes: role -> shape of the tensor that a file has for the matrix.
    """
    if any(len(shape) < 2 for role, shape in shapes.items() if role in _SIZED):
        return None
    if "diff" in shapes:
        return shapes["diff"][0], shapes["diff"][1]
    if "up" in shapes and "down" in shapes:
        return shapes["up"][0], shapes["down"][1]
    if "hada_w1_a" in shapes and "hada_w1_b" in shapes:
        return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    first, second = (_factor_size(shapes, f"lokr_{name}") for name in ("w1", "w2"))
    return None if first is None or second is None else (first[0] * second[0], first[1] * second[1])


def _factor_size(shapes: Mapping[str, Sequence[int]], name: str) -> tuple[int, int] | None:
    """Outputs and inputs of a factor that may itself be a product."""
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    left, right = shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    return None if left is None or right is None else (left[0], right[1])

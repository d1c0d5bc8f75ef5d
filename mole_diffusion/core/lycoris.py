"""LyCORIS' forms of a delta (LoCon, LoHa, LoKr, full) as two factors, without loss.

LoHa is a Hadamard product of two low-rank matrices and LoKr a Kronecker product; both are products of two
factors again (of ranks r1 r2), so they are gated like any LoRA. Where these would be larger than the matrix,
the full delta takes their place. Shapes are those of LyCORIS (arXiv 2309.14859): `*_a` (out, r), `*_b`
(r, in); with a Tucker core `t` (r, r, kh, kw) `*_a` is (r, out) and `*_b` (r, in).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .errors import ExpertLoadError
from .factors import LoraFactors, Magnitude, dense
from .reading import is_finite
from .scaling import Scaling

_W = ("w1", "w2")


def absent_roles(roles: Mapping[str, object]) -> list[str]:
    """Which tensors of a matrix are missing to make a delta of the kind that the others belong to."""
    if any(role.startswith("hada_") for role in roles):
        return [role for w in _W for f in "ab" if (role := f"hada_{w}_{f}") not in roles]
    if any(role.startswith("lokr_") for role in roles):
        whole = [w for w in _W if f"lokr_{w}" not in roles]
        return [role for w in whole for f in "ab" if (role := f"lokr_{w}_{f}") not in roles]
    if "diff" in roles:
        return []
    if "diff_b" in roles and not {"down", "up"} & set(roles):
        return ["diff"]
    return [f"{role} factor" for role in ("down", "up") if role not in roles]


def surplus_roles(roles: Collection[str]) -> list[str]:
    """Which tensors of a matrix do not go with the kind of the others, so that nothing would use them."""
    common = {"alpha", "magnitude", "dora_scale", "diff_b"}
    if any(role.startswith("hada_") for role in roles):
        used = common | {f"hada_{w}_{f}" for w in _W for f in "ab"}
        used |= {"hada_t1", "hada_t2"} if {"hada_t1", "hada_t2"} <= set(roles) else set()
    elif any(role.startswith("lokr_") for role in roles):
        used = common | {f"lokr_{w}" for w in _W if f"lokr_{w}" in roles}
        used |= {f"lokr_{w}_{f}" for w in _W for f in "ab" if f"lokr_{w}" not in roles}
        used |= {"lokr_t2"} if "lokr_w2" not in roles else set()
    elif "diff" in roles:
        used = common | {"diff"}
    else:
        used = common | {"down", "up", "mid", "up_bias"}
    used -= {"up_bias"} if "diff_b" in roles else set()
    used -= {"dora_scale"} if "magnitude" in roles else set()
    return [role for role in roles if role not in used]


def own_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """r of the factors that a file has for a matrix; None for whole ones (LoKr, full differences)."""
    for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if role in tensors and tensors[role].dim() > 0:
            return int(tensors[role].shape[0])
    return None


def build_factors(module: str, tensors: Mapping[str, Tensor], scaling: Scaling | None) -> LoraFactors:
    """Factors of one matrix from the tensors that a file has for it.

    Args:
        module: its name in the file, for errors.
        tensors: by role of `roles.split_role`, complete by `absent_roles`, of finite numbers. Outside of
            inference mode.
        scaling: None where the file says nothing: the factor is 1 then.
    Raises:
        ExpertLoadError: the tensors do not fit together, or their products are too large for numbers.
    """
    try:
        if "hada_w1_a" in tensors:
            factors = _loha(tensors, _scale(tensors, scaling))
        elif "lokr_w2" in tensors or "lokr_w2_a" in tensors:
            factors = _lokr(tensors, _scale(tensors, scaling))
        elif "diff" in tensors:
            factors = _full(tensors["diff"])
        else:
            factors = _lora(module, tensors, scaling)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items())
        raise ExpertLoadError(f"{module!r}: its tensors do not fit together: {shapes}.") from error
    computed = "mid" in tensors or factors.kind in ("LoHa", "LoKr")
    if computed and not (is_finite(factors.down) and is_finite(factors.up)):
        raise ExpertLoadError(f"{module!r}: products of its tensors are too large for float32.")
    return _finish(module, factors, tensors)


def _scale(tensors: Mapping[str, Tensor], scaling: Scaling | None) -> float:
    return 1.0 if scaling is None else scaling.factor(own_rank(tensors))


def _plain(tensor: Tensor) -> Tensor:
    """Tensors read under inference mode (ComfyUI) could not be trained through; their clones can."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _finish(module: str, factors: LoraFactors, tensors: Mapping[str, Tensor]) -> LoraFactors:
    """With bias and DoRA."""
    out = factors.up.shape[0]
    bias = tensors.get("diff_b")
    if bias is None and "up_bias" in tensors:
        bias = tensors["up_bias"].float() * factors.scaling
    magnitude = tensors.get("magnitude", tensors.get("dora_scale"))
    if bias is not None and bias.numel() != out:
        raise ExpertLoadError(f"{module!r}: a bias of {bias.numel()} values for {out} outputs.")
    dora = None
    if magnitude is not None:
        # PEFT's norms are of output rows, whatever their axes; LyCORIS' axes tell which.
        per_input = "dora_scale" in tensors and magnitude.dim() > 1 and magnitude.shape[0] == 1 < out
        if not per_input and magnitude.numel() != out:
            raise ExpertLoadError(f"{module!r}: {magnitude.numel()} DoRA magnitudes for {out} outputs.")
        dora = Magnitude(magnitude.flatten(), per_input)
    kind = factors.kind if dora is None else f"DoRA {factors.kind}"
    bias = None if bias is None else bias.flatten()
    return LoraFactors(factors.down, factors.up, factors.alpha, bias, dora, kind)


def _lora(module: str, tensors: Mapping[str, Tensor], scaling: Scaling | None) -> LoraFactors:
    """LoRA and LoCon, with a Tucker core folded into the down factor."""
    down, up = tensors["down"], tensors["up"]
    for tensor, role in ((down, "down"), (up, "up")):
        kernel = tuple(tensor.shape[2:])
        if tensor.dim() not in (2, 4) or (role == "up" and kernel not in ((), (1, 1))):
            allowed = "two axes, or 1x1" if role == "up" else "two or four axes"
            raise ExpertLoadError(
                f"{module!r}: {role} factor of shape {tuple(tensor.shape)}; allowed: {allowed}."
            )
    if "mid" in tensors:
        down = torch.einsum("ab...,bi->ai...", tensors["mid"].float(), down.flatten(1).float())
    if down.shape[0] != up.shape[1]:
        raise ExpertLoadError(
            f"{module!r}: rank {down.shape[0]} of the down factor and {up.shape[1]} of the up factor differ."
        )
    rank = down.shape[0]
    alpha = float(rank) if scaling is None else scaling.alpha
    if scaling is not None and (scaling.root or scaling.fixed):
        alpha = scaling.factor(rank) * rank
    return LoraFactors(_plain(down), _plain(up), alpha)


def _full(diff: Tensor) -> LoraFactors:
    if diff.dim() not in (2, 4):
        raise RuntimeError("a difference of a matrix has two or four axes")
    return dense(_plain(diff))


def _low_rank(tensors: Mapping[str, Tensor], stem: str, core: str) -> tuple[Tensor, Tensor]:
    """(up (out, r), down (r, in * kernel)) of one low-rank matrix, float32."""
    a, b = tensors[f"{stem}_a"].float(), tensors[f"{stem}_b"].float()
    if core in tensors:
        down = torch.einsum("ij...,jr->ir...", tensors[core].float(), b).flatten(1)
        return a.T.contiguous(), down.contiguous()  # torch.kron takes no strided views
    return a.flatten(1), b.flatten(1)


def _loha(tensors: Mapping[str, Tensor], scaling: float) -> LoraFactors:
    """(U1 V1) * (U2 V2) = (U1 row-wise-kron U2) (V1 column-wise-kron V2)."""
    copies = {role: _plain(tensor) for role, tensor in tensors.items()}
    up1, down1 = _low_rank(copies, "hada_w1", "hada_t1")
    up2, down2 = _low_rank(copies, "hada_w2", "hada_t2")
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise RuntimeError("the two matrices of a Hadamard product differ in shape")
    if up1.shape[1] * up2.shape[1] >= min(up1.shape[0], down1.shape[1]):
        return dense((up1 @ down1) * (up2 @ down2) * scaling, "LoHa")
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return LoraFactors(down, up, scaling * down.shape[0], kind="LoHa")


def _lokr(tensors: Mapping[str, Tensor], scaling: float) -> LoraFactors:
    """kron(U1 V1, U2 V2) = kron(U1, U2) kron(V1, V2)."""
    split = [w for w in _W if f"lokr_{w}" not in tensors]
    copies = {role: _plain(tensor) for role, tensor in tensors.items()}
    pairs = []
    for w in _W:
        if w in split:
            pairs.append(_low_rank(copies, f"lokr_{w}", "lokr_t2" if w == "w2" else ""))
        else:
            whole = dense(copies[f"lokr_{w}"].float())
            pairs.append((whole.up, whole.down))
    (up1, down1), (up2, down2) = pairs
    rank = down1.shape[0] * down2.shape[0]
    if rank >= min(up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1]):
        return dense(torch.kron(up1 @ down1, up2 @ down2) * scaling, "LoKr")
    return LoraFactors(torch.kron(down1, down2), torch.kron(up1, up2), scaling * rank, kind="LoKr")

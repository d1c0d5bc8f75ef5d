"""The mathematics of gated LoRA experts as pure functions of tensors.

Shapes: B batch entries, L tokens, d features, N experts, R = sum of the experts' ranks, T either 1 or L.
Equations are those of "Mixture of LoRA Experts" (arXiv 2404.13628). Gate functions expect float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Least squared norm: far below the square of any useful feature in float32, above underflow.
EPS = 1e-20
TIMESTEP_FEATURES = 8


class RootBlocks(NamedTuple):
    """Blocks of a block-diagonal matrix for experts of equal rank.

    Attributes:
        columns: (n * r,) the experts' ranks among all R; None for all of them in order.
        blocks: (n, r, q).
    """

    columns: Tensor | None
    blocks: Tensor


#: C with |f| = |z C|, block-diagonal (R, Q): as it is, or as its blocks where most of it is zero.
Root = Tensor | tuple[RootBlocks, ...]


def rooted(z: Tensor, root: Root) -> Tensor:
    """z C, of the same length as the experts' outputs f.

    Args:
        z: (..., R); root: C.
    Returns:
        (..., Q).
    """
    if isinstance(root, Tensor):
        return times(z, root)
    parts = []
    for columns, blocks in root:
        own = z if columns is None else z.index_select(-1, columns)
        rows = own.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
        parts.append(torch.bmm(rows, blocks).transpose(0, 1).reshape(*own.shape[:-1], -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def over_length(products: Tensor, outputs: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Logits from products with the projection and what has the length of the experts' outputs."""
    length: Tensor = torch.linalg.vector_norm(outputs, dim=dim, keepdim=isinstance(dim, int))
    if not isinstance(dim, int):
        length = length.unsqueeze(-1)
    return products / length.clamp_min(math.sqrt(EPS))


def expert_logits(z: Tensor, projected: Tensor, root: Root) -> Tensor:
    """Gate logits from expert outputs (Eq. 9-10) without forming the outputs.

    With f = concat_i(s_i B_i z_i) the logits are f^T E / |f|; in rank space f^T E = z^T P with
    P_i = s_i B_i^T E_i, and |f| = |z^T C| with C = blockdiag(C_i) of the QR s_i B_i = Q_i C_i^T.

    Args:
        z: (..., R) rank activations x A_cat^T.
        projected: (R, N), P above.
        root: C above.
    Returns:
        (..., N) logits; 0 where the features vanish.
    """
    return over_length(times(z, projected), rooted(z, root))


def joined_logits(z: Tensor, joined: Tensor, experts: int) -> Tensor:
    """As `expert_logits`, with one product in place of two.

    Args:
        z: (..., R); joined: (R, N + Q) P and C side by side; experts: N.
    """
    products = times(z, joined)
    logits, outputs = torch.split(products, [experts, products.shape[-1] - experts], dim=-1)
    return over_length(logits, outputs)


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(..., n) product of (..., m) and a matrix (m, n); of plain rows with fewer calls inside PyTorch."""
    return rows.mm(matrix) if rows.dim() == 2 else rows @ matrix


def expert_logits_flat(z: Tensor, projected: Tensor, root: Root) -> Tensor:
    """As `expert_logits`, with the features of all tokens in one vector (Eq. 10, literal).

    Args:
        z: (B, L, R); projected: (L, R, N); root: C.
    Returns:
        (B, N) logits.
    """
    return over_length(torch.einsum("blr,lrn->bn", z, projected), rooted(z, root), (-2, -1))


def feature_logits(features: Tensor, projection: Tensor) -> Tensor:
    """Gate logits from explicit features, L2-normalised.

    Args:
        features: (..., D); projection: (D, N).
    Returns:
        (..., N) logits.
    """
    squared = features.square().sum(-1, keepdim=True)
    return (features @ projection) * torch.rsqrt(squared + EPS)


def active_mask(active: Sequence[int] | Tensor, experts: int, device: torch.device | str = "cpu") -> Tensor:
    """(N,) True for active experts, given as their indices or as this mask."""
    if isinstance(active, Tensor):
        return active
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[list(active)] = True
    return mask.to(device)


def gate_weights(
    logits: Tensor, temperature: Tensor | float | None = None, active: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Gate weights softmax(logits / tau) (Eq. 11); inactive experts get exactly 0.

    Args:
        logits: (..., N).
        temperature: tau, above 0; None where the logits are divided by it already.
        active: active experts, see `active_mask`; None for all.
    Returns:
        (..., N), summing to 1. Leaving experts out is the proportional renormalisation of the paper.
    """
    scaled = logits if temperature is None else logits / temperature
    if active is not None:
        inactive = ~active_mask(active, logits.shape[-1], logits.device)
        scaled = scaled.masked_fill(inactive, float("-inf"))
    return torch.softmax(scaled, dim=-1)


def sigmoid_total(
    logits: Tensor, temperature: Tensor | float | None = None, active: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Sum of N independent gate weights sigmoid(logits / tau - log(N - 1)), which is 1 at logits of zero.

    The active experts stand for all: their mean, times N. A gate with function "sigmoid" is the distribution
    of these weights (see `sigmoid_weights`) times this sum, which acts as a strength.

    Args:
        logits: (..., N), N at least 2.
        temperature, active: as in `gate_weights`.
    Returns:
        (..., 1).
    """
    experts = logits.shape[-1]
    open_ = _open(logits, temperature)
    if active is None:
        return open_.mean(-1, keepdim=True) * experts
    mask = active_mask(active, experts, logits.device)
    return (open_ * mask).sum(-1, keepdim=True) / mask.sum() * experts


def sigmoid_weights(
    logits: Tensor, temperature: Tensor | float | None = None, active: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Shares (..., N) of the active experts in `sigmoid_total`; inactive experts get exactly 0."""
    open_ = _open(logits, temperature)
    if active is not None:
        open_ = open_ * active_mask(active, logits.shape[-1], logits.device)
    return open_ / open_.sum(-1, keepdim=True).clamp_min(EPS)


def _open(logits: Tensor, temperature: Tensor | float | None) -> Tensor:
    """How far each of N independent gates is open; 1 / N at logits of zero."""
    scaled = logits if temperature is None else logits / temperature
    return torch.sigmoid(scaled - math.log(logits.shape[-1] - 1))


def timestep_features(timestep: Tensor) -> Tensor:
    """Cosines of the timestep, slowest first: a bias and seven waves.

    Args:
        timestep: (...) in 0..1, from the clean picture to noise alone.
    Returns:
        (..., TIMESTEP_FEATURES) float32.
    """
    waves = torch.arange(TIMESTEP_FEATURES, device=timestep.device, dtype=torch.float32)
    return torch.cos(timestep.float().unsqueeze(-1) * math.pi * waves)


def effective_strength(strength: Tensor, active: Tensor | float, total: int) -> Tensor:
    """Strength with `active` of `total` experts: 1 + (s - 1)(n - 1)/(N - 1), so that one expert alone has 1.

    Args:
        strength: s, a scalar or one per token; active: number of active experts, a tensor when it differs by
            token; total: N.
    """
    if total == 1:
        return torch.ones_like(strength)
    return 1.0 + (strength - 1.0) * (active - 1.0) / (total - 1)


def region_counts(masks: Tensor) -> Tensor:
    """How many experts share each token: 1 where a single mask reaches, n where n masks are equal.

    Args:
        masks: (L, N) in 0..1.
    Returns:
        (L, 1), at least 1.
    """
    peak = masks.amax(-1, keepdim=True)
    return (masks.sum(-1, keepdim=True) / peak.clamp_min(EPS)).clamp_min(1.0)


def region_weights(weights: Tensor, masks: Tensor) -> Tensor:
    """Gate weights under region masks: g_i m_i / sum_j g_j m_j, and 0 for tokens under no mask.

    Args:
        weights: (B, T, N); masks: (L, N) in 0..1, zero for inactive experts.
    Returns:
        (B, L, N).
    """
    product = weights * masks
    total = product.sum(-1, keepdim=True)
    return torch.where(total > 0, product / total.clamp_min(EPS), torch.zeros_like(product))


def mixed_delta(z: Tensor, rank_weights: Tensor, up: Tensor) -> Tensor:
    """The mixed delta of all experts: ((x A_cat^T) * g[rank_owner]) B_cat^T.

    Args:
        z: (B, L, R) rank activations; rank_weights: (B, T, R); up: (R, d_out), scaling included.
    Returns:
        (B, L, d_out).
    """
    return (z * rank_weights) @ up


def add_mixed_delta(
    output: Tensor, z: Tensor, rank_weights: Tensor, up: Tensor, rows: slice | None = None
) -> Tensor:
    """`output` plus `mixed_delta`, fused; in place where no gradient is asked for.

    Args:
        output: (B, L, d_out), (B, d_out, H, W) of a convolution with L = H * W, or (B, d_out) with L = 1.
        z: (B, L, R) or, one row per token of the batch, (B * L, R).
        rank_weights: what broadcasts to z.
        up: (R, d_out).
        rows: the features of `output` that the delta is for, where it holds those of several matrices.
    """
    return add_delta(output, rows_of(z * rank_weights), up, rows)


def add_delta(output: Tensor, scaled: Tensor, up: Tensor, rows: slice | None = None) -> Tensor:
    """As `add_mixed_delta`, for rank activations (B * L, R) that are weighted already."""
    if rows is not None:
        return _add_to_rows(output, scaled, up, rows)
    if output.dim() == 4:
        delta = _as_image(scaled @ up, output)
        return output + delta if torch.is_grad_enabled() else output.add_(delta)
    if torch.is_grad_enabled() or not output.is_contiguous():
        return torch.addmm(output.reshape(-1, output.shape[-1]), scaled, up).view(output.shape)
    output.view(-1, output.shape[-1]).addmm_(scaled, up)
    return output


def _add_to_rows(output: Tensor, scaled: Tensor, up: Tensor, rows: slice) -> Tensor:
    """`output` with scaled (B * L, R) times up (R, rows) added to some of its features."""
    axis = 1 if output.dim() == 4 else -1
    part = output.narrow(axis, rows.start, rows.stop - rows.start)
    delta = scaled @ up
    delta = _as_image(delta, part) if output.dim() == 4 else delta.view(part.shape)
    if torch.is_grad_enabled():
        return torch.slice_scatter(output, part + delta, axis, rows.start, rows.stop)
    part.add_(delta)
    return output


def _as_image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, d, H, W) of rows (B * H * W, d)."""
    return rows.view(like.shape[0], -1, rows.shape[-1]).transpose(1, 2).reshape(like.shape)


def rows_of(tokens: Tensor) -> Tensor:
    """(B * L, d) of (B, L, d); the same where it can be seen that way."""
    if tokens.dim() == 2:
        return tokens
    if tokens.is_contiguous():
        return tokens.view(-1, tokens.shape[-1])
    return tokens.reshape(-1, tokens.shape[-1])


def mean_tokens(x: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, 1, ...) mean over the tokens of x (B, L, ...).

    Args:
        real: (B, L, 1) the share of each token, 0 for padding; None for equal shares.
    """
    if real is None:
        return x.mean(1, keepdim=True)
    return (x * real.view(*real.shape[:2], *(1 for _ in x.shape[2:]))).sum(1, keepdim=True)


def without_padding(x: Tensor, real: Tensor | None = None) -> Tensor:
    """x (B, L, ...) with zeros for padding; `real` as in `mean_tokens`."""
    if real is None:
        return x
    return x * real.view(*real.shape[:2], *(1 for _ in x.shape[2:])).gt(0)


def tokens_of(x: Tensor) -> Tensor:
    """(B, L, d) view of a token tensor, an image tensor (B, d, H, W) or a row tensor (B, d)."""
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x.unsqueeze(1) if x.dim() == 2 else x


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-average a mask (H, W) to `size`; values stay in 0..1."""
    return F.interpolate(mask[None, None].float(), size=size, mode="area")[0, 0].clamp(0.0, 1.0)


def balance_loss(weights: Tensor, prior: Tensor | None = None, *, normalised: bool = False) -> Tensor:
    """Gating balance loss -log prod_i q_i (Eq. 14-15), or -N sum_i p_i log q_i with a prior p.

    Args:
        weights: (..., N) gate weights; q_i is the mean over all leading axes (gates and batch entries).
        prior: (N,) the use of the experts that has the smallest loss; None for 1/N each, as in the paper.
        normalised: subtract the minimum (N log N without a prior), so that use as in the prior gives 0.
    Returns:
        scalar.
    """
    experts = weights.shape[-1]
    usage = torch.log(weights.reshape(-1, experts).mean(0).clamp_min(EPS))
    if prior is None:
        loss = -usage.sum()
        return loss - experts * math.log(experts) if normalised else loss
    wanted = prior.to(usage)
    loss = -experts * (wanted * usage).sum()
    return loss + experts * torch.special.xlogy(wanted, wanted).sum() if normalised else loss


def entropy(weights: Tensor) -> Tensor:
    """Mean entropy in nats of gate weights (..., N), as drawn in Fig. 5a; log N at uniform."""
    terms: Tensor = torch.special.xlogy(weights, weights)
    return -terms.sum(-1).mean()

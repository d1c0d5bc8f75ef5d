"""The mathematics of gated LoRA experts as pure functions of tensors.

Shapes: B batch entries, L tokens, d features, N experts, R = sum of the experts' ranks, T either 1 or L.
Equations are those of "Mixture of LoRA Experts" (arXiv 2404.13628). Gate functions expect float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to squared norms: far below the square of any useful feature in float32, above underflow.
EPS = 1e-20
TIMESTEP_FEATURES = 8


def expert_logits(z: Tensor, projected: Tensor, gram: Tensor) -> Tensor:
    """Gate logits from expert outputs (Eq. 9-10) without forming the outputs.

    With f = concat_i(s_i B_i z_i) the logits are f^T E / |f|; in rank space f^T E = z^T P with
    P_i = s_i B_i^T E_i, and |f|^2 = z^T G z with G = blockdiag(s_i^2 B_i^T B_i).

    Args:
        z: (..., R) rank activations x A_cat^T.
        projected: (R, N), P above.
        gram: (R, R), G above.
    Returns:
        (..., N) logits; 0 where the features vanish.
    """
    squared = ((z @ gram) * z).sum(-1, keepdim=True).clamp_min(0.0)
    return (z @ projected) * torch.rsqrt(squared + EPS)


def expert_logits_flat(z: Tensor, projected: Tensor, gram: Tensor) -> Tensor:
    """As `expert_logits`, with the features of all tokens in one vector (Eq. 10, literal).

    Args:
        z: (B, L, R); projected: (L, R, N); gram: (R, R).
    Returns:
        (B, N) logits.
    """
    squared = ((z @ gram) * z).sum((-2, -1)).clamp_min(0.0).unsqueeze(-1)
    return torch.einsum("blr,lrn->bn", z, projected) * torch.rsqrt(squared + EPS)


def feature_logits(features: Tensor, projection: Tensor) -> Tensor:
    """Gate logits from explicit features, L2-normalised.

    Args:
        features: (..., D); projection: (D, N).
    Returns:
        (..., N) logits.
    """
    squared = features.square().sum(-1, keepdim=True)
    return (features @ projection) * torch.rsqrt(squared + EPS)


def gate_weights(logits: Tensor, temperature: Tensor | float, active: Sequence[int] | None = None) -> Tensor:
    """Gate weights softmax(logits / tau) (Eq. 11); inactive experts get exactly 0.

    Args:
        logits: (..., N).
        temperature: tau, above 0.
        active: indices of active experts; None for all.
    Returns:
        (..., N), summing to 1. Leaving experts out is the proportional renormalisation of the paper.
    """
    scaled = logits / temperature
    if active is not None and len(active) < logits.shape[-1]:
        inactive = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        inactive[list(active)] = False
        scaled = scaled.masked_fill(inactive, float("-inf"))
    return torch.softmax(scaled, dim=-1)


def sigmoid_total(logits: Tensor, temperature: Tensor | float, active: Sequence[int]) -> Tensor:
    """Sum of N independent gate weights sigmoid(logits / tau - log(N - 1)), which is 1 at logits of zero.

    The active experts stand for all: their mean, times N. A gate with function "sigmoid" is the distribution
    of these weights (see `sigmoid_weights`) times this sum, which acts as a strength.

    Args:
        logits: (..., N), N at least 2; temperature: tau; active: indices of active experts.
    Returns:
        (..., 1).
    """
    experts = logits.shape[-1]
    open_ = torch.sigmoid(logits[..., list(active)] / temperature - math.log(experts - 1))
    return open_.mean(-1, keepdim=True) * experts


def sigmoid_weights(logits: Tensor, temperature: Tensor | float, active: Sequence[int]) -> Tensor:
    """Shares (..., N) of the active experts in `sigmoid_total`; inactive experts get exactly 0."""
    experts = logits.shape[-1]
    open_ = torch.sigmoid(logits / temperature - math.log(experts - 1))
    mask = torch.zeros(experts, device=logits.device)
    mask[list(active)] = 1.0
    open_ = open_ * mask
    return open_ / open_.sum(-1, keepdim=True).clamp_min(EPS)


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
        output: (B, L, d_out), or (B, d_out, H, W) of a 1x1 convolution with L = H * W; else as `mixed_delta`.
        rows: the features of `output` that the delta is for, where it holds those of several matrices.
    """
    scaled = z * rank_weights
    if rows is not None:
        return _add_to_rows(output, scaled, up, rows)
    if output.dim() == 4:
        delta = (scaled @ up).transpose(1, 2).reshape(output.shape)
        return output + delta if torch.is_grad_enabled() else output.add_(delta)
    flat = scaled.reshape(-1, scaled.shape[-1])
    if torch.is_grad_enabled() or not output.is_contiguous():
        return torch.addmm(output.reshape(-1, output.shape[-1]), flat, up).view(output.shape)
    output.view(-1, output.shape[-1]).addmm_(flat, up)
    return output


def _add_to_rows(output: Tensor, scaled: Tensor, up: Tensor, rows: slice) -> Tensor:
    """`output` with scaled (B, L, R) times up (R, rows) added to some of its features."""
    axis = 1 if output.dim() == 4 else -1
    part = output.narrow(axis, rows.start, rows.stop - rows.start)
    delta = scaled @ up
    if output.dim() == 4:
        delta = delta.transpose(1, 2)
    delta = delta.reshape(part.shape)
    if torch.is_grad_enabled():
        return torch.slice_scatter(output, part + delta, axis, rows.start, rows.stop)
    part.add_(delta)
    return output


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


def balance_loss(weights: Tensor, *, normalised: bool = False) -> Tensor:
    """Gating balance loss -log prod_i q_i (Eq. 14-15).

    Args:
        weights: (..., N) gate weights; q_i is the mean over all leading axes (gates and batch entries).
        normalised: subtract the minimum N log N, so that uniform use of the experts gives 0.
    Returns:
        scalar.
    """
    experts = weights.shape[-1]
    usage = weights.reshape(-1, experts).mean(0)
    loss = -torch.log(usage.clamp_min(EPS)).sum()
    return loss - experts * math.log(experts) if normalised else loss


def entropy(weights: Tensor) -> Tensor:
    """Mean entropy in nats of gate weights (..., N), as drawn in Fig. 5a; log N at uniform."""
    terms: Tensor = torch.special.xlogy(weights, weights)
    return -terms.sum(-1).mean()

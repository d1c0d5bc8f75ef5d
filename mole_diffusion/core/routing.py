"""Routes: how a matrix weighs the experts by itself, token by token, without gates trained for the set.

"arrow" and "energy" are all in rank space, where the products with the down factors are there already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError
from .factors import LoraFactors
from .rules import number, whole, word

ROUTES = ("arrow", "energy")
KEYS = "keys"
LARGEST = "largest"
_ALLOWED = {
    "kind": word((*ROUTES, KEYS, LARGEST)),
    "top_k": whole(),
    "temperature": number(0, math.inf, above=True),
}
# K-LoRA's alpha and beta: how the score of styles grows.
_GROWTH, _START = 1.5, 0.5


@dataclass(frozen=True)
class Route:
    """Which experts a token goes to in a matrix, and in what shares.

    Args:
        kind: "arrow": how far the token points along the direction that an expert answers most to, the first
            right singular vector of its delta (Ostapenko et al. 2024; as PEFT's `create_arrow_model`);
            "energy": how large the expert's whole answer is, for the size of its delta; "keys": how well the
            token agrees with a key that each expert has for the matrix (PHATGOOSE, Muqeeth et al. 2024); or
            "largest": one expert has the whole matrix, the one whose largest entries are the largest share of
            all of its own (K-LoRA's rule, Ouyang et al. 2025, for any number of experts).
        top_k: how many experts share a token; with "largest" there is always one.
        temperature: tau of the softmax over their scores, above 0.
        keys: for "keys": canonical name of each matrix -> (N, d_in) keys of all experts.
        growing: indices of experts whose score grows from half to twice from noise to picture, with
            "largest": styles.

    Raises:
        ConfigError: a value is not allowed.
    """

    kind: str = "arrow"
    top_k: int = 3
    temperature: float = 1.0
    keys: Mapping[str, Tensor] | None = field(default=None, compare=False)
    growing: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, rule in _ALLOWED.items():
            rule.demand(name, getattr(self, name))
        if (self.kind == KEYS) != (self.keys is not None):
            raise ConfigError(f"kind={self.kind!r} {'needs' if self.kind == KEYS else 'has no'} keys.")

    def factors(self, factors: Mapping[int, LoraFactors]) -> Tensor:
        """What scores z: w of (R,) with |w . z| for "arrow", C (R, R) with |z C| for "energy"; float32.

        For "largest" it is (R,) the score of each rank's owner.
        """
        if self.kind == LARGEST:
            return _largest(factors)
        parts = [_arrow(one) if self.kind == "arrow" else _energy(one) for one in factors.values()]
        if self.kind == "arrow":
            return torch.cat(parts)
        stacked: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        return stacked

    def weights(
        self, factors: Tensor, z: Tensor, owners: Tensor, timestep: Tensor | float | None = None
    ) -> Tensor:
        """(M, N) shares of the experts, or one row for all; without the matrix, or left out, they have 0.

        Args:
            factors: see `factors`.
            z: (M, R) rank activations of the experts that count.
            owners: (N, R) one-hot owner of each rank.
            timestep: in 0..1, from the picture to noise.
        """
        if self.kind == LARGEST:
            return self._one_hot((owners * factors).amax(-1), timestep)
        if self.kind == "arrow":
            scores = ((z * factors) @ owners.T).abs()
        else:
            scores = ((z @ factors).square() @ owners.T).clamp_min(0.0).sqrt()
        return self._shares(scores, owners)

    def keyed(self, matrix: str, x: Tensor, owners: Tensor) -> Tensor:
        """(M, N) shares of the experts by their keys, both normalised as by a LayerNorm without parameters.

        Args:
            matrix: canonical name.
            x: (M, d_in) what the matrix reads, float32.
            owners: (N, R) one-hot owner of each rank.

        Raises:
            ConfigError: there are no keys for the matrix, or of other sizes.
        """
        assert self.keys is not None
        keys, expected = self.keys.get(matrix), (owners.shape[0], x.shape[-1])
        if keys is None or tuple(keys.shape) != expected:
            found = "none" if keys is None else f"keys of shape {tuple(keys.shape)}"
            raise ConfigError(f"{matrix!r} needs keys of shape {expected} (experts, inputs), and has {found}")
        width = x.shape[-1:]
        rows, columns = F.layer_norm(x, width), F.layer_norm(keys.to(x), width)
        return self._shares(rows @ columns.T / x.shape[-1] ** 0.5, owners)

    def _shares(self, scores: Tensor, owners: Tensor) -> Tensor:
        scores = scores.masked_fill(~owners.any(-1), float("-inf"))
        chosen, places = scores.topk(min(self.top_k, int(owners.shape[0])), dim=-1)
        shares = torch.softmax(chosen / self.temperature, dim=-1)
        return torch.zeros_like(scores).scatter(-1, places, shares)

    def _one_hot(self, scores: Tensor, timestep: Tensor | float | None) -> Tensor:
        """(1, N) all for the highest of the scores (N,)."""
        if self.growing and timestep is not None:
            done = 1.0 - torch.as_tensor(timestep, device=scores.device).float().mean()
            grows = torch.tensor([index in self.growing for index in range(len(scores))])
            scores = torch.where(grows.to(scores.device), scores * (_GROWTH * done + _START), scores)
        return torch.nn.functional.one_hot(scores.argmax(-1), len(scores)).float().unsqueeze(0)


def _largest(factors: Mapping[int, LoraFactors]) -> Tensor:
    """(R,) for each rank, its owner's sum of largest entries as a share of the sum of all."""
    ranks = sorted((one.rank for one in factors.values()), reverse=True)
    count = ranks[0] * (ranks[1] if len(ranks) > 1 else 1)
    scores = []
    for one in factors.values():
        down, up = (factor.float() for factor in one.matrices)
        entries = (up @ down).abs().flatten()
        share = entries.topk(min(count, len(entries))).values.sum() / entries.sum().clamp_min(1e-12)
        scores.append(share.expand(one.width))
    return torch.cat(scores)


def _arrow(one: LoraFactors) -> Tensor:
    """(width,) w with |w . A x| = |v . x|, where v is the first right singular vector of B A."""
    down, up = (factor.float() for factor in one.matrices)
    q, r = torch.linalg.qr(down.T)
    _, _, right = torch.linalg.svd(torch.linalg.qr(up)[1] @ r.T)
    # v = q y lies in the rows of A, and q^T x = (r^T)^-1 A x.
    w = torch.linalg.pinv(r) @ right[0] if q.numel() else right[0]
    return torch.nn.functional.pad(w, (0, one.width - one.rank))


def _energy(one: LoraFactors) -> Tensor:
    """(width, width) C with |z C| = |B z| / |B A| (Frobenius)."""
    down, up = (factor.float() for factor in one.matrices)
    r = torch.linalg.qr(up)[1]
    size = torch.linalg.norm(r @ down).clamp_min(1e-12)
    missing = one.width - one.rank
    return torch.nn.functional.pad(r.T / size, (0, missing + one.rank - r.shape[0], 0, missing))

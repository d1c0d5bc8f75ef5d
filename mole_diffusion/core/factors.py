"""`LoraFactors`: what an expert adds to one matrix, as two factors; its compression; DoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# Below every norm of a weight row that is not zero.
_TINY = 1e-30


@dataclass(frozen=True)
class Magnitude:
    """DoRA: the merged weight is scaled to these norms.

    Attributes:
        values: (out,), or (in,) if `per_input`.
        per_input: norms of input columns (LyCORIS' old form) and not of output rows.
    """

    values: Tensor
    per_input: bool = False


@dataclass(frozen=True)
class LoraFactors:
    """Factors of one matrix: its delta is `alpha / r * up @ down`.

    Attributes:
        down: (r, in) or, for a convolution, (r, in, kh, kw) or (r, in * kh * kw).
        up: (out, r) or (out, r, 1, 1).
        alpha: LoRA alpha; equal to r where a file has none.
        bias: (out,) what is added to the output beside the product, or None.
        magnitude: DoRA's norms: the delta is known only with the base's weight (`against`); None without.
        kind: "LoRA", "LoHa", "LoKr", "full" or one of them with "DoRA ".
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None
    magnitude: Magnitude | None = None
    kind: str = "LoRA"

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def width(self) -> int:
        """Columns of `weighted_up`: r, and one more for a bias."""
        return self.rank + (self.bias is not None)

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """(down (r, in), up (out, r)); the kernel of a convolution counts as input."""
        return self.down.flatten(1), self.up.flatten(1)

    def rows(self) -> Tensor:
        """(width, in) down factor; a bias is a row of zeros whose product is replaced by 1 (`offset`)."""
        down = self.down.flatten(1).float()
        return down if self.bias is None else torch.cat([down, torch.zeros_like(down[:1])])

    def offset(self) -> Tensor:
        """(width,) what is added to the products with `rows`."""
        offset = torch.zeros(self.width)
        if self.bias is not None:
            offset[-1] = 1.0
        return offset

    def weighted_up(self) -> Tensor:
        """(out, width) up factor with scaling, and the bias as its last column; float32."""
        up = self.up.flatten(1).float() * self.scaling
        return up if self.bias is None else torch.cat([up, self.bias.float().unsqueeze(1)], dim=1)

    def rows_of(self, rows: slice) -> LoraFactors:
        """Factors of some output rows of a fused matrix: the very same down factor, and rows of the others.

        Ranks that write into other rows alone (files that fused several LoRAs block by block) are left out.

        Args:
            rows: of the output.
        Raises:
            ValueError: DoRA's norms are of input columns, which go through all rows.
        """
        magnitude = self.magnitude
        if magnitude is not None:
            if magnitude.per_input:
                raise ValueError("DoRA magnitudes per input belong to all its rows together")
            magnitude = replace(magnitude, values=magnitude.values[rows])
        with torch.inference_mode(False), torch.no_grad():
            down, up, rank = self.down, self.up[rows], self.rank
            used = up.flatten(1).ne(0).any(0)
            if 0 < int(used.sum()) < rank:
                down, up = down[used], up[:, used]
        return replace(
            self,
            down=down,
            up=up,
            alpha=self.scaling * down.shape[0],
            bias=None if self.bias is None else self.bias[rows],
            magnitude=magnitude,
        )

    def swapped(self) -> LoraFactors:
        """The same with the halves of the output rows in the other order."""
        magnitude = self.magnitude
        if magnitude is not None and not magnitude.per_input:
            magnitude = replace(magnitude, values=swap_halves(magnitude.values))
        with torch.inference_mode(False), torch.no_grad():
            up, bias = swap_halves(self.up), None if self.bias is None else swap_halves(self.bias)
        return replace(self, up=up, bias=bias, magnitude=magnitude)

    def widened(self, inputs: int, kernel: int = 1) -> LoraFactors:
        """The same for a matrix with more inputs, which it does not read.

        Args:
            inputs: of the matrix, at least as many as this has.
            kernel: positions of a convolution's kernel.
        Raises:
            ValueError: there is DoRA, whose norms are known with the base's weight alone.
        """
        if self.magnitude is not None:
            raise ValueError("a DoRA cannot be widened")
        flat = self.down.flatten(1)
        with torch.inference_mode(False), torch.no_grad():
            down = nn.functional.pad(flat, [0, inputs * kernel - flat.shape[1]])
        return replace(self, down=down)

    def delta(self) -> Tensor:
        """(out, in) what is added to the weight, before any DoRA; float32."""
        down, up = self.matrices
        return up.float() @ down.float() * self.scaling

    def against(self, weight: Tensor) -> LoraFactors:
        """The same change without DoRA, exact for this base weight; itself if there is no DoRA.

        DoRA (arXiv 2402.09353) replaces the weight W by m (W + D) / |W + D|, with the norm of each output row
        (PEFT, LyCORIS; `per_input`: of each input channel). What that adds to W has full rank.

        Args:
            weight: (out, in) or (out, in, kh, kw).
        """
        if self.magnitude is None:
            return self
        base = weight.detach().float()
        merged = base.flatten(1) + self.delta().to(base.device)
        values = self.magnitude.values.float().to(base.device)
        if self.magnitude.per_input:
            columns = merged.view(base.shape[0], base.shape[1], -1)
            norm = columns.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(_TINY)
            scaled = (columns * (values / norm).view(1, -1, 1)).flatten(1)
        else:
            scaled = merged * (values / merged.norm(dim=1).clamp_min(_TINY)).unsqueeze(1)
        delta = (scaled - base.flatten(1)).to(self.up.device)  # beside the other experts' factors
        return replace(dense(delta), bias=self.bias, kind=self.kind)


def swap_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first; twice is none."""
    return torch.roll(rows, rows.shape[0] // 2, dims=0)


def dense(delta: Tensor, kind: str = "full") -> LoraFactors:
    """Factors of a full delta (out, in) or (out, in, kh, kw): itself and an identity, on the smaller side."""
    flat = delta.flatten(1)
    out, fan_in = flat.shape
    rank = min(out, fan_in)
    identity = torch.eye(rank, dtype=flat.dtype, device=flat.device)
    if out <= fan_in:
        return LoraFactors(flat, identity, rank, kind=kind)
    return LoraFactors(identity, flat, rank, kind=kind)


def compress(factors: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of a given rank (Eckart-Young), and its relative error in the Frobenius norm.

    Args:
        factors: without DoRA.
        rank: largest rank of the result, at least 1; factors of smaller rank stay as they are.
    """
    if factors.rank <= rank:
        return factors, 0.0
    down, up = (tensor.double() for tensor in factors.matrices)
    left, upper = torch.linalg.qr(up * factors.scaling)
    right, lower = torch.linalg.qr(down.T)
    u, singular, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    total = singular.square().sum()
    error = float((singular[rank:].square().sum() / total).sqrt()) if float(total) > 0.0 else 0.0
    root = singular[:rank].sqrt()
    small = replace(
        factors,
        down=(root[:, None] * (vh[:rank] @ right.T)).float().view(len(root), *factors.down.shape[1:]),
        up=((left @ u[:, :rank]) * root).float().view(-1, len(root), *factors.up.shape[2:]),
        alpha=float(len(root)),
    )
    return small, error

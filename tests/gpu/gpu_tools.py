"""Tiny networks on a device, and what the CPU says in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny.networks import CLIP_TEXT, LATENT, TEXT, WIDTH, make_clip, make_unet
from torch import Tensor, nn
from transformers import CLIPTextModel

on_gpu = pytest.mark.gpu
# Relative to the largest value of the expected output.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
# Arguments (device, dtype) of a test: every data type on a GPU; on the CPU one, to see that the test works.
places = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, id="cpu"),
        *(pytest.param("cuda", dtype, marks=on_gpu, id=f"cuda-{str(dtype)[6:]}") for dtype in TOLERANCE),
    ],
    indirect=["device"],
)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: make_unet(linear=True),
    "conv": lambda: make_unet(linear=False),
    "clip": make_clip,
}


def run_on(network: nn.Module, device: torch.device, *, grad: bool = False, batch: int = 2) -> Tensor:
    """One forward on fixed inputs, in the network's data type, on the device; wherever its weights are."""
    generator = torch.Generator().manual_seed(3)
    with torch.set_grad_enabled(grad):
        if isinstance(getattr(network, "_orig_mod", network), CLIPTextModel):
            ids = torch.randint(3, 64, (2, CLIP_TEXT), generator=generator)[:batch].to(device)
            return network(ids).last_hidden_state
        dtype = next(network.parameters()).dtype
        latent = torch.randn(2, 4, LATENT, LATENT, generator=generator)[:batch].to(device, dtype)
        text = torch.randn(2, TEXT, WIDTH, generator=generator)[:batch].to(device, dtype)
        return network(latent, torch.tensor(500, device=device), text).sample


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the tolerance of the data type, in which `found` must be."""
    assert found.dtype == dtype
    error = (found.float().cpu() - expected.float().cpu()).abs().max() / expected.float().abs().max()
    assert error < TOLERANCE[dtype]


def differs(found: Tensor, expected: Tensor) -> bool:
    """Whether an expert or a gate visibly did something."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return bool((found - expected).abs().max() > 1e-2 * expected.abs().max())

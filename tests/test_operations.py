"""How much a forward with gates costs in calls of PyTorch: at batch 1 a GPU waits for these."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.measuring import Dispatched, operations
from bench.networks import SD15, add_adapters, experts_of, forward_of, gated, make_unet, share_weights
from mole_diffusion import MoLEConfig

#: As many layers and blocks as SD 1.5 has, thin: the operations are the same as at full width.
SHAPE = replace(
    SD15,
    unet={
        "sample_size": 16,
        "block_out_channels": (16, 32, 32, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    },
    side=16,
    text_width=16,
)
NAMES = ("a", "b", "c")
#: Operations of a forward with three experts over those of the bare network.
LIMIT = 1.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_gated_forward_has_at_most_14_tenths_of_the_operations(dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dtype=dtype)
    bare = make_unet(shape)
    donor, network = share_weights(bare), share_weights(bare)
    add_adapters(donor, NAMES)
    with torch.inference_mode(False):
        mixture = gated(network, experts_of(donor, NAMES), MoLEConfig())
    plain, mixed = forward_of(bare, shape, 1), forward_of(network, shape, 1)
    assert not torch.allclose(mixed(), plain())  # and fills the caches
    assert operations(mixed) <= LIMIT * operations(plain)
    with Dispatched() as ours:
        mixed()
    with Dispatched() as theirs:
        plain()
    # Besides views, per matrix: z times weights, times up; per shared input: one product; per gate: ten.
    extra = ours.total - theirs.total
    n_matrices = sum(len(group.slots) for group in mixture.groups)
    assert 2 * n_matrices < extra <= 2 * n_matrices + 7 * 16 + 10 * 32

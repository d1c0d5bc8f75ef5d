"""`torch.compile` by regions: blocks that are alike share one graph, with experts as without.

PyTorch gives a function up after eight graphs; SD 1.5 has sixteen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny.networks import TEXT, WIDTH, make_experts, randomise, run
from tiny.transformers import flux_inputs, make_flux
from torch._dynamo.testing import CompileCounter

from mole_diffusion import Mixture, MoLEConfig, inject
from mole_diffusion.core.auto import Auto, AutoSettings


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_unet() -> UNet2DConditionModel:
    """Six equal transformer blocks."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def mixed(unet: UNet2DConditionModel, config: MoLEConfig, **choice: Any) -> Mixture:
    mixture = inject(unet, make_experts(3, unet), config)
    randomise(mixture)
    mixture.activate(**choice)
    return mixture


def compiled(unet: UNet2DConditionModel) -> CompileCounter:
    counter = CompileCounter()
    unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    return counter


def _left() -> torch.Tensor:
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    return mask


GATED = MoLEConfig()
CHOICES: dict[str, tuple[MoLEConfig, dict[str, Any]]] = {
    "gates": (GATED, {"active_experts": ["dog", "boot"], "expert_scales": {"dog": 0.7}}),
    "means and time": (MoLEConfig(granularity="block", pooling="mean", timestep=True), {}),
    "regions": (GATED, {"region_masks": {"dog": _left()}}),
    "linear arithmetic": (GATED, {"weights": {"dog": 1.0, "cat": 1.0, "boot": 1.0}}),
    "fixed weights": (GATED, {"weights": {"dog": 0.3, "cat": 0.5}}),
}


#: Those that a graph must tell apart the most; each compiles for seconds.
QUICK = ("gates", "means and time", "regions")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES]
)
def test_equal_blocks_share_a_graph(name: str) -> None:
    """From the first forward on, and the second one finds all that it needs."""
    config, choice = CHOICES[name]
    unet, plain = make_unet(), make_unet()
    mixed(plain, config, **choice)
    expected = run(plain)
    mixed(unet, config, **choice)
    counter = compiled(unet)
    for _ in range(2):
        torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1


def test_equal_blocks_share_a_graph_while_words_find_their_experts() -> None:
    """Without training: one while the layout forms, one afterwards; other pictures and prompts need none."""
    unet, plain = make_unet(), make_unet()
    steps: list[Callable[[UNet2DConditionModel], torch.Tensor]] = []
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(1, 4, 8, 8, generator=generator)
        text = torch.randn(1, TEXT, WIDTH, generator=generator)
        auto = Auto({}, settings=AutoSettings(until=0.5))
        places = torch.zeros(1, TEXT, 3)
        for index in range(3):
            places[:, index + seed, index] = 1.0
        auto.remember(text, places)
        for time in (900, 800, 300, 200):
            steps.append(lambda one, x=latent, t=time, c=text, a=auto: _step(one, x, t, c, a))
    mixtures = [mixed(one, GATED) for one in (plain, unet)]
    expected = [step(plain) for step in steps]
    counter = compiled(unet)
    for step, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(step(unet), wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert all(one.live_weights() for one in mixtures)


def _step(
    unet: UNet2DConditionModel, latent: torch.Tensor, time: int, text: torch.Tensor, auto: Auto
) -> torch.Tensor:
    from mole_diffusion.core.mixture import mixture_on

    mixture = mixture_on(unet)
    assert mixture is not None
    if time == 900:
        mixture.activate(auto=auto)
    with torch.no_grad():
        return unet(latent, time, text).sample


def test_attention_of_compiled_transformers_is_read_where_they_run_as_written() -> None:
    """Blocks are compiled one by one: while places are looked for they are not."""
    given = {**flux_inputs(text=12), "txt_ids": torch.zeros(12, 3)}
    places = torch.zeros(2, 12, 3)
    for index in range(3):
        places[:, index + 1, index] = 1.0
    found, counter = [], CompileCounter()
    for compiles in (False, True):
        network = make_flux(num_layers=2, num_single_layers=2)
        mixture = inject(network, make_experts(3, network), GATED)
        auto = Auto({})
        auto.remember(given["encoder_hidden_states"], places)
        mixture.activate(auto=auto)
        if compiles:
            network.compile_repeated_blocks(backend=counter)
        with torch.no_grad():
            for time in (1.0, 0.5):
                out = network(**{**given, "timestep": torch.full((2,), time)}).sample
        found.append(out)
        placed = mixture.live_map()
        assert placed is not None
        assert placed.max() > 1.0
    assert counter.frame_count > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)

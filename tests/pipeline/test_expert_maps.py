"""Where in the picture each expert acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import make_experts, make_unet, randomise, run

from mole_diffusion import MoLEConfig, inject
from mole_diffusion.core.records import MapRecorder


def test_a_map_is_the_mean_of_the_gates_on_the_latents_grid() -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    run(unet)
    found = mixture.live_map()
    assert found is not None
    assert found.shape == (2, 3, 8, 8)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 8, 8))
    assert found.std(dim=(2, 3)).max() > 1e-3
    # Interpolation keeps means nearly: each gate counts once, text tokens not.
    gates = [w for label, w in mixture.live_weights().items() if not label.endswith(".context")]
    torch.testing.assert_close(found.mean((2, 3)), torch.stack(gates).mean(0), atol=0.02, rtol=0.0)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_experts_act_inside_their_regions_alone(pooling: str) -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(3, unet), MoLEConfig(pooling=pooling))
    randomise(mixture)
    left, right = torch.zeros(2, 64, 64)
    left[:, :32], right[:, 32:] = 1.0, 1.0
    mixture.activate(["dog", "cat"], region_masks={"dog": left, "cat": right})
    run(unet)
    found = mixture.live_map()
    assert found is not None
    assert float(found[:, 0, :, :3].min()) > 0.99 > 0.01 > float(found[:, 0, :, 5:].max())
    assert float(found[:, 1, :, 5:].min()) > 0.99
    assert float(found[:, 2].max()) == 0.0


def test_without_gates_there_is_no_map() -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    mixture.activate(weights={"dog": 0.5, "cat": 0.5})
    run(unet)
    assert mixture.live_map() is None


def test_a_recorder_keeps_the_prompts_half() -> None:
    unet = make_unet()
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    randomise(mixture)
    recorder = MapRecorder(lambda mixture, index, entries: (index, entries // 2))
    with recorder.watching({"unet": mixture}):
        run(unet)
        first = mixture.live_map()
        run(unet)
    assert first is not None
    assert list(recorder.maps) == ["dog", "cat"]
    torch.testing.assert_close(recorder.maps["cat"], first[1:, 1])
    assert recorder.weights.where(branch="prompt")


def test_a_pipeline_maps_experts_when_asked(loaded: Any) -> None:
    pipe = loaded
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    for mixture in pipe.mixtures.values():
        randomise(mixture)
    plain = pipe("a boot", generator=torch.Generator().manual_seed(0), mixture="gates", **call).images
    assert pipe.expert_maps() == {}
    drawn = pipe(
        "a boot", generator=torch.Generator().manual_seed(0), mixture="gates", record_maps=True, **call
    )
    assert (drawn.images == plain).all()
    maps = pipe.expert_maps()
    assert list(maps) == list(pipe.experts)
    assert all(one.shape == (1, 4, 4) for one in maps.values())
    torch.testing.assert_close(torch.stack(list(maps.values())).sum(0), torch.ones(1, 4, 4))
    assert pipe.gate_weights()

"""Region masks: where in the picture an expert works."""

from __future__ import annotations

import pytest
import torch
from tiny.networks import LDMUNet, lora_state, make_experts, make_unet, randomise, run, to_experts, with_peft
from torch import nn

from mole_diffusion import MoLEConfig, RegionMaskError, inject
from mole_diffusion.core.regions import RegionMasks

from .test_invariants import assert_close, differs

LOCAL = ("ff.net.0.proj",)


def halves(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(size, size)
    left[:, : size // 2] = 1
    return left, 1 - left


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("linear", [True, False])
def test_full_masks_change_nothing_and_empty_masks_remove(pooling: str, linear: bool) -> None:
    unet = make_unet(linear=linear)
    experts = make_experts(3, unet)
    for host in (unet, LDMUNet(unet)):
        mixture = inject(host, experts, MoLEConfig(pooling=pooling))
        randomise(mixture)
        free = run(host)
        full = {name: torch.ones(64, 64) for name in mixture.expert_names}
        mixture.activate(region_masks=full)
        assert_close(run(host), free)
        # Masked away everywhere, the expert still speaks to the text tokens; the others share its image part.
        mixture.activate(region_masks={"cat": torch.zeros(64, 64)})
        assert differs(run(host), free)


def test_each_token_uses_the_expert_of_its_region(unet: nn.Module) -> None:
    """Weights per token are exactly those of the formula, at every depth of the UNet."""
    mixture = inject(unet, make_experts(3, unet), MoLEConfig(strength=2.0))
    randomise(mixture)
    left, right = halves(64)
    mixture.activate(["dog", "cat"], region_masks={"dog": left, "cat": right})
    run(unet)
    checked = 0
    for group in mixture.groups:
        value = mixture._context.values[group.name]
        for (_, _, tokens), (weights, _) in value.expanded.items():
            side = int(tokens**0.5)
            owner = [i for i in (0, 1) for _ in range((2, 3)[i])]
            grid = weights.view(2, side, side, len(owner))
            for rank, expert in enumerate(owner):
                inside = grid[:, :, : side // 2] if expert == 0 else grid[:, :, side // 2 :]
                outside = grid[:, :, side // 2 :] if expert == 0 else grid[:, :, : side // 2]
                torch.testing.assert_close(inside[..., rank], torch.ones_like(inside[..., rank]))
                assert torch.all(outside[..., rank] == 0)
            checked += 1
    assert checked == len(mixture.groups)


def test_masks_of_a_picture_that_is_not_square(unet: nn.Module) -> None:
    loras = {"dog": lora_state(unet, 2, 1, LOCAL), "cat": lora_state(unet, 3, 2, LOCAL)}
    mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig())
    x, text = torch.randn(1, 4, 8, 12), torch.randn(1, 77, 16)
    mask = torch.zeros(64, 96)
    mask[:, :32] = 1
    mixture.activate(region_masks={"dog": mask})
    with torch.no_grad():
        unet(x, torch.tensor(1), text)
    value = next(iter(mixture._context.values.values()))
    weights = next(iter(value.expanded.values()))[0].view(8, 12, 5)
    assert torch.all(weights[:, :4] > 0)
    assert torch.all(weights[:, 4:, :2] == 0)
    torch.testing.assert_close(weights[:, 4:, 2:], torch.ones(8, 8, 3))


def test_regions_with_fixed_weights(unet: nn.Module) -> None:
    loras = {"dog": lora_state(unet, 2, 1), "cat": lora_state(unet, 3, 2)}
    expected = run(with_peft(unet, loras, {"dog": 0.5, "cat": 1.0}))
    mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig())
    # Half a mask everywhere halves a fixed weight on image tokens; the text tokens keep it.
    mixture.activate(weights={"dog": 0.5, "cat": 1.0}, region_masks={"cat": torch.ones(8, 8)})
    assert_close(run(unet), expected)
    mixture.activate(weights={"dog": 0.5, "cat": 1.0}, region_masks={"cat": torch.full((8, 8), 0.5)})
    assert differs(run(unet), expected)


def test_soft_masks_are_averaged_over_the_grid() -> None:
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    masks = RegionMasks({0: mask}, experts=3, active=(0, 1))
    found = masks.on_grid(2, 4, torch.device("cpu"))
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 0.5, 0.0, 0.0]).repeat(2))
    assert torch.all(found[:, 1] == 1)
    assert torch.all(found[:, 2] == 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.zeros(1, 8, 8),
            r"The region mask of 'dog' has shape \(1, 8, 8\); allowed: \(height, width\).",
        ),
        (torch.full((8, 8), 255.0), "The region mask of 'dog' has values from 255 to 255; allowed: 0 to 1."),
        (torch.full((8, 8), float("nan")), "The region mask of 'dog' has values from nan to nan"),
    ],
)
def test_masks_that_are_refused(mask: torch.Tensor, message: str, unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    with pytest.raises(RegionMaskError, match=message):
        mixture.activate(region_masks={"dog": mask})


def test_masks_of_wrong_proportions(unet: nn.Module, clip: nn.Module) -> None:
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    wrong = {"dog": torch.ones(64, 48)}
    with pytest.raises(RegionMaskError, match=r"64 x 48 \(height x width\) does not have the proportions"):
        mixture.activate(region_masks=wrong, latent_size=(8, 8))
    mixture.activate(region_masks=wrong)
    with pytest.raises(RegionMaskError, match="the latent, 8 x 8; draw it at the picture's size"):
        run(unet)
    mixture.activate(region_masks={"dog": torch.ones(10, 10)}, latent_size=(10, 10))
    with pytest.raises(RegionMaskError, match="64 image tokens do not fit the latent of 10 x 10"):
        run(unet)
    words = inject(clip, make_experts(2, clip), MoLEConfig())
    with pytest.raises(RegionMaskError, match="a text encoder has none"):
        words.activate(region_masks={"dog": torch.ones(8, 8)})

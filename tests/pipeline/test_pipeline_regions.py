"""Region masks: what is accepted, what is refused, and what they do to the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion.core.errors import RegionMaskError
from mole_diffusion.pictures.regions import region_tensors

LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


def test_all_kinds_of_mask_mean_the_same() -> None:
    kinds = {
        "tensor": LEFT,
        "bool": LEFT.bool(),
        "bytes": (LEFT * 255).to(torch.uint8),
        "array": LEFT.numpy(),
        "byte array": (LEFT.numpy() * 255).astype(np.uint8),
        "double array": LEFT.double().numpy(),
        "grey picture": Image.fromarray((LEFT.numpy() * 255).astype(np.uint8)),
        "colour picture": Image.fromarray((LEFT.numpy() * 255).astype(np.uint8)).convert("RGB"),
        "black and white picture": Image.fromarray((LEFT.numpy() * 255).astype(np.uint8)).convert("1"),
    }
    for name, tensor in region_tensors(kinds, 32, 32).items():
        assert torch.equal(tensor, LEFT), name


def test_half_grey_is_half() -> None:
    tensor = region_tensors({"a": Image.new("L", (8, 4), 51)}, 4, 8)["a"]
    torch.testing.assert_close(tensor, torch.full((4, 8), 0.2))


def test_wrong_size_names_both() -> None:
    with pytest.raises(RegionMaskError, match=r"'cat' is 64 x 32 pixels .*, the picture is 32 x 32"):
        region_tensors({"cat": torch.ones(32, 64)}, 32, 32)
    with pytest.raises(RegionMaskError, match=r"'cat' is 8 x 4 pixels .*, the picture is 48 x 32"):
        region_tensors({"cat": Image.new("L", (8, 4))}, 32, 48)


def test_wrong_shape_kind_and_range() -> None:
    with pytest.raises(RegionMaskError, match=r"shape \(1, 32, 32\)"):
        region_tensors({"cat": torch.ones(1, 32, 32)}, 32, 32)
    with pytest.raises(RegionMaskError, match="is a str, expected a PIL picture"):
        region_tensors({"cat": "left.png"}, 32, 32)
    with pytest.raises(RegionMaskError, match="values from 0 to 255, expected 0 to 1"):
        region_tensors({"cat": LEFT * 255}, 32, 32)
    with pytest.raises(RegionMaskError, match="values from nan"):
        region_tensors({"cat": torch.full((32, 32), float("nan"))}, 32, 32)


def test_size_is_checked_against_what_the_call_draws(loaded, draw) -> None:
    with pytest.raises(RegionMaskError, match=r"32 x 32 pixels .* the picture is 64 x 32"):
        draw(loaded, region_masks={"cat": LEFT}, width=64, height=32)
    with pytest.raises(RegionMaskError, match=r"32 x 32 pixels .* the picture is 32 x 64"):
        draw(loaded, region_masks={"cat": LEFT}, latents=torch.zeros(1, 4, 8, 4))
    wide = torch.ones(32, 64)
    assert draw(loaded, region_masks={"cat": wide}, width=64, height=32).shape[-2:] == (32, 64)


def test_full_masks_change_nothing(loaded, draw) -> None:
    full = dict.fromkeys(loaded.experts, torch.ones(32, 32))
    fresh = draw(loaded, mixture="gates")
    torch.testing.assert_close(draw(loaded, region_masks=full, mixture="gates"), fresh, atol=1e-5, rtol=0)


def test_masks_change_the_picture_and_order_of_regions_matters(loaded, draw) -> None:
    one = draw(loaded, region_masks={"boot": LEFT, "cat": 1 - LEFT, "clock": torch.zeros(32, 32)})
    other = draw(loaded, region_masks={"boot": 1 - LEFT, "cat": LEFT, "clock": torch.zeros(32, 32)})
    assert (one - draw(loaded)).abs().max() > 0.01
    assert (one - other).abs().max() > 0.01


def test_mask_of_zeros_takes_an_expert_out_of_the_picture(loaded, draw) -> None:
    loaded.unload_expert("boot")
    loaded.unload_expert("cat")
    black = draw(loaded, region_masks={"clock": torch.zeros(32, 32)})
    with_gates = draw(loaded)
    assert (black - with_gates).abs().max() > 0.01


def test_masks_hold_for_every_picture_of_a_batch(loaded, draw) -> None:
    masks = {"boot": LEFT, "cat": 1 - LEFT}
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    settings = {"region_masks": masks, "mixture": "gates"}
    both = draw(loaded, ["a boot", "a cat"], generator=seeds, **settings)
    for i, prompt in enumerate(["a boot", "a cat"]):
        single = draw(loaded, prompt, generator=torch.Generator().manual_seed(i + 1), **settings)
        torch.testing.assert_close(both[i : i + 1], single, atol=1e-4, rtol=0)

"""Cutting and mixing pictures."""

import random
from collections.abc import Callable

import pytest
import torch

from mole_diffusion.pictures.training import collage

SKY = (150, 190, 230)
Picture = Callable[..., torch.Tensor]
RED = torch.tensor([220, 30, 40]).view(3, 1, 1) / 255


def red(pixels: torch.Tensor) -> torch.Tensor:
    """Where a picture (3, H, W) has the colour of the boot."""
    return (pixels - RED).abs().amax(dim=0) < 0.1


def test_background_of_the_edges_has_no_object(picture: Picture) -> None:
    background = collage.edge_background(picture("boot", 10, SKY))
    torch.testing.assert_close(background, picture("boot", 80, SKY), atol=1e-4, rtol=0)


def test_mask_is_the_object_with_its_holes_and_without_specks(picture: Picture) -> None:
    pixels = picture("boot", 10, SKY)
    expected = red(pixels)
    pixels[:, 26:34, 24:30] = picture("boot", 80, SKY)[:, :8, :6]
    pixels[:, 2:4, 50:53] = 1.0
    mask = collage.object_mask(pixels)[0] > 0.5
    wrong = mask ^ expected
    assert wrong.float().mean() < 0.06, "only the rim may differ"
    assert mask[26:34, 24:30].all()
    assert not mask[:8].any()


def test_nothing_to_cut_takes_the_middle() -> None:
    cut = collage.cut_out(torch.full((3, 50, 40), 0.5))
    assert cut.pixels.shape == (3, 40, 32)
    assert bool(cut.alpha.bool().all())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_objects_stand_in_their_boxes(count: int, picture: Picture) -> None:
    boxes = collage.scene_boxes(count)
    cutouts = [collage.cut_out(picture("boot", 10, SKY)) for _ in boxes]
    mixed = collage.mix_scene(torch.ones(3, 128, 128), cutouts, boxes, 0.02)
    left = red(mixed.pixels)
    outside = mixed.inside[0].clone()
    for x0, y0, x1, y1 in boxes:
        box = (slice(int(y0 * 128), int(y1 * 128) + 1), slice(int(x0 * 128), int(x1 * 128) + 1))
        assert red(mixed.pixels)[box].float().mean() > 0.6
        assert mixed.inside[0][box].mean() > 0.6
        outside[box], left[box] = 0, False
    assert not left.any(), "nothing outside the boxes"
    assert outside.sum() < count, "but for the rims of the boxes"
    assert mixed.inside.max() <= 1 + 1e-6


def test_objects_that_overlap_count_once() -> None:
    whole = collage.Cutout(torch.ones(3, 20, 20), torch.ones(1, 20, 20))
    boxes = ((0.0, 0.0, 0.75, 0.75), (0.5, 0.5, 1.0, 1.0))
    mixed = collage.mix_scene(torch.zeros(3, 40, 40), [whole, whole], boxes, 0.0)
    assert mixed.inside[0, 5, 5] == mixed.inside[0, 25, 25] == mixed.inside[0, 35, 35] == 1
    assert mixed.inside[0, 5, 35] == mixed.inside[0, 35, 5] == 0
    # The later one stands in front.
    assert mixed.covers[:, 25, 25].tolist() == mixed.covers[:, 35, 35].tolist() == [0, 1]


def test_strips_show_the_middle_of_each_picture_in_order(picture: Picture) -> None:
    boot, cat = picture("boot", 16, SKY), picture("cat", 16, SKY)
    mixed = collage.mix_strips([boot, cat, boot], 0.02)
    assert mixed.pixels.shape == boot.shape
    for column, source in ((10, boot), (32, cat), (53, boot)):
        torch.testing.assert_close(mixed.pixels[:, 32, column], source[:, 32, 32], atol=0.01, rtol=0)
    torch.testing.assert_close(mixed.inside, torch.ones_like(mixed.inside))
    assert mixed.covers.shape == (3, *boot.shape[1:])
    assert [int(mixed.covers[:, 5, column].argmax()) for column in (10, 32, 53)] == [0, 1, 2]


def test_seams_are_soft() -> None:
    dark, light = torch.zeros(3, 8, 100), torch.ones(3, 8, 100)
    row = collage.mix_strips([dark, light], 0.1).pixels[0, 0]
    assert row[40] == 0
    assert row[60] == 1
    assert 3 <= ((row > 0.01) & (row < 0.99)).sum() <= 12
    assert bool((row.diff() >= 0).all())


def test_many_boxes_are_equal_columns() -> None:
    boxes = collage.scene_boxes(5)
    assert [round(box[2] - box[0], 6) for box in boxes] == [0.2] * 5
    assert boxes[0][0] == 0
    assert boxes[-1][2] == 1


def test_jitter_moves_a_little_and_stays_inside() -> None:
    rng = random.Random(0)
    boxes = collage.scene_boxes(3)
    for _ in range(50):
        moved = collage.jitter_boxes(boxes, 0.1, rng)
        assert moved != boxes
        for before, after in zip(boxes, moved, strict=True):
            assert 0 <= after[0] < after[2] <= 1
            assert 0 <= after[1] < after[3] <= 1
            assert all(abs(a - b) <= 0.16 for a, b in zip(after, before, strict=True))


def test_as_many_boxes_as_objects(picture: Picture) -> None:
    cut = collage.cut_out(picture("boot", 10, SKY))
    with pytest.raises(ValueError, match="1 objects need as many boxes, got 3"):
        collage.mix_scene(torch.zeros(3, 8, 8), [cut], collage.scene_boxes(3), 0.0)

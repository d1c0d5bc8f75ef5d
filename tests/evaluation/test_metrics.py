"""The metrics on inputs whose values are known."""

import math

import pytest
import torch

from mole_diffusion.evaluation.pictures import metrics


def test_text_alignment_is_the_cosine_of_each_pair() -> None:
    pictures = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(metrics.text_alignment(pictures, texts), torch.tensor([1.0, 0.6, -1.0]))


def test_image_alignment_is_the_mean_over_the_references() -> None:
    pictures = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    references = torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    expected = torch.tensor([0.5, math.sqrt(0.5)])
    torch.testing.assert_close(metrics.image_alignment(pictures, references), expected)


def test_best_crop_takes_the_best_window_of_each_picture_alone() -> None:
    windows = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 1.0]]])
    references = torch.tensor([[0.0, 3.0]])
    expected = torch.tensor([1.0, math.sqrt(0.5)])
    torch.testing.assert_close(metrics.best_crop_alignment(windows, references), expected)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (512, 256)])
def test_crops_lie_in_the_picture_and_cover_it(width: int, height: int) -> None:
    boxes = metrics.crop_boxes(width, height)
    assert len(boxes) == len(set(boxes)) == sum(places**2 for _, places in metrics.CROPS)
    seen = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        seen[top:bottom, left:right] = True
    assert seen.all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"boot", "subject:boot", "cat"}, "present"),
        ({"boot", "subject:cat", "cat"}, "confused"),
        ({"cat"}, "omitted"),
        (set(), "omitted"),
    ],
)
def test_a_concept_is_present_confused_or_omitted(labels: set[str], expected: str) -> None:
    assert metrics.verdict(labels, "boot", "subject:boot") == expected

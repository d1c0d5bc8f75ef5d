"""Views, crops and features of the guiding CLIP."""

import pytest
import torch

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.training.clip_guidance import ClipGuide, cut_windows, random_crops, random_views

CPU = torch.device("cpu")


def ramp(size: int = 32) -> torch.Tensor:
    """(1, 3, size, size): red grows to the right, green downwards."""
    across = ((torch.arange(size) + 0.5) / size).expand(size, size)
    return torch.stack([across, across.T, torch.zeros(size, size)])[None]


def test_a_window_is_the_part_it_names() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 0.5, 0.5], [0.5, 0.5, -1.0, 1.0]]])
    whole, corner, mirrored = cut_windows(ramp(), boxes, (16, 16))
    torch.testing.assert_close(whole, torch.nn.functional.avg_pool2d(ramp(), 2)[0], atol=1e-3, rtol=0)
    assert corner[0].amax() < 0.51
    assert corner[1].amin() > 0.49
    torch.testing.assert_close(mirrored, whole.flip(-1), atol=1e-5, rtol=0)


def test_views_and_crops_stay_inside_and_are_reproducible() -> None:
    for function, low, high in ((random_views, 0.75, 1.0), (random_crops, 0.4, 0.6)):
        boxes = function(3, 7, torch.Generator().manual_seed(1))
        assert boxes.shape == (3, 7, 4)
        centre, extent = boxes[..., :2], boxes[..., 2:].abs()
        assert bool((centre - extent / 2 >= -1e-6).all())
        assert bool((centre + extent / 2 <= 1 + 1e-6).all())
        assert low <= float(extent.min()) <= float(extent.max()) <= high
        assert torch.equal(boxes, function(3, 7, torch.Generator().manual_seed(1)))


def test_crops_cover_the_picture() -> None:
    boxes = random_crops(1, 12, torch.Generator().manual_seed(0))[0]
    for x, y in ((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)):
        inside = ((boxes[:, 0] - x).abs() <= boxes[:, 2] / 2) & ((boxes[:, 1] - y).abs() <= boxes[:, 3] / 2)
        assert bool(inside.any())


def test_features_are_unit_and_have_gradient(clip_folder: str) -> None:
    guide = ClipGuide.load(clip_folder, CPU)
    pictures = ramp(64).expand(2, -1, -1, -1).clone().requires_grad_()
    windows = guide.windows(pictures, random_crops(2, 3, torch.Generator().manual_seed(0)))
    assert windows.shape == (2, 3, 16)
    torch.testing.assert_close(windows.norm(dim=-1), torch.ones(2, 3))
    windows[..., 0].sum().backward()
    assert pictures.grad is not None
    assert float(pictures.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in guide.model.parameters())


def test_texts_are_encoded_once_and_in_order(clip_folder: str) -> None:
    guide = ClipGuide.load(clip_folder, CPU)
    first = guide.texts(["a boot", "a cat", "a boot"])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(guide.texts(["a cat"])[0], first[1])


def test_the_folder_says_how_pictures_are_normalised(clip_folder: str) -> None:
    guide = ClipGuide.load(clip_folder, CPU)
    assert guide.size == (32, 32)
    pixels = ramp()
    expected = torch.nn.functional.normalize(guide.model.encode_image((pixels - 0.5) / 0.5), dim=-1)
    torch.testing.assert_close(guide.pictures(pixels), expected)


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="clip is 'local-dir:/nowhere', which open_clip cannot load"):
        ClipGuide.load("local-dir:/nowhere", CPU)

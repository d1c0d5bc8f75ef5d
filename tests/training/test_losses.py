"""The pure loss functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from mole_diffusion.core.functional import balance_loss
from mole_diffusion.pictures.training import losses
from mole_diffusion.pictures.training.denoising import denoising_loss
from mole_diffusion.training.losses import mean_per_gate


def unit(*values: float) -> torch.Tensor:
    return F.normalize(torch.tensor(values, dtype=torch.float32), dim=-1)


def test_gates_of_different_batches_count_once_each() -> None:
    weights = mean_per_gate([torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])])
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert float(balance_loss(weights[:1], normalised=True)) == pytest.approx(0, abs=1e-6)
    expected = -math.log(0.75) - math.log(0.25) - 2 * math.log(2)
    assert float(balance_loss(weights, normalised=True)) == pytest.approx(expected, rel=1e-5)


def test_global_loss_is_the_mean_distance_of_views() -> None:
    text = unit(1, 0)[None]
    views = torch.stack([unit(1, 0), unit(0, 1)])[None]
    assert float(losses.global_loss(views, text)) == pytest.approx(0.5)


def test_crops_are_compared_with_text_and_nearest_reference() -> None:
    crops = torch.stack([unit(1, 0, 0), unit(0, 1, 0)])[None]
    texts = torch.stack([unit(1, 0, 0), unit(0, 0, 1)])
    references = [torch.stack([unit(0, 0, 1), unit(0, 1, 0)]), torch.zeros(0, 3)]
    found = losses.crop_similarities(crops, texts, references)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.0], [0.5, 0.0]]]))


@pytest.mark.parametrize(
    ("against", "found"),
    [("references", [[1.0, 0.0], [0.0, 0.0]]), ("text", [[0.0, 0.0], [1.0, 0.0]])],
)
def test_crops_are_compared_with_pictures_or_words_alone(against: str, found: list[list[float]]) -> None:
    crops = torch.stack([unit(0, 1, 0), unit(1, 0, 0)])[None]
    texts = torch.stack([unit(1, 0, 0), unit(0, 0, 1)])
    references = [unit(0, 1, 0)[None], torch.zeros(0, 3)]
    torch.testing.assert_close(
        losses.crop_similarities(crops, texts, references, against), torch.tensor([found])
    )


def test_local_loss_wants_every_concept_in_a_crop_of_its_own() -> None:
    apart = torch.tensor([[[0.9, 0.1], [0.1, 0.9], [0.0, 0.0]]])
    dropped = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.0, 0.0]]])
    shared = torch.tensor([[[0.9, 0.9], [0.1, 0.1], [0.0, 0.0]]])
    found = {
        name: losses.local_loss(s, 0.5)
        for name, s in (("apart", apart), ("dropped", dropped), ("shared", shared))
    }
    assert float(found["apart"][0]) < float(found["shared"][0]) < float(found["dropped"][0])
    assert float(found["apart"][1]) < 1e-4
    assert float(found["shared"][1]) == pytest.approx(math.log(2), rel=1e-4)
    attraction = losses.local_loss(shared, 0.0)[0]
    assert float(attraction) == pytest.approx(0.1, abs=1e-3)


def test_one_concept_has_no_contrast() -> None:
    assert float(losses.local_loss(torch.rand(2, 5, 1), 1.0)[1]) == 0


def test_released_formula() -> None:
    picture, prompt = unit(1, 0, 0)[None], unit(1, 0, 0)[None]
    reference, name = unit(0, 1, 0), unit(0, 1, 0)
    # The picture lies on the prompt, and away from the reference just as the prompt from the name: g = d = 0.
    loss = losses.released_loss(picture, prompt, [reference[None]], name[None])
    assert float(loss) == pytest.approx(-math.log(1.25), rel=1e-5)
    worst = losses.released_loss(-picture, prompt, [reference[None]], name[None])
    assert math.isfinite(float(worst))
    assert float(worst) > 1


def test_denoising_loss_weighs_the_objects() -> None:
    prediction, target = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    inside = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    prediction[..., 0, 0], prediction[..., 1, 1] = 1.0, 2.0
    assert float(denoising_loss(prediction, target, inside)) == pytest.approx(1)
    assert float(denoising_loss(prediction, target, 0.5 + 0.5 * inside)) == pytest.approx(3 / 2.5)
    whole = denoising_loss(prediction, target, torch.ones_like(inside))
    assert float(whole) == pytest.approx(5 / 4)
    torch.testing.assert_close(denoising_loss(prediction, target), whole)
    torch.testing.assert_close(denoising_loss(prediction.half(), target, 3 * inside), torch.tensor(1.0))

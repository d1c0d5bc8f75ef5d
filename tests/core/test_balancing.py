"""A style and the subjects in it are kept in balance: what is led on, when, and who notices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny.networks import LATENT, TEXT, WIDTH, make_experts, make_unet
from torch import Tensor

from mole_diffusion.core.auto import Auto, AutoSettings
from mole_diffusion.core.balancing import balanced
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.mixture import Mixture, inject

# Of scale 0 an expert would be left out, and the others would have its share.
NOTHING = 1e-30


def _led(subject: float, style: float, weights: Tensor, balance: float = 1.0) -> Tensor:
    """(R, 1, 1, T) by how much a prediction moves, where subject and style change it by so much."""
    all_ = torch.zeros(len(weights), 1, 1, weights.shape[1])
    return balanced(all_, lambda left: all_ - (subject if left == "subjects" else style), weights, balance)


@pytest.mark.parametrize(
    ("subject", "style", "expected"),
    [
        (1.0, 1.0, 0.0),
        (1.0, math.exp(0.2), 4.5 * 0.2),  # the subject is behind
        (1.0, 50.0, 2.25),  # at most
        (math.exp(0.1), 1.0, 4.5 * 0.1),  # the style is
        (50.0, 1.0, 0.7),
    ],
)
def test_what_is_behind_is_led_on_by_how_much_it_is(subject: float, style: float, expected: float) -> None:
    weights = torch.ones(1, 4, 1)
    torch.testing.assert_close(_led(subject, style, weights), torch.full((1, 1, 1, 4), expected))
    # Where a subject shall change more, it is behind earlier.
    torch.testing.assert_close(
        _led(2.0 * subject, style, weights, balance=2.0),
        torch.full((1, 1, 1, 4), expected * (2.0 if subject < style else 1.0)),
    )


def test_each_place_is_led_by_whose_it_is() -> None:
    without = {"subjects": torch.tensor([1.0, 1.0, 4.0, 4.0]), "styles": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    weights = torch.zeros(1, 4, 3)
    weights[0, 0, 0] = weights[0, 1, 0] = weights[0, 2, 1] = 1.5  # the last place is nobody's
    moved = balanced(torch.zeros(1, 1, 2, 2), lambda left: -without[left].view(1, 1, 2, 2), weights, 1.0)
    behind = 4.5 * math.log(2.0)
    expected = torch.tensor([min(behind, 2.25), min(behind, 2.25), min(behind, 0.7) * 2.0, 0.0])
    torch.testing.assert_close(moved.flatten(), expected)


class _Scene:
    """A UNet with two subjects and a style, drawn by `auto`: rows of negative prompts, then of prompts.

    Args:
        named: by prompt, whom it names: indices of experts.
        apart: whether rows may be run apart.
    """

    def __init__(self, named: list[tuple[int, ...]], *, apart: bool = True) -> None:
        self.unet = make_unet()
        self.mixture: Mixture = inject(self.unet, make_experts(3, self.unet), MoLEConfig())
        names, count = self.mixture.expert_names, len(named)
        generator = torch.Generator().manual_seed(3)
        self.latent = torch.randn(2 * count, 4, LATENT, LATENT, generator=generator)
        self.text = torch.randn(2 * count, TEXT, WIDTH, generator=generator)
        places = torch.zeros(2 * count, TEXT, 3)
        for row, own in enumerate(named, start=count):
            for expert in own:
                places[row, 1 + expert, expert] = 1.0
        self.auto = Auto({}, {names[2]: 1.0}, AutoSettings(), rows_apart=apart)
        self.auto.by_row = frozenset(names)
        self.auto.remember(self.text, places, [False] * count + [True] * count)
        self.activate()

    def activate(self) -> None:
        """Begin a picture."""
        self.mixture.activate(auto=self.auto)

    @torch.no_grad()
    def run(self, *times: int, **options: Any) -> list[Tensor]:
        """Predictions at timesteps of 0 to 999."""
        return [self.unet(self.latent, time, self.text, **options).sample for time in times]


TIMES = (999, 850, 749, 666, 582, 499, 416, 332, 100)


def test_every_second_step_is_balanced_while_shapes_form() -> None:
    scene = _Scene([(0, 1, 2)])
    found = scene.run(*TIMES)
    scene.auto.settings = AutoSettings(balance=0.0)
    scene.activate()
    plain = scene.run(*TIMES)
    changed = [not torch.equal(one, other) for one, other in zip(found, plain, strict=True)]
    assert changed == [time in (749, 582, 416) for time in TIMES]
    # Guidance leads away from what negative prompts predict.
    assert all(torch.equal(one[0], other[0]) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_changed_is_what_subjects_and_style_change(apart: bool) -> None:
    scene = _Scene([(0, 1, 2)], apart=apart)
    found = scene.run(*TIMES[:3])[-1][1:]
    scene.auto.settings = AutoSettings(balance=0.0)
    context, without = scene.mixture._context, {}
    for left, scales in (
        ("nobody", [1.0, 1.0, 1.0]),
        ("subjects", [NOTHING, NOTHING, 1.0]),
        ("styles", [1.0, 1.0, NOTHING]),
    ):
        scene.activate()
        scene.run(*TIMES[:2])  # the same places
        context.activation = replace(context.activation, scales=torch.tensor(scales))
        without[left] = scene.run(TIMES[2])[0][1:]
    weights = context.activation.shares._laid.weights(LATENT, LATENT)[1:]  # type: ignore[union-attr]
    expected = balanced(without["nobody"], lambda left: without[left], weights, AutoSettings().balance)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, without["nobody"], atol=1e-3)


def test_pictures_without_a_style_are_left_alone() -> None:
    named: list[tuple[int, ...]] = [(0, 1), (0, 1, 2), (2,)]
    scene = _Scene(named)
    found = scene.run(*TIMES[:3])[-1]
    scene.auto.settings = AutoSettings(balance=0.0)
    scene.activate()
    plain = scene.run(*TIMES[:3])[-1]
    assert [not torch.equal(one, other) for one, other in zip(found, plain, strict=True)] == [False] * 4 + [
        True,
        False,
    ]


def test_nobody_else_sees_the_forwards_in_between() -> None:
    scene = _Scene([(0, 1, 2)])
    seen: list[dict[str, Tensor]] = []
    scene.unet.register_forward_hook(lambda *_: seen.append(scene.mixture.live_weights()))
    scene.run(*TIMES)
    scene.auto.settings = AutoSettings(balance=0.0)
    scene.activate()
    scene.run(*TIMES)
    assert len(seen) == 2 * len(TIMES)
    for one, other in zip(seen[: len(TIMES)], seen[len(TIMES) :], strict=True):
        torch.testing.assert_close(one, other)


def test_a_list_that_the_network_empties_is_there_again() -> None:
    """As diffusers' UNet does with what a T2I-Adapter says, and ComfyUI with what a ControlNet says."""
    scene = _Scene([(0, 1, 2)])
    block = scene.unet.down_blocks[0]
    shapes: list[torch.Size] = []
    handle = block.resnets[-1].register_forward_hook(lambda *given: shapes.append(given[-1].shape))
    scene.run(999)
    handle.remove()
    given: list[bool] = []
    block.register_forward_pre_hook(
        lambda _, args, kwargs: given.append("additional_residuals" in kwargs), with_kwargs=True
    )
    for time in TIMES[:3]:
        scene.run(time, down_intrablock_additional_residuals=[torch.ones(shapes[0])])
    assert given == [True] * 5


def test_hooks_go_with_the_mixture() -> None:
    scene = _Scene([(0, 1, 2)])
    before = len(scene.unet._forward_hooks), len(scene.unet._forward_pre_hooks)
    scene.run(*TIMES[:3])
    assert len(scene.unet._forward_hooks) == before[0] + 1
    scene.mixture.activate()
    assert (len(scene.unet._forward_hooks), len(scene.unet._forward_pre_hooks)) == before

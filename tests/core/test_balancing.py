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
from mole_diffusion.core.balancing import Lead, balanced
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.gated_balance import GATED_BALANCE, Styled
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.core.predictions import by_place, like_prediction

# Of scale 0 an expert would be left out, and the others would have its share.
NOTHING = 1e-30


def _led(subject: float, style: float, weights: Tensor, balance: float = 1.0) -> Tensor:
    """(R, T, 1) by how much a prediction moves, where subject and style change it by so much."""
    all_ = torch.zeros(len(weights), weights.shape[1], 1)
    changes = {"subjects": subject, "styles": style}
    return balanced(all_, lambda left: all_ - changes[left], weights, Lead(balance))


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
    torch.testing.assert_close(_led(subject, style, weights), torch.full((1, 4, 1), expected))
    # Where a subject shall change more, it is behind earlier.
    torch.testing.assert_close(
        _led(2.0 * subject, style, weights, balance=2.0),
        torch.full((1, 4, 1), expected * (2.0 if subject < style else 1.0)),
    )


def test_each_place_is_led_by_whose_it_is() -> None:
    without = {"subjects": torch.tensor([1.0, 1.0, 4.0, 4.0]), "styles": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    weights = torch.zeros(1, 4, 3)
    weights[0, 0, 0] = weights[0, 1, 0] = weights[0, 2, 1] = 1.5  # the last place is nobody's
    moved = balanced(torch.zeros(1, 4, 1), lambda left: -without[left].view(1, 4, 1), weights, Lead(1.0))
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
    lead = Lead(AutoSettings().balance_in(joint=False))
    led = balanced(by_place(without["nobody"]), lambda left: by_place(without[left]), weights, lead)
    expected = like_prediction(led, found)
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


def test_hooks_stay_on_in_the_middle_of_a_forward() -> None:
    """Some hosts choose experts there, when they know the size of the picture."""
    scene = _Scene([(0, 1, 2)])
    before = len(scene.unet._forward_hooks), len(scene.unet._forward_pre_hooks)
    found = _Gated(2, Styled(STYLES))
    expected = found.run(749)
    handle = found.unet.register_forward_pre_hook(lambda *_: found.mixture.activate())
    plain = found.run(749)
    handle.remove()
    assert not torch.equal(plain[0], expected[0])
    for options in ({}, {"auto": scene.auto}, {"styled": Styled(STYLES)}):
        scene.mixture.activate(**options)
        assert (len(scene.unet._forward_hooks), len(scene.unet._forward_pre_hooks)) == before
    found.mixture.activate(styled=Styled(STYLES))
    found.mixture.eject()
    assert not found.unet._forward_hooks
    assert not found.unet._forward_pre_hooks
    found.mixture.attach()
    assert torch.equal(found.run(749)[0], expected[0])


@pytest.mark.parametrize("times", [(749,), (999, 749, 499, 249)])
def test_the_first_steps_are_balanced_too(times: tuple[int, ...]) -> None:
    """As in a picture that is drawn over another one, or in few steps."""
    plain, found = (_Gated(2, styled).run(*times) for styled in (None, Styled(STYLES)))
    index = times.index(749)
    assert not torch.equal(found[index], plain[index])
    drawn = []
    for balance in (0.0, None):
        scene = _Scene([(0, 1, 2)])
        scene.auto.settings = AutoSettings(balance=balance)
        scene.activate()
        drawn.append(scene.run(*times)[index])
    assert not torch.equal(*drawn)


class _Gated:
    """A UNet with two subjects and a style, mixed by gates that tell the places apart.

    Args:
        rows: of the batch.
        styled: what is to be kept in balance.
    """

    def __init__(self, rows: int, styled: Styled | None) -> None:
        self.unet = make_unet()
        self.mixture: Mixture = inject(self.unet, make_experts(3, self.unet), MoLEConfig())
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.mixture.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.latent = torch.randn(rows, 4, LATENT, LATENT, generator=generator)
        self.text = torch.randn(rows, TEXT, WIDTH, generator=generator)
        self.mixture.activate(styled=styled)

    @torch.no_grad()
    def run(self, *times: int) -> list[Tensor]:
        """Predictions at timesteps of 0 to 999."""
        return [self.unet(self.latent, time, self.text).sample for time in times]


def _reader(text: Tensor, prompts: list[bool]) -> Auto:
    """What knows texts, and which of them are prompts."""
    auto = Auto({}, rows_apart=True)
    auto.remember(text, torch.zeros(*text.shape[:2], 3), prompts)
    return auto


STYLES = (make_experts(3, make_unet())[2].name,)


def test_gates_are_balanced_in_every_second_step_while_shapes_form() -> None:
    plain, found = (_Gated(2, styled).run(*TIMES) for styled in (None, Styled(STYLES)))
    changed = [not torch.equal(one, other) for one, other in zip(found, plain, strict=True)]
    assert changed == [time in (749, 582, 416) for time in TIMES]
    # Where nobody knows which are prompts, all are led on.
    assert all(not torch.equal(one, other) for one, other in zip(found[2], plain[2], strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_gates_lead_on_what_subjects_and_style_change(known: bool) -> None:
    scene = _Gated(2, None)
    prompts = [False, True] if known else [True, True]
    styled = Styled(STYLES, texts=_reader(scene.text, prompts) if known else None)
    scene.mixture.activate(styled=styled)
    found = scene.run(*TIMES[:3])[-1]
    scene.mixture.activate()
    context, without = scene.mixture._context, {}
    without["nobody"] = scene.run(TIMES[2])[0]
    places = scene.mixture.live_map()
    assert places is not None
    # Who is left out takes nobody's share with him: a scale of 0, and gates that still count him.
    for left, scales in (("subjects", [0.0, 0.0, 1.0]), ("styles", [1.0, 1.0, 0.0])):
        context.activation = replace(context.activation, scales=torch.tensor(scales))
        without[left] = scene.run(TIMES[2])[0]
    weights = (places * torch.tensor([1.0, 1.0, 0.0])[:, None, None]).flatten(2).transpose(1, 2)
    lead = Lead(GATED_BALANCE, style=2.25)
    led = balanced(by_place(without["nobody"]), lambda left: by_place(without[left]), weights, lead)
    for row, prompt in enumerate(prompts):
        expected = like_prediction(led, found)[row] if prompt else without["nobody"][row]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-3)


def test_gates_without_a_style_beside_subjects_are_left_alone() -> None:
    scene = _Gated(1, None)
    names = scene.mixture.expert_names
    for active, styles in ((names, names), (names[2:], STYLES), (names[:2], STYLES), (names, STYLES[:0])):
        scene.mixture.activate(active)
        plain = scene.run(*TIMES)
        scene.mixture.activate(active, styled=Styled(styles))
        assert all(torch.equal(one, other) for one, other in zip(scene.run(*TIMES), plain, strict=True))


def test_gates_in_training_are_left_alone() -> None:
    scene = _Gated(1, Styled(STYLES))
    scene.run(*TIMES[:2])
    found = scene.unet(scene.latent, TIMES[2], scene.text).sample
    scene.mixture.activate()
    torch.testing.assert_close(found, scene.unet(scene.latent, TIMES[2], scene.text).sample)


def test_what_looks_after_gates_goes_with_nothing_else() -> None:
    mixture = _Gated(1, None).mixture
    with pytest.raises(ConfigError, match="styled looks after gates"):
        mixture.activate(styled=Styled(STYLES), weights=dict.fromkeys(mixture.expert_names, 1.0))

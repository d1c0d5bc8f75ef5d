"""Trained gates in pipelines: styles and subjects are kept in balance while a picture is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_helpers import CLOSE
from tiny.networks import randomise

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.style_balance import InBalance

ALONE = InBalance("gates", 0.0)


@pytest.fixture
def styled(loaded: Any) -> Any:
    """Three experts, one of them a style, and gates as if they were trained."""
    for mixture in loaded.mixtures.values():
        randomise(mixture)
    loaded.ensemble.say_styles(["clock"])
    return loaded


def test_only_prompts_are_led_on_and_only_while_shapes_form(styled: Any, draw: Any) -> None:
    rows: list[int] = []
    styled.unet.conv_in.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    ours = draw(styled)
    # Timesteps of .67, .33 and 0: in one of them the prompt is run without subjects and without the style.
    assert rows == [2, 1, 1, 2, 2]
    rows.clear()
    plain = draw(styled, mixture=ALONE)
    assert rows == [2, 2, 2]
    assert (ours - plain).abs().max() > 0.01
    rows.clear()
    draw(styled, guidance_scale=1.0)
    assert rows == [1] * 5


def test_what_is_drawn_is_the_same_for_each_picture_of_a_batch(styled: Any, draw: Any) -> None:
    prompts = ["a boot and a cat", "a cat on the beach"]
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    both = draw(styled, prompts, generator=seeds)
    for index, prompt in enumerate(prompts):
        alone = draw(styled, prompt, generator=torch.Generator().manual_seed(7 + index))
        torch.testing.assert_close(both[index : index + 1], alone, **CLOSE)


@pytest.mark.parametrize("active", [["boot", "cat"], ["clock"]])
def test_without_a_style_or_without_subjects_gates_are_alone(styled: Any, draw: Any, active: Any) -> None:
    ours = draw(styled, active_experts=active)
    assert torch.equal(ours, draw(styled, active_experts=active, mixture=ALONE))


def test_afterwards_it_is_as_it_was(styled: Any, draw: Any) -> None:
    draw(styled)
    assert styled.ensemble.choice.styled is None
    assert styled.ensemble.style_balance is None
    draw(styled, mixture=ALONE)
    assert styled.ensemble.style_balance is None


def test_prompts_as_embeddings_are_led_on_in_all_rows(styled: Any, draw: Any) -> None:
    """Nobody knows which of them are prompts."""
    with styled.composing():
        own, other = styled.encode_prompt("a boot and a cat", "cpu", 1, True)
    rows: list[int] = []
    styled.unet.conv_in.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    draw(styled, None, prompt_embeds=own, negative_prompt_embeds=other)
    assert rows == [2, 2, 2, 2, 2]


def test_a_balance_that_cannot_be_is_refused(styled: Any, draw: Any) -> None:
    with pytest.raises(ConfigError, match="balance goes with gates alone, and mixture is 'la'"):
        draw(styled, mixture=InBalance("la", 1.0))
    with pytest.raises(ConfigError, match=r"balance is -1\.0"):
        draw(styled, mixture=InBalance("gates", -1.0))
    assert styled.ensemble.style_balance is None

"""Gates without training, in the core: whose words tokens are, what attention is read, what comes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tiny.networks import LATENT, TEXT, WIDTH, make_experts, make_unet
from torch import Tensor

from mole_diffusion.core.attention import AttentionMaps
from mole_diffusion.core.auto import Auto, AutoSettings
from mole_diffusion.core.auto_shares import Counting, claimed_places, shared_places, shared_rest
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.base import Forward
from mole_diffusion.core.seen_places import pictures_of
from mole_diffusion.core.words import places_of


def drawn() -> tuple[Tensor, int, Tensor]:
    """A latent, a timestep and texts."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, 4, LATENT, LATENT, generator=generator)
    return latent, 500, torch.randn(2, TEXT, WIDTH, generator=generator)


def test_phrases_are_found_wherever_they_stand() -> None:
    ids = torch.tensor([[9, 1, 2, 9, 3, 1, 2], [3, 9, 9, 9, 9, 9, 9]])
    found = places_of(ids, {"a": [[1, 2]], "b": [[3]], "c": []})
    assert found[0, :, 0].tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert found[0, :, 1].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert found[1, :, 1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert not found[..., 2].any()


def test_a_token_belongs_to_the_longest_phrase() -> None:
    found = places_of(torch.tensor([[5, 1, 2, 2]]), {"boot": [[2]], "red boot": [[1, 2]]})
    assert found[0].tolist() == [[0, 0], [0, 1], [0, 1], [1, 0]]


class _Keeping:
    """Diffusers' plain attention, which keeps the probabilities that it computes itself."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        probabilities = attn.get_attention_scores(q, k)
        if encoder_hidden_states is not None:
            self.seen.append(probabilities.unflatten(0, (len(hidden_states), -1)).mean(1))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ v))


def test_attention_is_what_diffusers_computes() -> None:
    unet, processor = make_unet(), _Keeping()
    unet.set_attn_processor(processor)
    sites = map_network(unet, "unet")
    maps = AttentionMaps(unet, sites.architecture.text_readers(sites.sites))
    latent, time, text = drawn()
    words = torch.zeros(*text.shape[:2], 2)
    words[:, 1:3, 0], words[:, 4, 1] = 1.0, 1.0
    maps.begin(words, Forward(grid=lambda tokens: (math.isqrt(tokens), math.isqrt(tokens))))
    with torch.no_grad():
        unet(latent, time, text)
    found = maps.taken()
    maps.remove()
    assert found is not None
    assert processor.seen
    sides = [math.isqrt(one.shape[1]) for one in processor.seen]
    words_of = [torch.stack([one[..., 1:3].mean(-1), one[..., 4]], 1) for one in processor.seen]
    squares = [one.unflatten(-1, (side, side)) for one, side in zip(words_of, sides, strict=True)]
    finest = (max(sides), max(sides))
    resized = [torch.nn.functional.interpolate(one, size=finest, mode="bilinear") for one in squares]
    expected = torch.stack(resized).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert maps.taken() is None


def test_places_are_shared_out() -> None:
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 0, :, 0], maps[0, 1, :, 3] = 1.0, 0.5
    settings = AutoSettings(sharpness=20.0, strength=1.5, floor=0.25)
    weights = shared_places(maps, settings, 0.8)[0].permute(1, 2, 0)
    torch.testing.assert_close(weights[:, 0], torch.tensor([1.5, 0.0, 0.0]).expand(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[:, 3], torch.tensor([0.0, 1.5, 0.0]).expand(4, 3), atol=1e-5, rtol=0)
    assert not weights[:, 1:3].any()
    for timestep, strength in ((0.7, 1.5), (0.5, 1.25), (0.3, 1.0), (0.0, 1.0)):  # it eases off
        eased = shared_places(maps, settings, timestep)[0].permute(1, 2, 0)
        torch.testing.assert_close(eased, weights * strength / 1.5)
    alone = shared_places(maps * torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), settings, 0.8)
    torch.testing.assert_close(alone[0].permute(1, 2, 0), torch.tensor([1.0, 0.0, 0.0]).expand(4, 4, 3))


def test_each_row_of_a_batch_shows_one_picture() -> None:
    """A batch of prompts, with their negatives before or behind, or one by one; else it cannot be told."""
    assert pictures_of([True, True], 2) == [0, 1]
    assert pictures_of([False, False, True, True], 2) == [0, 1, 0, 1]
    assert pictures_of([True, False, True, False], 2) == [0, 0, 1, 1]
    assert pictures_of([False, False], 2) == [0, 1]
    assert pictures_of([False, False, False], 1) == [0, 0, 0]
    assert pictures_of([True, True, False], 2) == [0, 1, None]
    assert pictures_of([False, False, False], 2) == [None, None, None]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sharpness is 0; allowed are numbers above 0"):
        AutoSettings(sharpness=0)
    for value in (float("inf"), float("nan"), None):
        with pytest.raises(ConfigError, match=rf"sharpness is {value}; allowed are numbers above 0"):
            AutoSettings(sharpness=value)
    with pytest.raises(ConfigError, match=r"until is 2; allowed are numbers from 0 to 1"):
        AutoSettings(until=2)


def _auto(mixture: Mixture, text: Tensor, settings: AutoSettings) -> None:
    """Words 1, 2 and 3 of the texts are those of the three experts."""
    auto = Auto({}, settings=settings)
    places = torch.zeros(*text.shape[:2], 3)
    for index in range(3):
        places[:, index + 1, index] = 1.0
    auto.remember(text, places)
    mixture.activate(auto=auto)


def _injected() -> tuple[UNet2DConditionModel, Mixture]:
    unet = make_unet()
    return unet, inject(unet, make_experts(3, unet), MoLEConfig())


def test_words_have_their_expert_alone_while_places_are_looked_for() -> None:
    unet, mixture = _injected()
    latent, time, text = drawn()
    _auto(mixture, text, AutoSettings(until=0.0, words=1.0))
    with torch.no_grad():
        ours = unet(latent, time, text).sample
    mixture.eject()

    # The oracle: one delta per word in keys and values of cross-attention, all of them everywhere else.
    def add(slot: Any) -> Any:
        def hook(_: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output.clone()
            for index, factors in slot.factors.items():
                own = slice(index + 1, index + 2) if slot.stream == "context" else slice(None)
                output[:, own] += factors.scaling * (args[0][:, own] @ factors.down.T) @ factors.up.T
            return output

        return slot.module.register_forward_hook(hook)

    slots = [slot for group in mixture.groups for slot in group.slots]
    assert {slot.stream for slot in slots} == {"context", "tokens"}
    handles = [add(slot) for slot in slots]
    with torch.no_grad():
        expected = unet(latent, time, text).sample
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        base = unet(latent, time, text).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-3


def test_experts_get_their_places_once_they_are_known() -> None:
    unet, mixture = _injected()
    latent, _, text = drawn()
    _auto(mixture, text, AutoSettings(until=0.5, words=1.0))
    with torch.no_grad():
        unet(latent, 900, text)
        weights = mixture.live_weights()
        assert all((value == 1).all() for name, value in weights.items() if not name.endswith(".context"))
        unet(latent, 400, text)
    weights = mixture.live_weights()
    tokens = [value for name, value in weights.items() if not name.endswith(".context")]
    assert all((value.sum(-1) > 0).all() for value in tokens)
    words = [value for name, value in weights.items() if name.endswith(".context")]
    for value in words:
        torch.testing.assert_close(value, torch.full_like(value, 1.0 / text.shape[1]))


def test_tokens_of_no_phrase_are_of_all_experts_that_the_text_names() -> None:
    text = torch.zeros(2, 6, 3)
    text[0, 1, 0] = text[0, 3, 2] = 1.0
    shared = shared_rest(text)
    rest = torch.tensor([0.5, 0.0, 0.5])
    assert torch.equal(shared[0, [0, 2, 4, 5]], rest.expand(4, 3))
    assert torch.equal(shared[0, [1, 3]], text[0, [1, 3]])
    assert not shared[1].any()  # a negative prompt names nobody


def test_words_count_less_where_a_text_names_several() -> None:
    auto = Auto({}, {"c": 1.0}, AutoSettings(words=0.75))
    rows = Counting(auto, ("a", "b", "c"), (0, 1, 2))
    text = torch.zeros(3, 5, 3)
    text[0, 1, 0] = text[0, 3, 1] = 1.0  # two
    text[1, 1, 0] = text[1, 3, 2] = 1.0  # one, and one of the whole picture
    text[2, 2, 1] = 1.0  # one
    found = rows.in_words(text)
    assert torch.equal(found[0], 0.75 * text[0])
    assert torch.equal(found[1:], text[1:])


def test_an_expert_of_the_whole_picture_has_every_token() -> None:
    unet, mixture = _injected()
    latent, time, text = drawn()
    name = mixture.expert_names[0]
    mixture.activate(auto=Auto({}, {name: 1.0}, AutoSettings(), [*_known(text)]))
    with torch.no_grad():
        ours = unet(latent, time, text).sample
        mixture.activate([name], weights={name: 1.0})
        expected = unet(latent, time, text).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("others", [True, False])
def test_a_style_beside_others_counts_more_until_details_come(others: bool) -> None:
    unet, mixture = _injected()
    latent, _, text = drawn()
    name = mixture.expert_names[2]
    settings = AutoSettings(style=1.4, style_inside=1, style_words=0.25)
    auto = Auto({}, {name: 1.0}, settings)
    places = torch.zeros(*text.shape[:2], 3)
    if others:
        places[:, 1, 0] = places[:, 2, 1] = 1.0
    auto.remember(text, places)
    mixture.activate(auto=auto)
    for timestep, strength in ((950, 1.4), (500, 1.4), (325, 1.2), (150, 1.0), (50, 1.0)):
        with torch.no_grad():
            unet(latent, timestep, text)
        for gate, weights in mixture.live_weights().items():
            in_words = gate.endswith(".context")
            expected = (settings.style_words if in_words else strength) if others else 1.0
            torch.testing.assert_close(weights[:, 2], torch.full_like(weights[:, 2], expected))


def test_a_style_gives_way_in_the_places_of_others() -> None:
    unet, mixture = _injected()
    latent, _, text = drawn()
    style, other = mixture.expert_names[2], mixture.expert_names[0]
    auto = Auto({}, {style: 1.0}, AutoSettings(style=1.4, style_inside=0.5))
    places = torch.zeros(*text.shape[:2], 3)
    places[:, 1, 0] = 1.0
    auto.remember(text, places)
    left = torch.zeros(LATENT, LATENT)
    left[:, : LATENT // 2] = 1.0
    mixture.activate(auto=auto, region_masks={other: left})
    # All of it where nobody is; for details everywhere.
    for timestep, outside, inside in ((850, 1.4, 0.7), (500, 1.4, 0.7), (325, 1.2, 0.9), (150, 1.0, 1.0)):
        with torch.no_grad():
            unet(latent, timestep, text)
        for gate, weights in mixture.live_weights().items():
            if not gate.endswith(".context"):
                expected = torch.full_like(weights[:, 2], (outside + inside) / 2)
                torch.testing.assert_close(weights[:, 2], expected)


def test_places_are_claimed_by_those_whose_words_are_looked_at() -> None:
    maps = torch.zeros(1, 2, 1, 4)
    maps[0, 0] = torch.tensor([2.0, 0.6, 0.9, 0.0])  # .3 and .45 of its peak
    maps[0, 1] = torch.tensor([0.0, 0.0, 0.0, 0.5])
    torch.testing.assert_close(claimed_places(maps)[0, 0, 0], torch.tensor([1.0, 0.0, 0.5, 1.0]))


def _known(text: Tensor) -> list[Any]:
    auto = Auto({})
    auto.remember(text, torch.zeros(*text.shape[:2], 3))
    return auto.texts


def test_a_text_that_nobody_knows_is_refused() -> None:
    unet, mixture = _injected()
    latent, time, text = drawn()
    _auto(mixture, text + 1.0, AutoSettings())
    with pytest.raises(ConfigError, match="given a text that this pipeline did not encode"):
        unet(latent, time, text)


def test_nothing_is_left_behind() -> None:
    unet, mixture = _injected()
    latent, time, text = drawn()
    mixture.eject()
    with torch.no_grad():
        before = unet(latent, time, text).sample
    mixture.attach()
    _auto(mixture, text, AutoSettings())
    with torch.no_grad():
        unet(latent, time, text)
    mixture.eject()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    with torch.no_grad():
        assert torch.equal(unet(latent, time, text).sample, before)

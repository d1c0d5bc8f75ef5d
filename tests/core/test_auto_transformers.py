"""Gates without training in denoising transformers: what attention is read, and what comes of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny.attending import kept_probabilities
from tiny.networks import make_experts
from tiny.transformers import KINDS
from torch import Tensor, nn

from mole_diffusion import Mixture, MoLEConfig, inject
from mole_diffusion.core.auto import Auto, AutoSettings
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.base import CONTEXT, EMBEDDING, TOKENS
from mole_diffusion.core.seen_attention import SeenAttention, middle

FAMILIES = {kind.__name__: kind for kind in KINDS}
families = pytest.mark.parametrize("name", FAMILIES)
SIZE = 8
# The text's tokens that are words of the three experts.
WORDS = (1, 2, 4)


def drawn(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A network and what it reads."""
    known = KINDS[FAMILIES[name]]
    return known.make(**settings), known.inputs(SIZE)


def texts_of(given: dict[str, Any]) -> Any:
    return given["cap_feats"] if "cap_feats" in given else given["encoder_hidden_states"]


def timed(given: dict[str, Any], noise: float) -> dict[str, Any]:
    """The same at another time, from 1 (noise) to 0."""
    scale = 1000.0 if "timestep" in given and given["timestep"].max() > 1 else 1.0
    time = torch.full((2,), (1.0 - noise) if "t" in given else noise * scale)
    return {**given, ("t" if "t" in given else "timestep"): time}


def run(network: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = network(**given, return_dict=False)[0]
    return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found


def places_of_words(given: dict[str, Any], *, experts: int = 3) -> list[Tensor]:
    """(L, N) of each text: expert i has the token WORDS[i]."""
    found = []
    for text in texts_of(given):
        places = torch.zeros(len(text), experts)
        for index in range(experts):
            places[WORDS[index], index] = 1.0
        found.append(places)
    return found


def auto_for(given: dict[str, Any], settings: AutoSettings | None = None) -> Auto:
    auto = Auto({}, settings=settings or AutoSettings())
    auto.remember(texts_of(given), places_of_words(given))
    return auto


def mixed(network: nn.Module) -> Mixture:
    return inject(network, make_experts(3, network), MoLEConfig())


@families
def test_attention_is_what_diffusers_computes(name: str) -> None:
    """Behind norms and rotations, with masks, in whichever order image and text lie."""
    network, given = drawn(name)
    layout = map_network(network)
    looking = layout.architecture.looking(layout.sites)
    assert looking is not None
    seen = SeenAttention(network, looking)
    forward = layout.architecture.forward((), given, None)
    words = torch.nn.utils.rnn.pad_sequence(places_of_words(given), batch_first=True)
    with kept_probabilities(network) as kept:
        seen.begin(words, forward)
        run(network, given)
        found = seen.taken()
    assert found is not None
    assert len(kept) == len(looking.modules)
    expected, tokens = [], found.shape[-2] * found.shape[-1]
    for one in kept:
        image = forward.spans[TOKENS].start if forward.spans else 0
        start = forward.spans[CONTEXT].start if forward.spans else 0
        expected.append(one[:, image : image + tokens][..., [start + word for word in WORDS]])
    laid = torch.stack(expected).mean(0).transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, laid, atol=1e-6, rtol=1e-4)
    assert seen.taken() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@families
def test_words_have_their_expert_alone_while_places_are_looked_for(name: str) -> None:
    network, given = drawn(name)
    mixture = mixed(network)
    mixture.activate(auto=auto_for(given, AutoSettings(until=0.0, words=1.0)))
    ours = run(network, given)
    texts = [value.weights for label, value in mixture._context.live.items() if label.endswith(".context")]
    assert texts
    rewrites = name != "CosmosTransformer3DModel"
    layers = 3  # of a text encoder, that say something of each word to Krea 2's first blocks
    for weights in texts:
        folded = name.startswith("Krea2") and weights.shape[1] == layers * texts_of(given).shape[1]
        times = layers if folded else 1
        for index, word in enumerate(WORDS):
            own = weights[:, word * times]
            assert torch.equal(own, torch.eye(3)[index].expand(len(own), 3))
        # The rest of a text that goes on being encoded is everybody's; of one that is only read, nobody's.
        rest = torch.full((3,), 1 / 3 if rewrites else 0.0)
        torch.testing.assert_close(weights[:, 0], rest.expand(len(weights), 3))
    for group in mixture.groups:
        for stream in (TOKENS, EMBEDDING):
            value = mixture._context.live.get(group.label(stream))
            if value is not None and not group.label(stream).endswith(".context"):
                assert (value.weights == 1).all() or group.first(stream).stream == CONTEXT
    mixture.eject()
    assert (ours - run(network, given)).abs().max() > 1e-3


@families
def test_experts_get_their_places_once_they_are_known(name: str) -> None:
    network, given = drawn(name)
    mixture = mixed(network)
    mixture.activate(auto=auto_for(given))
    run(network, timed(given, 1.0))
    assert mixture.live_map() is not None
    full = mixture.live_map()
    torch.testing.assert_close(full, torch.ones_like(full))
    run(network, timed(given, 0.5))
    placed = mixture.live_map()
    assert placed is not None
    assert placed.max() > 1.0
    # Peaks of attention belong to their experts, and somebody has every such place.
    assert (placed.amax((-1, -2)) > 0.2).all()
    assert (placed - placed.mean((-1, -2), keepdim=True)).abs().max() > 1e-3


@families
def test_who_is_not_named_does_nothing_and_the_only_one_is_that_lora(name: str) -> None:
    network, given = drawn(name)
    mixture = mixed(network)
    names = mixture.expert_names
    places = [one * torch.tensor([1.0, 1.0, 0.0]) for one in places_of_words(given)]
    auto = Auto({})
    auto.remember(texts_of(given), places)
    mixture.activate(auto=auto)
    for noise in (1.0, 0.5):
        two = run(network, timed(given, noise))
    assert all((value[:, 2] == 0).all() for value in mixture.live_weights().values())
    auto = Auto({})
    auto.remember(texts_of(given), places)
    mixture.activate(names[:2], auto=auto)
    for noise in (1.0, 0.5):
        masked = run(network, timed(given, noise))
    torch.testing.assert_close(two, masked, atol=1e-5, rtol=1e-4)
    auto = Auto({}, {names[1]: 1.0})
    auto.remember(texts_of(given), [one * torch.tensor([0.0, 1.0, 0.0]) for one in places_of_words(given)])
    mixture.activate(auto=auto)
    for noise in (1.0, 0.5):
        alone = run(network, timed(given, noise))
    mixture.activate([names[1]], weights={names[1]: 1.0})
    torch.testing.assert_close(alone, run(network, timed(given, 0.5)), atol=1e-5, rtol=1e-4)


@families
def test_a_batch_is_its_singles(name: str) -> None:
    network, given = drawn(name)
    mixture = mixed(network)

    def steps(rows: slice) -> Tensor:
        mixture.activate(auto=auto_for(given))
        for noise in (1.0, 0.5):
            found = run(network, cut(timed(given, noise), rows))
        return found

    both = steps(slice(0, 2))
    for row in range(2):
        torch.testing.assert_close(both[row : row + 1], steps(slice(row, row + 1)), atol=2e-5, rtol=1e-3)


def cut(given: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some pictures of a batch."""
    shared = {name for name in given if name.endswith("_ids") or name == "padding_mask"}
    return {name: value if name in shared else value[rows] for name, value in given.items()}


def test_some_layers_in_the_middle_are_read() -> None:
    names = [f"blocks.{number}" for number in range(57)]
    found = [int(one.partition(".")[2]) for one in middle(names)]
    assert found == [17, 22, 28, 34]
    assert middle(names[:4]) == tuple(names[:4])
    assert len(middle(names[:5])) <= 4


def test_attention_that_cannot_be_seen_is_said(caplog: Any, monkeypatch: Any) -> None:
    """Another backend than torch's: equal shares of those that are named, and a sentence."""
    network, given = drawn("FluxTransformer2DModel")
    mixture = mixed(network)
    monkeypatch.setattr("mole_diffusion.core.seen_attention.F", torch.nn.init)
    monkeypatch.setattr("torch.nn.init.scaled_dot_product_attention", None, raising=False)
    mixture.activate(auto=auto_for(given))
    with caplog.at_level(logging.WARNING):
        for noise in (1.0, 0.95, 0.5):
            run(network, timed(given, noise))
    assert caplog.text.count("cannot be read") == 1
    placed = mixture.live_map()
    torch.testing.assert_close(placed, torch.full_like(placed, 1 / 3))


@families
def test_nothing_is_left_behind_also_after_an_error(name: str) -> None:
    network, given = drawn(name)
    before = run(network, given)
    mixture = mixed(network)
    mixture.activate(auto=auto_for(given))
    last = list(network.modules())[-1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(network, timed(given, 1.0))
    handle.remove()
    run(network, timed(given, 1.0))
    mixture.eject()
    assert torch.overrides._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.equal(run(network, given), before)

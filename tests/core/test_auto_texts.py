"""Gates without training: texts that hosts lengthen, cut or change, and several that draw one picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny.networks import LATENT, TEXT, WIDTH, make_experts, make_unet
from torch import Tensor

from mole_diffusion.core.auto import Auto, AutoSettings
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.mixture import Mixture, inject


def texts(count: int, length: int = TEXT) -> Tensor:
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(5))


def words(*experts: int, length: int = TEXT) -> Tensor:
    """(L, 3): each of these experts has one token, and it is number 1 + the expert's."""
    places = torch.zeros(length, 3)
    for expert in experts:
        places[1 + expert, expert] = 1.0
    return places


def remembering(*known: tuple[Tensor, Tensor]) -> Auto:
    auto = Auto({})
    for text, places in known:
        auto.remember(text[None], places[None])
    return auto


def test_texts_are_known_whatever_a_host_put_behind_them() -> None:
    one, other, empty = texts(3)
    auto = remembering((one, words(0)), (other, words(1, 2)))
    nothing = torch.zeros(TEXT, 3)
    cases = {
        "as it is": ([one], [words(0)]),
        "repeated": ([one, one], [words(0), words(0)]),
        "an empty text behind it": ([other, empty], [words(1, 2), nothing]),
        "its last token repeated": ([other, other[-1:].expand(5, -1)], [words(1, 2), nothing[:5]]),
        "two texts": ([one, other], [words(0), words(1, 2)]),
        "zeros before it": ([torch.zeros(4, WIDTH), one, empty], [nothing[:4], words(0), nothing]),
        "cut": ([other[:3]], [words(1, 2)[:3]]),
    }
    for case, (given, places) in cases.items():
        (found,) = auto.recognise(torch.cat(given)[None])
        assert found is not None, case
        assert torch.equal(found.places, torch.cat(places)), case
    assert auto.recognise(torch.stack([empty, one]))[0] is None
    (zeros,) = auto.recognise(torch.zeros(1, TEXT, WIDTH))
    assert zeros is not None
    assert zeros.prompt is False
    assert not zeros.places.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_texts_that_are_much_alike_the_nearest_is_meant(dtype: torch.dtype) -> None:
    one = texts(1)[0]
    near = one + 4e-3 * one
    auto = remembering((near, words(1)), (one, words(0)), (one.repeat(2, 1), words(2).repeat(2, 1)))
    for text, expected in ((one, 0), (near, 1), (one.repeat(2, 1), 2)):
        (found,) = auto.recognise(text.to(dtype)[None])
        assert found is not None
        assert torch.equal(found.places[:TEXT], words(expected))


class Drawing:
    """A UNet with three experts, and the texts that name them; strength is the same at all times."""

    def __init__(self, named: list[tuple[int, ...]]) -> None:
        self.unet = make_unet()
        self.mixture: Mixture = inject(self.unet, make_experts(3, self.unet), MoLEConfig())
        self.texts = texts(len(named))
        self.auto = remembering(*((one, words(*own)) for one, own in zip(self.texts, named, strict=True)))
        self.auto.settings = AutoSettings(strength=1.5, detail=1.5)
        self.mixture.activate(auto=self.auto)

    def step(self, time: int, *rows: int, size: int = LATENT) -> Tensor:
        """(B, N, size, size) where the experts act."""
        x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(time))
        with torch.no_grad():
            self.unet(x.expand(len(rows), -1, -1, -1), time, self.texts[list(rows)])
        found: Any = self.mixture.live_map()
        return found


def test_a_text_that_changes_has_the_places_of_its_own_experts() -> None:
    """Prompt editing: "[a boot:a clock:0.3] and a cat"."""
    drawing = Drawing([(0, 1), (2, 1), ()])
    first = drawing.step(950, 2, 0)
    assert torch.equal(first[1].amax((-1, -2)) > 0, torch.tensor([True, True, False]))
    placed = drawing.step(700, 2, 0)
    assert (placed[:, 2] == 0).all()
    # The clock was never looked for: now it is, and the cat stays in its place.
    changed = drawing.step(600, 2, 1)
    assert (changed[:, 0] == 0).all()
    torch.testing.assert_close(changed[:, 2], torch.ones_like(changed[:, 2]))
    assert (changed[1, 1] > 0).any()
    settled = drawing.step(500, 2, 1)
    assert (settled[:, 0] == 0).all()
    assert settled[1, 2].max() > 1.0  # `strength`, in a place of its own
    torch.testing.assert_close(settled[0], settled[1])
    back = drawing.step(400, 2, 0)
    torch.testing.assert_close(back[1], placed[1])


def test_several_texts_of_one_picture_each_have_their_own_experts() -> None:
    """ "a boot and a clock AND a cat", all at once, or one after the other where they differ in length."""
    rows = [(0, 2), (1,), ()]
    together, apart = Drawing(rows), Drawing(rows)
    together.auto.single = apart.auto.single = True
    for time in (950, 920, 600, 300):
        once = together.step(time, 0, 1, 2)
        parts = [apart.step(time, row)[0] for row in range(3)]
        torch.testing.assert_close(torch.stack(parts), once)
    assert (once[0, 1] == 0).all()
    assert once[0, [0, 2]].amin((0, 1, 2)) >= 0
    torch.testing.assert_close(once[1, 1], torch.ones_like(once[1, 1]))
    # The negative prompt has the places of all experts of its picture.
    assert (once[2].amax((-1, -2)) > 0).all()


def test_a_picture_that_is_drawn_on_keeps_its_places() -> None:
    """Hires fix goes back to half the noise, in another size."""
    drawing = Drawing([(0, 1), ()])
    drawing.step(950, 1, 0)
    placed = drawing.step(100, 1, 0)
    drawing.auto.continues = True
    larger = drawing.step(500, 1, 0, size=2 * LATENT)
    assert larger.shape[-1] == 2 * LATENT
    shrunk = torch.nn.functional.avg_pool2d(larger, 2)
    assert (shrunk - placed).abs().mean() < 0.1
    assert (placed < 0.99).any()
    drawing.auto.continues = False
    other = drawing.step(700, 1, 0)  # another picture, begun from another one
    assert torch.equal(other[:, :2], torch.ones_like(other[:, :2]))

"""Experts without gates in the web UI: what the diffusers pipeline draws with `mixture="auto"`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.sd import build, make_components, with_experts, write_loras
from tiny.shared import randomised
from torch import Tensor

from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.style_balance import InBalance, keeping_styles

from .conftest import World, make_world
from .host_models import TINY

NAMES = {"boot": 2, "cat": 4, "clock": 3}
THREE = {"experts": dict.fromkeys(NAMES, 1.0)}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PROMPT = "a boot and a cat on the beach"
MIXED = "MoLE mixed by"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Path]]:
    folder = tmp_path_factory.mktemp("tiny")
    components = make_components(folder)
    return components, write_loras(folder, components, NAMES, textless=["clock"])


@pytest.fixture
def tiny(made: Any, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The host with the tiny Stable Diffusion in it, and the LoRAs in its folder."""
    components, files = made
    world = make_world(flavour, tmp_path, monkeypatch, gates=False)
    for file in files.values():
        shutil.copy(file, tmp_path / "Lora")
    model = TINY[flavour](build(StableDiffusionMoLEPipeline, components))
    world.models.clear()
    world.models["base"] = model
    world.host.sd_models.checkpoints.clear()
    world.host.sd_models.checkpoints["base"] = world.host.shared.sd_model = model
    return world


@pytest.fixture
def pipe(made: Any) -> StableDiffusionMoLEPipeline:
    """The oracle."""
    components, files = made
    return with_experts(build(StableDiffusionMoLEPipeline, components), files)


def drawn(
    pipe: Any, prompt: str = PROMPT, negative: str = "", *, mixture: Any = "auto", **choice: Any
) -> Tensor:
    """What the host's sampler makes of the pipeline's own predictions."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pipe.composing(mixture=mixture, **choice), keeping_styles(pipe):
        cond, uncond = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative or None)
        for time in (960.0, 660.0, 360.0):
            found = pipe.unet(x.repeat(2, 1, 1, 1), time, torch.cat([uncond, cond])).sample
            x = x - 0.2 * (found[:1] + 5.0 * (found[1:] - found[:1]))
    return x


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, **CLOSE)


def draw(tiny: World, settings: dict[str, Any] = THREE, **options: Any) -> tuple[Tensor, dict[str, Any], Any]:
    """(pictures, PNG info of the last one, comments)"""
    p = tiny.processing([settings], **{"prompt": PROMPT, **options})
    processed = tiny.host.processing.process_images(p)
    assert not tiny.host.script_callbacks.failures
    assert tiny.is_clean()
    assert "get_learned_conditioning" not in vars(tiny.models["base"])
    return torch.cat(processed.images), processed.infotexts[-1], [c for c in p.comments if "share" in c]


@pytest.mark.parametrize("negative", ["", "a dull red beach"])
def test_without_gates_it_draws_what_auto_draws_in_diffusers(tiny: World, pipe: Any, negative: str) -> None:
    expected = drawn(pipe, negative=negative)
    picture, info, said = draw(tiny, negative_prompt=negative)
    torch.testing.assert_close(picture, expected, **CLOSE)
    assert info["MoLE gates"] == "auto"
    assert MIXED not in info
    assert not said
    for other in ("equal shares", None):
        settings = {**THREE, "gates": other} if other else {"enabled": False}
        assert not close(draw(tiny, settings, negative_prompt=negative)[0], picture)


def test_shared_gates_refine_it_as_in_diffusers(tiny: World, pipe: Any) -> None:
    file = tiny.folder / "mole" / "shared.safetensors"
    randomised(SharedGates.fresh(pipe.mixtures)).save(file)
    # Beside the clock, which counts everywhere, nothing is refined.
    named = {"experts": {"boot": 1.0, "cat": 1.0}}
    before = drawn(pipe, active_experts=["boot", "cat"])
    pipe.load_shared_gates(file)
    picture, info, said = draw(tiny, {**named, "gates": "shared"})
    torch.testing.assert_close(picture, drawn(pipe, active_experts=["boot", "cat"]), **CLOSE)
    assert not close(picture, before)
    assert info["MoLE gates"] == "shared"
    assert MIXED not in info
    assert not said
    torch.testing.assert_close(draw(tiny, named)[0], before, **CLOSE)
    picture, info, said = draw(tiny, {**THREE, "gates": "shared"})
    assert info[MIXED] == "auto, as 'clock' counts in the whole picture"
    assert "auto instead of shared gates: 'clock' counts in the whole picture" in str(said)
    torch.testing.assert_close(picture, draw(tiny)[0], **CLOSE)


def test_shared_gates_of_another_base_are_refused(tiny: World, tmp_path: Path) -> None:
    parts = {"unet": {"gates": ["one"], "base": {"class": "Other", "matrices": "none"}}}
    (tiny.folder / "mole").mkdir(exist_ok=True)
    SharedGates(parts).save(tiny.folder / "mole" / "shared.safetensors")
    p = tiny.processing([{**THREE, "gates": "shared"}], prompt=PROMPT)
    with pytest.raises(Exception, match="other matrices"):
        tiny.host.processing.process_images(p)
    assert tiny.is_clean()


def test_strengths_and_experts_that_are_switched_off(tiny: World, pipe: Any) -> None:
    settings = {
        "experts": [{"name": "boot", "scale": 0.5}, {"name": "cat"}, {"name": "clock", "active": False}]
    }
    for prompt in (PROMPT, "a clock and a boot on a cat"):
        found = draw(tiny, settings, prompt=prompt)[0]
        expected = drawn(pipe, prompt, active_experts=["boot", "cat"], expert_scales={"boot": 0.5})
        torch.testing.assert_close(found, expected, **CLOSE)
    alone = {"experts": [{"name": "cat"}, {"name": "boot", "active": False}]}
    torch.testing.assert_close(draw(tiny, alone)[0], drawn(pipe, active_experts=["cat"]), **CLOSE)


def test_regions(tiny: World, pipe: Any) -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    sides = {"experts": [{"name": "boot", "region": "left half"}, {"name": "cat", "region": "right half"}]}
    masks = {"boot": left, "cat": 1 - left}
    expected = drawn(pipe, active_experts=["boot", "cat"], region_masks=masks)
    torch.testing.assert_close(draw(tiny, sides)[0], expected, **CLOSE)
    pictures = draw(tiny, sides, n_iter=2)[0]  # the second batch has them too
    torch.testing.assert_close(pictures[:1], expected, **CLOSE)
    assert not close(pictures[1:], draw(tiny, {"experts": ["boot", "cat"]}, n_iter=2)[0][1:])


def test_a_prompt_that_names_one_or_none(tiny: World, pipe: Any) -> None:
    for prompt in ("a red cat", "the beach"):
        picture, info, _ = draw(tiny, prompt=prompt)
        torch.testing.assert_close(picture, drawn(pipe, prompt), **CLOSE)
        assert MIXED not in info
    p = tiny.processing([THREE], prompt="a red cat")
    tiny.host.processing.process_images(p)
    # Their files say no phrase.
    assert sum("it counts everywhere" in comment for comment in p.comments) == 2


def test_weighed_words_are_words(tiny: World, pipe: Any) -> None:
    """Parentheses in the middle of a phrase, too; a weight of one changes nothing."""
    plain = draw(tiny)[0]
    torch.testing.assert_close(
        draw(tiny, prompt="a (boot:1.0) and a (cat on the:1.0) beach")[0], plain, **CLOSE
    )
    heavy, info, said = draw(tiny, prompt="a (boot:1.4) and a cat on the beach")
    assert not close(heavy, plain)
    assert not said
    assert MIXED not in info


def places(tiny: World, settings: dict[str, Any] = THREE, **options: Any) -> list[Tensor]:
    """(rows, N) mean weight of image tokens, in every forward of the UNet."""
    found: list[Tensor] = []

    def look(*_: Any) -> None:
        mixture = tiny.session.attachment.mixtures["unet"]
        weights = [one for name, one in mixture.live_weights().items() if not name.endswith(".context")]
        found.append(torch.stack(weights).mean(0))

    handle = tiny.models["base"].unet.register_forward_hook(look)
    p = tiny.processing([settings], **options)
    tiny.host.processing.process_images(p)
    handle.remove()
    assert not tiny.host.script_callbacks.failures
    assert not any("shares" in comment for comment in p.comments)
    return found


def prompts_of(tiny: World, found: list[Tensor], count: int = 1) -> list[list[list[bool]]]:
    """Which experts act, in the rows of the prompts."""
    first = tiny.models["base"].conditional_first
    return [((rows[:count] if first else rows[-count:]) > 0).tolist() for rows in found]


def test_prompt_editing_exchanges_the_expert(tiny: World) -> None:
    found = places(tiny, prompt="a [boot:clock:0.4] and a cat")
    first, *later = prompts_of(tiny, found)
    assert first == [[True, True, False]]
    assert later == [[[False, True, True]]] * 2


def test_parts_between_and_have_their_own_experts(tiny: World) -> None:
    found = places(tiny, prompt="a boot and a clock AND a red cat")
    assert prompts_of(tiny, found, 2) == [[[True, False, True], [False, True, False]]] * 3
    # One part is longer than the others and the negative prompt: the host draws them one after another.
    longer = "a boot and a clock AND a red cat on the beach and the snow on the dull beach"
    found = places(tiny, prompt=longer)
    assert len(found) == 6
    assert [rows.tolist()[0][1] > 0 for rows in found] == [False, True] * 3


def test_chunks_and_break(tiny: World) -> None:
    """Words beyond the first chunk count, and a chunk without words of experts is the base's own."""
    long = "a red boot on the dull beach and the snow and a cat and a clock"
    for prompt in (long, "a boot BREAK a cat on the beach BREAK a clock"):
        found = places(tiny, prompt=prompt)
        assert all(rows[0] == [True] * 3 for rows in prompts_of(tiny, found))
        assert len(found) == 6  # the negative prompt is shorter, and has the same places
        torch.testing.assert_close(found[4], found[5])


def test_a_batch_is_its_singles(tiny: World) -> None:
    two = {"experts": ["boot", "clock"]}
    prompts = ["a boot and a clock", "the beach and a clock on a boot"]
    for order in (prompts, prompts[::-1]):
        both = draw(tiny, two, prompt=order, batch_size=2)[0]
        torch.testing.assert_close(both[:1], draw(tiny, two, prompt=order[0])[0], **CLOSE)
    # A prompt that names nobody is the base's own, and the other one of the batch is not.
    named = prompts_of(tiny, places(tiny, two, prompt=["a dull beach", prompts[0]], batch_size=2), 2)
    assert named == [[[False, False], [True, True]]] * 3


def test_hires_fix_goes_on_with_the_places_of_the_first_pass(tiny: World) -> None:
    found = places(tiny, prompt=PROMPT, hr_size=(12, 14))
    assert len(found) == 6
    rows = [rows[0 if tiny.models["base"].conditional_first else -1] for rows in found]
    # In full while the layout forms, never again.
    assert [bool((row[:2] == 1).all()) for row in rows] == [True, False, False, True, False, False]


def shares_instead(tiny: World, why: str, **options: Any) -> Tensor:
    """A picture that is drawn with equal shares, and says so."""
    settings = options.pop("settings", THREE)
    picture, info, said = draw(tiny, settings, **options)
    assert info["MoLE gates"] == "auto"
    assert info[MIXED] == f"equal shares, as {why}"
    assert said == [f"MoLE: equal shares instead of auto: {why}"]
    return picture


def test_what_cannot_be_told_apart_has_equal_shares_and_says_so(tiny: World) -> None:
    why = "AND in a batch of several pictures: draw them one after another (batch size 1)"
    options = {"prompt": "a boot AND a cat", "batch_size": 2}
    picture = shares_instead(tiny, why, **options)
    torch.testing.assert_close(picture, draw(tiny, {**THREE, "gates": "equal shares"}, **options)[0])
    picture = shares_instead(tiny, "Token merging of the web UI is on", token_merging_ratio=0.5)
    tiny.host.shared.opts.data["use_old_emphasis_implementation"] = True
    torch.testing.assert_close(shares_instead(tiny, "Old emphasis of the web UI is on"), picture)
    del tiny.host.shared.opts.data["use_old_emphasis_implementation"]
    state = load_file(tiny.folder / "Lora" / "boot.safetensors")
    for name in ("one", "two"):
        path = tiny.folder / "Lora" / f"{name}.safetensors"
        save_file(state, path, {"mole.trigger": "a red boot"})
    twins = {"experts": ["one", "two", "cat"]}
    shares_instead(tiny, "'one' and 'two' are called by the same words", settings=twins)


def test_a_style_that_some_texts_name_has_equal_shares(tiny: World) -> None:
    state = load_file(tiny.folder / "Lora" / "clock.safetensors")
    save_file(state, tiny.folder / "Lora" / "ink.safetensors", {"mole.trigger": "dull", "mole.kind": "style"})
    settings = {"experts": ["boot", "cat", "ink"]}
    assert MIXED not in draw(tiny, settings, prompt="a dull boot and a cat")[1]
    why = "the style 'ink' is named in some of the texts and not in others"
    for options in (
        {"prompt": "a [dull::0.5] boot and a cat"},
        {"prompt": "a dull boot AND a cat"},
        {"prompt": ["a dull boot", "a cat"], "batch_size": 2},
    ):
        shares_instead(tiny, why, settings=settings, **options)


@pytest.mark.parametrize("gates", ["auto", "trained"])
def test_a_style_and_a_subject_are_kept_in_balance_as_in_diffusers(
    tiny: World, made: Any, gates: str
) -> None:
    pipe = build(StableDiffusionMoLEPipeline, made[0])
    for name, file in ink_and_boot(tiny).items():
        pipe.load_expert(file, name=name)
    prompt, two = "a dull boot on the beach", {"experts": ["boot", "ink"]}
    left_alone: Any = AutoMixture(AutoSettings(balance=0.0))
    if gates == "trained":
        randomised(torch.nn.ModuleList(mixture.gates for mixture in pipe.mixtures.values()))
        pipe.save_gates(tiny.folder / "mole" / "trained.safetensors")
        two, left_alone = {**two, "gates": "trained"}, InBalance("gates", 0.0)
    usual = "gates" if gates == "trained" else "auto"
    picture = draw(tiny, two, prompt=prompt)[0]
    torch.testing.assert_close(picture, drawn(pipe, prompt, mixture=usual), **CLOSE)
    assert not close(picture, drawn(pipe, prompt, mixture=left_alone))


def ink_and_boot(tiny: World) -> dict[str, Path]:
    """A style beside a subject, in the host's folder."""
    folder = tiny.folder / "Lora"
    state = load_file(folder / "cat.safetensors")
    save_file(state, folder / "ink.safetensors", {"mole.trigger": "dull", "mole.kind": "style"})
    (tiny.folder / "mole").mkdir(exist_ok=True)
    return {name: folder / f"{name}.safetensors" for name in ("boot", "ink")}


def test_texts_of_others_have_equal_shares_from_then_on(tiny: World) -> None:
    """Another extension puts texts of its own in place of the host's, in the second step."""

    def other(params: Any) -> None:
        if params.sampling_step == 1:
            p.c = [[[(3, torch.ones(12, 24))]]]

    p = tiny.processing([THREE], prompt=PROMPT)
    tiny.host.script_callbacks.callbacks["cfg_denoiser"].append(other)
    processed = tiny.host.processing.process_images(p)
    tiny.host.script_callbacks.callbacks["cfg_denoiser"].remove(other)
    why = "the UNet was given a text that the web UI did not encode for this picture"
    assert processed.infotexts[0][MIXED] == f"auto, then equal shares, as {why}"
    assert f"MoLE: equal shares instead of auto: {why}" in p.comments
    assert tiny.is_clean()


def test_a_refiner_reads_the_prompt_too_or_says_that_it_could_not(tiny: World, made: Any) -> None:
    """It comes back from memory without a word, and its texts are encoded before anybody knows of it."""
    refiner = TINY[tiny.flavour](build(StableDiffusionMoLEPipeline, made[0]))
    tiny.models["refiner"] = tiny.host.sd_models.checkpoints["refiner"] = refiner
    for mixed in (False, True):
        p = tiny.processing([THREE], prompt=PROMPT, refiner=("refiner", 1))
        info = tiny.host.processing.process_images(p).infotexts[0]
        assert not tiny.host.script_callbacks.failures
        assert (MIXED in info) == mixed
        assert tiny.is_clean()
        assert "get_learned_conditioning" not in vars(refiner)
    assert info[MIXED].startswith("auto, then equal shares, as the UNet was given a text")


def test_an_exception_inside_the_unet_leaves_nothing(tiny: World) -> None:
    """The host calls no script then."""
    model = tiny.models["base"]
    handle = model.unet.middle_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.draw(THREE, prompt=PROMPT)
    handle.remove()
    assert tiny.session.attachment is None
    assert "get_learned_conditioning" not in vars(model)
    draw(tiny)


def test_the_next_batch_is_read_anew(tiny: World) -> None:
    """One batch of two cannot be told apart, and the host keeps what it encoded for it."""
    prompts = ["a boot AND a cat", "a boot AND a cat", "a boot and a cat", "a boot and a cat"]
    p = tiny.processing([THREE], prompt=prompts, n_iter=2, batch_size=2)
    infos = tiny.host.processing.process_images(p).infotexts
    assert [MIXED in info for info in infos] == [True, False]


def test_a_host_that_does_not_say_how_it_reads(world: World) -> None:
    two = {"experts": {"dog": 1.0, "cat": 1.0}}
    processed = world.draw(two)
    why = "this web UI does not say how it reads prompts"
    assert processed.infotexts[0][MIXED] == f"equal shares, as {why}"
    assert torch.equal(processed.images[0], world.picture({**two, "gates": "uniform"}))

"""The starter's build: captions and scenes in batches, resumable training, experts as ordinary files."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image, ImageFilter
from torch import nn
from transformers import CLIPTokenizer

from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter import starter_dir
from mole_diffusion.starter.judge import STRIDE, presence
from tools.starter import (
    base,
    codec,
    colours,
    evaluate,
    expert,
    guidance,
    judge,
    likeness,
    loop,
    stage,
    text,
    world,
)
from tools.starter.workshop import Pool, Workshop

BATCH = 64


@cache
def shop() -> Workshop:
    """One stage for the module: it takes seconds to set up."""
    return Workshop(Path(), starter_dir(), torch.device("cpu"), hues=1)


def test_every_word_of_the_world_is_one_token(tmp_path: Path) -> None:
    made = text.build_tokenizer(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    longest = world.caption_of([world.Thing("sunglasses", "noto")] * 3, "floor", ["rysa sunglasses"] * 3)
    for tokenizer in (made, again):
        for word in filter(str.isalpha, text.words()):  # CLIP splits digits off
            assert len(tokenizer(word).input_ids) == 3, word
        assert text.tokenise(tokenizer, [longest + " in zaphel style"]).shape == (1, text.MAX_TOKENS)
        assert len(tokenizer(longest + " in zaphel style").input_ids) < text.MAX_TOKENS
    # open_clip pools at the highest id.
    assert made.eos_token_id == len(made) - 1


@pytest.mark.parametrize("described", [False, True])
def test_captions_in_numbers_are_those_of_the_tokenizer(described: bool) -> None:
    dice = shop().dice(1)
    scenes = shop().director.mixed(dice, BATCH, styled=0.5)
    words = shop().captions.trigger[dice.below(len(world.TRIGGERS), BATCH, 3)]
    numbers = shop().captions.compose(
        scenes,
        before=torch.where(dice.share(0.5, BATCH, 3), words, 0),
        colour=dice.below(len(stage.COLOURS), BATCH, 3) if described else None,
        glossy=dice.share(0.5, BATCH, 3) if described else None,
        place=dice.share(0.8, BATCH),
        style=scenes.style,
        described=described,
    )
    captions = shop().captions.text(numbers)
    assert torch.equal(shop().captions.tokens(numbers), text.tokenise(shop().tokenizer, captions))
    empty = shop().captions.tokens(numbers, torch.ones(BATCH, dtype=torch.bool))
    assert torch.equal(empty, text.tokenise(shop().tokenizer, [""] * BATCH))


def test_captions_read_like_those_of_single_scenes() -> None:
    scenes = shop().director.ordinary(shop().dice(2), BATCH)
    nothing = torch.zeros_like(scenes.kind)
    place = torch.ones(BATCH, dtype=torch.bool)
    numbers = shop().captions.compose(scenes, before=nothing, place=place, style=scenes.style)
    for row, caption in enumerate(shop().captions.text(numbers)):
        kinds = [world.CLASSES[k] for k in scenes.kind[row, : scenes.count[row]].tolist()]
        things = [world.Thing(kind, "noto") for kind in kinds]
        assert caption == world.caption_of(things, stage.BACKGROUNDS[int(scenes.background[row])])


def test_a_batch_is_drawn_as_pillow_draws_a_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = shop().director.mixed(shop().dice(3), 8)
    pictures, cover = shop().stage.draw(scenes, torch.zeros(8, dtype=torch.long))
    for row in range(8):
        count = int(scenes.count[row])
        backdrop = shop().stage.backdrops[scenes.background[row], 0].numpy().astype(np.float32)
        monkeypatch.setattr(world, "draw_background", lambda *_, plane=backdrop: plane)
        places = [
            (int(scenes.x[row, s]), int(scenes.y[row, s]), int(scenes.side[row, s]), int(scenes.side[row, s]))
            for s in range(count)
        ]
        monkeypatch.setitem(world.LAYOUTS, count, tuple(places))
        monkeypatch.setitem(world.JITTER, count, (0, 0))
        things = [
            world.Thing(world.CLASSES[int(scenes.kind[row, s])], stage.DRAWINGS[int(scenes.drawing[row, s])])
            for s in range(count)
        ]
        drawn = world.draw_scene(
            things, stage.BACKGROUNDS[int(scenes.background[row])], np.random.default_rng(0)
        )
        made = pictures[row].permute(1, 2, 0).numpy() * 255
        # A drawing that is no whole number of pixels wide lies half a pixel beside Pillow's.
        assert np.abs(made - drawn.pixels).mean() < 6
        assert np.abs(cover[row, 0].numpy() - drawn.foreground).mean() < 0.03


def test_no_scene_of_a_training_shows_a_held_out_set() -> None:
    own = torch.arange(len(world.SUBJECTS)).repeat(BATCH // 16)
    for scenes in (
        shop().director.ordinary(shop().dice(4), 8 * BATCH),
        shop().director.of_subject(shop().dice(5), own),
    ):
        for row, count in zip(scenes.kind.tolist(), scenes.count.tolist(), strict=True):
            kinds = [world.CLASSES[k] for k in row[:count]]
            assert len(set(kinds)) == count
            assert count == 1 or not world.held_out(kinds)
    assert {1, 2, 3} == set(scenes.count.tolist())


def test_scenes_of_a_subject_always_show_it_and_no_other() -> None:
    own = torch.tensor([world.CLASSES.index("clock")]).repeat(BATCH)
    scenes = shop().director.of_subject(shop().dice(6), own)
    there = torch.arange(3)[None] < scenes.count[:, None]
    shown = (scenes.kind == own[:, None]) & (scenes.drawing == stage.SUBJECT) & there
    assert shown.sum(1).eq(1).all()
    assert not ((scenes.drawing == stage.SUBJECT) & there & ~shown).any()


def test_objects_stay_inside_the_picture() -> None:
    scenes = shop().director.mixed(shop().dice(7), 8 * BATCH)
    x, y, width, height = shop().stage.boxes(scenes).unbind(-1)
    for place, size in ((x, width), (y, height)):
        assert (place - size / 2 >= -1).all()
        assert (place + size / 2 <= world.SIZE + 1).all()


def _run(folder: Path, stop: int, total: int) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def rows(number: int, count: int) -> loop.Batch:
        return {"x": torch.randn(count, 3, generator=torch.Generator().manual_seed(number))}

    pool = Pool(rows, 4, 3, every=2)

    def make(step: int) -> loop.Batch:
        if step >= stop:
            raise KeyboardInterrupt
        return pool.sample(step, 4, shop().dice(8, step))

    def loss_of(batch: loop.Batch) -> torch.Tensor:
        return (module(batch["x"]) - batch["x"][:, :2]).square().mean()

    with suppress(KeyboardInterrupt):
        settings: Any = {"steps": total, "rate": 1e-2, "average": 0.9, "checkpoint_every": 5}
        loop.train("toy", folder, module, make, loss_of, quiet=True, **settings)
    return module


def test_a_killed_run_continues_exactly(tmp_path: Path) -> None:
    straight = _run(tmp_path / "a", 20, 20)
    _run(tmp_path / "b", 12, 20)
    resumed = _run(tmp_path / "b", 20, 20)
    assert torch.equal(straight.weight, resumed.weight)


def test_networks_have_the_shapes_hosts_expect() -> None:
    made = codec.new_codec()
    picture = torch.zeros(1, 3, world.SIZE, world.SIZE)
    assert made.encode(picture).latents.shape == (1, codec.CHANNELS, 16, 16)
    unet = base.new_unet()
    assert all(width % 32 == 0 for width in unet.config.block_out_channels)
    latents = torch.zeros(1, codec.CHANNELS, 16, 16)
    assert unet(latents, 0, torch.zeros(1, 32, 192)).sample.shape == latents.shape
    assert base.new_scheduler().alphas_cumprod[-1] == 0


@pytest.mark.slow
def test_the_codec_keeps_scenes_it_has_not_seen() -> None:
    score = evaluate.codec_score(starter_dir(), 40)
    assert score["whole"] > 28
    assert score["objects"] > 25


@pytest.mark.slow
def test_the_codec_keeps_the_colours_of_every_subject() -> None:
    differences = likeness.codec_colours(starter_dir(), 2)
    assert set(differences) == set(world.SUBJECTS)
    assert max(differences.values()) < 5  # CIEDE2000; a difference of 2 to 3 is just seen side by side


def test_blurred_pictures_have_weaker_edges() -> None:
    rng = np.random.default_rng(5)
    scene = world.draw_scene([world.Thing("clock", "noto")], "snow", rng).pixels
    blurred = np.asarray(Image.fromarray(scene).filter(ImageFilter.GaussianBlur(2)))
    assert likeness.edges([blurred]) < 0.6 * likeness.edges([scene])


def test_noise_and_v_are_those_of_the_scheduler() -> None:
    noise, scheduler = base.Noise(torch.device("cpu")), base.new_scheduler()
    latents, random = torch.randn(8, 4, 4, 4), torch.randn(8, 4, 4, 4)
    timesteps = noise.timesteps(shop().dice(9), 1, 8)
    assert torch.equal(timesteps // 125, torch.arange(8))
    noisy, target = noise.add(latents, random, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, random, timesteps))
    torch.testing.assert_close(target, scheduler.get_velocity(latents, random, timesteps))
    torch.testing.assert_close(noise.clean(noisy, target, timesteps), latents, atol=1e-4, rtol=1e-4)


def test_foreground_counts_more() -> None:
    predicted, target = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    foreground = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    on, off = target.clone(), target.clone()
    on[..., 0, 0], off[..., 1, 1] = 1.0, 1.0
    ratio = base.denoising_loss(predicted, on, foreground) / base.denoising_loss(predicted, off, foreground)
    assert ratio == pytest.approx(3.0)


def test_many_loras_side_by_side_are_each_pefts() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plain = {k: v.clone() for k, v in block.state_dict().items()}
    x = torch.randn(3 * 2, 7, 6)
    holder = nn.ModuleDict({"to_q": block})
    made = expert.attach(holder, ("0", "2"), experts=3, rank=2)
    for lora in made.values():
        nn.init.normal_(lora.up)
    together = block(x)
    for number in range(3):
        single = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        single.load_state_dict(plain)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"]), single)
        for place in ("0", "2"):
            layer: Any = single.get_submodule(place)
            lora = made[f"to_q.{place}"]
            layer.lora_A["default"].weight.data = lora.down[number].T.detach().clone()
            layer.lora_B["default"].weight.data = lora.up[number].T.detach().clone()
        own = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(single(x[own]), together[own])


def test_an_expert_is_an_ordinary_lora_file(tmp_path: Path) -> None:
    unet, encoder = base.load_unet(starter_dir()), base.load_text_encoder(starter_dir())
    factors = {
        "unet": expert.attach(unet, expert.UNET_TARGETS, 2, 2),
        "text_encoder": expert.attach(encoder, expert.TEXT_TARGETS, 2, 2),
    }
    expert.write_expert(tmp_path, "boot", expert.of_one(factors, 1))
    path = tmp_path / "experts" / "boot.safetensors"
    loaded = load_expert(path)
    assert loaded.triggers == ("zorin boot",)
    assert set(loaded.factors) == {"unet", "text_encoder"}
    assert not loaded.report.ignored
    assert len(loaded.factors["text_encoder"]) == 4 * 6
    assert not list(path.parent.glob("*.tmp"))
    pipe = StableDiffusionPipeline.from_pretrained(starter_dir())
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    assert set(pipe.get_list_adapters()) == {"unet", "text_encoder"}


def _described() -> guidance.Described:
    dice = shop().dice(10)
    return guidance.describe(shop(), shop().director.mixed(dice, 4 * BATCH), dice)


def test_wrong_descriptions_say_something_else() -> None:
    described = _described()
    place = torch.ones(4 * BATCH, dtype=torch.bool)
    right = guidance.caption(shop(), described, place)
    wrong = guidance.caption(shop(), guidance.wrongly_told(described, shop().dice(11)), place)
    assert (right != wrong).any(1).all()
    swapped = guidance.caption(shop(), guidance.colours_swapped(described), place)
    two = guidance.two_colours(described)
    assert two.any()
    assert (right != swapped).any(1)[two].all()
    assert torch.equal(right.sort(1).values[two], swapped.sort(1).values[two])


def test_a_clips_second_round_is_about_colours() -> None:
    described = colours.coloured_scenes(shop(), shop().dice(13), BATCH)
    two, place = guidance.two_colours(described), torch.ones(BATCH, dtype=torch.bool)
    assert len(two) == BATCH
    assert 0.6 <= float(two.float().mean()) <= 0.9
    right = guidance.caption(shop(), described, place)
    wrong = guidance.caption(
        shop(), guidance.wrongly_told(described, shop().dice(14), colours.SWAPPED), place
    )
    assert (right != wrong).any(1).all()


@pytest.mark.slow
def test_wrong_pictures_show_something_else() -> None:
    described = _described()
    variety = torch.zeros(4 * BATCH, dtype=torch.long)
    right, _ = shop().stage.draw(described.scenes, variety)
    changed, merged = guidance.wrongly_drawn(described, shop().dice(12))
    wrong, _ = shop().stage.draw(changed, variety, merged)
    assert (right - wrong).abs().mean((1, 2, 3)).min() > 0.002
    assert (changed.count >= 1).all()
    assert merged.any()
    assert (changed.count < described.scenes.count).any()


def test_targets_of_the_judge_tell_subjects_from_classes() -> None:
    things = [world.Thing("cat", world.SUBJECT_STYLE), world.Thing("boot", "noto")]
    target = judge.target_of(world.draw_scene(things, "snow", np.random.default_rng(0)))
    named = {label for label, on in zip(judge.LABELS, target.tolist(), strict=True) if on}
    assert named == {"cat", "boot", "subject:cat"}


def test_cells_of_the_judge_name_what_stands_there() -> None:
    scenes = shop().director.mixed(shop().dice(13), BATCH)
    labels, boxes = judge.labels_of(scenes), shop().stage.boxes(scenes)
    cells = judge.cells_of(labels, boxes, scenes.count)
    for row in range(BATCH):
        for slot in range(int(scenes.count[row])):
            column, line = (int(v // STRIDE) for v in boxes[row, slot, :2].tolist())
            kind = world.CLASSES[int(scenes.kind[row, slot])]
            subject = kind in world.SUBJECTS and int(scenes.drawing[row, slot]) == stage.SUBJECT
            name = f"subject:{kind}" if subject else kind
            near = cells[row, max(0, line - 1) : line + 2, max(0, column - 1) : column + 2]
            assert (near == 1 + judge.LABELS.index(name)).any()
    assert (cells == 0).any(-1).any(-1).all()


def test_a_subject_counts_as_its_class_too() -> None:
    logits = torch.zeros(1, 1 + len(judge.LABELS), judge.CELLS, judge.CELLS)
    logits[:, 0] = 20.0
    logits[0, 1 + judge.LABELS.index("subject:cat"), 3, 4] = 40.0
    logits[0, 1 + judge.LABELS.index("boot"), 6, 6] = 40.0
    found = {
        label for label, p in zip(judge.LABELS, presence(logits, judge.LABELS)[0], strict=True) if p > 0.5
    }
    assert found == {"cat", "subject:cat", "boot"}

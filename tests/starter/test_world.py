"""The picture world: what is drawn, what is said of it, and what is kept out of training."""

import itertools

import numpy as np
import pytest

from tools.starter import world


def test_the_papers_triples_and_a_share_of_all_sets_are_held_out() -> None:
    assert all(world.held_out(triple) for triple in world.TRIPLES)
    pairs = list(itertools.combinations(world.CLASSES, 2))
    held = [pair for pair in pairs if world.held_out(pair)]
    assert 0.03 < len(held) / len(pairs) < 0.15
    # Whatever contains a held-out pair is held out with it.
    first = held[0]
    assert all(world.held_out([*first, other]) for other in world.CLASSES if other not in first)
    assert not any(world.held_out([kind]) for kind in world.CLASSES)


def test_no_training_scene_shows_a_held_out_set() -> None:
    rng = np.random.default_rng(0)
    scenes = [world.base_scene(rng) for _ in range(300)]
    assert not any(world.held_out([thing.kind for thing in scene.things]) for scene in scenes)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert not any(thing.style == world.SUBJECT_STYLE for scene in scenes for thing in scene.things)


def test_unseen_sets_are_held_out() -> None:
    rng = np.random.default_rng(1)
    assert all(world.held_out(world.random_kinds(3, rng, unseen=True)) for _ in range(20))


def test_a_scene_follows_from_its_seed_and_shows_its_objects_in_order() -> None:
    things = [world.Thing("cat", "noto"), world.Thing("boot", "noto"), world.Thing("car", "noto")]
    one, two = (world.draw_scene(things, "beach", np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.pixels, two.pixels)
    centres = [x + width / 2 for x, _, width, _ in one.boxes]
    assert centres == sorted(centres)
    assert one.caption == "a cat, a boot and a car on the beach"
    assert one.pixels.shape == (128, 128, 3)
    assert 0.1 < one.foreground.mean() < 0.6


def test_captions() -> None:
    glasses, dog = world.Thing("sunglasses", "noto"), world.Thing("dog", "noto")
    assert world.caption_of([glasses], "snow") == "a pair of sunglasses in the snow"
    assert world.caption_of([dog, glasses], None) == "a dog and a pair of sunglasses"
    assert world.caption_of([dog], "night", ["nibo dog"]) == "a nibo dog at night"


def test_every_object_has_a_drawing_in_every_style_and_subjects_differ_from_them() -> None:
    def colour(kind: str, style: str) -> np.ndarray:
        pixels = np.asarray(world.sprite(kind, style), np.float32)
        return (pixels[..., :3] * pixels[..., 3:]).sum((0, 1)) / pixels[..., 3:].sum()

    for kind in world.CLASSES:
        for style in (*world.FLAT_STYLES, world.SUBJECT_STYLE):
            assert max(world.sprite(kind, style).size) == 128
    for kind in world.SUBJECTS:
        gap = min(
            np.abs(colour(kind, world.SUBJECT_STYLE) - colour(kind, s)).max() for s in world.FLAT_STYLES
        )
        assert gap > 15, kind


def test_every_background_is_drawn_and_an_unknown_one_is_named() -> None:
    rng = np.random.default_rng(0)
    planes = [world.draw_background(name, rng) for name in world.BACKGROUNDS]
    assert all(plane.shape == (128, 128, 3) and plane.min() >= 0 and plane.max() <= 255 for plane in planes)
    with pytest.raises(ValueError, match="unknown background 'moon'; known: beach, snow"):
        world.draw_background("moon", rng)


@pytest.mark.parametrize("style", ["sketch", "blueprint"])
def test_drawn_styles_leave_lines_and_take_colours(style: str) -> None:
    scene = world.base_scene(np.random.default_rng(3))
    drawn = world.apply_style(scene.pixels, style).astype(np.float32)
    assert drawn.shape == scene.pixels.shape
    spread = drawn.reshape(-1, 3) - drawn.reshape(-1, 3).mean(0)
    # All colours lie near one line from paper to ink.
    singular = np.linalg.svd(spread, compute_uv=False)
    assert singular[0] > 4 * singular[1]


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ValueError, match="unknown style 'oil'; known: sketch, blueprint"):
        world.apply_style(np.zeros((128, 128, 3), np.uint8), "oil")


def test_print_has_three_colours_and_neon_is_dark_with_bright_lines() -> None:
    scene = world.base_scene(np.random.default_rng(3))
    printed = world.apply_style(scene.pixels, "print").reshape(-1, 3).astype(np.float32)
    inks = np.array([[252, 243, 224], [244, 96, 84], [44, 38, 104]], np.float32)
    near = np.linalg.norm(printed[:, None] - inks, axis=-1).min(1) < 60
    assert near.mean() > 0.8
    neon = world.apply_style(scene.pixels, "neon").astype(np.float32)
    assert np.median(neon) < 60
    assert neon.max() > 200

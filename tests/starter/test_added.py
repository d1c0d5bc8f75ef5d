"""What is added to a finished starter: a style that is trained by itself, and the judge's row for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter.judge import Judge
from mole_diffusion.starter.location import evaluation_part, starter_dir
from tools.starter import alone, expert, judge, world
from tools.starter.workshop import Workshop


def workshop(tmp_path: Path) -> Workshop:
    """A trial on a copy of the starter's parts that the build reads."""
    out = tmp_path / "out"
    for part in ("unet", "text_encoder", "vae", "tokenizer"):
        shutil.copytree(starter_dir() / part, out / part)
    (out / "experts").mkdir()
    rows = {name: expert.entry_of(name) for name in ("boot", "neon")}
    (out / "experts" / "experts.json").write_text(json.dumps({**rows, "gone": {}}))
    return Workshop(tmp_path / "work", out, torch.device("cpu"), 0.004, hues=1)


def test_a_style_by_itself_is_an_ordinary_file_and_joins_the_catalogue(tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    alone.train_style(shop, "print")
    loaded = load_expert(shop.out / "experts" / "print.safetensors")
    assert loaded.triggers == ("in tilku style",)
    assert set(loaded.factors) == {"unet", "text_encoder"}
    assert any(float(factor.up.abs().max()) > 0 for factor in loaded.factors["unet"].values())
    assert list(json.loads((shop.out / "experts" / "experts.json").read_text())) == ["boot", "neon", "print"]
    assert len(list((shop.out / "experts" / "print").glob("*.png"))) == 5


def test_the_judge_learns_a_style_and_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = workshop(tmp_path)
    shutil.copytree(evaluation_part("judge"), shop.out / "judge")
    monkeypatch.setattr(judge, "ADDED_SCENES", 64)
    before = load_file(shop.out / "judge" / "model.safetensors")
    judge.add_styles(shop, ("print",))
    after = load_file(shop.out / "judge" / "model.safetensors")
    row = 2 + len(judge.LABELS) + list(world.STYLES).index("print")
    assert set(before) == set(after)
    for name, old in before.items():
        changed = (old != after[name]).reshape(len(old) if old.dim() else 1, -1).any(1)
        assert changed.nonzero().flatten().tolist() == ([row] if name.startswith("1.") else []), name
    assert Judge(shop.out / "judge").threshold == Judge(evaluation_part("judge")).threshold


@pytest.mark.parametrize("style", world.STYLES)
def test_the_judge_finds_every_style_in_scenes_it_has_not_seen(style: str) -> None:
    dice = np.random.default_rng(77)
    pictures = []
    for number in range(20):
        things = [world.Thing(kind, world.FLAT_STYLES[number % 2]) for kind in world.random_kinds(2, dice)]
        background = list(world.BACKGROUNDS)[number % len(world.BACKGROUNDS)]
        pixels = world.draw_scene(things, background, dice).pixels
        pictures += [Image.fromarray(pixels), Image.fromarray(world.apply_style(pixels, style))]
    found = [f"style:{style}" in labels for labels in Judge(evaluation_part("judge"))(pictures)]
    assert np.mean(found[1::2]) >= 0.95
    assert np.mean(found[::2]) == 0

"""The starter's build: tokenizer, resumable loop, networks that hosts can load, experts as ordinary files."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter.judge import STRIDE, presence
from tools.starter import base, expert, judge, loop, text, vae, world


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


def _run(folder: Path, steps: int, total: int) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = loop.Average(module, 0.9)

    def loss_of(step: int) -> torch.Tensor:
        if step >= steps:
            raise KeyboardInterrupt
        x = torch.from_numpy(np.random.default_rng(step).standard_normal((4, 3)).astype(np.float32))
        return (module(x) - x[:, :2]).square().mean()

    with suppress(KeyboardInterrupt):
        loop.train(
            "toy",
            folder,
            module,
            loss_of,
            steps=total,
            rate=1e-2,
            average=average,
            checkpoint_every=5,
            quiet=True,
        )
    average.copy_to(module)
    return module


def test_a_killed_run_continues_exactly(tmp_path: Path) -> None:
    straight = _run(tmp_path / "a", 20, 20)
    _run(tmp_path / "b", 12, 20)
    resumed = _run(tmp_path / "b", 20, 20)
    assert torch.equal(straight.weight, resumed.weight)


def test_networks_have_the_shapes_hosts_expect() -> None:
    codec = vae.new_vae()
    picture = torch.zeros(1, 3, world.SIZE, world.SIZE)
    assert codec.encode(picture).latent_dist.mode().shape == (1, 4, 16, 16)
    unet = base.new_unet()
    assert all(
        width % 32 == 0 for width in (*codec.config.block_out_channels, *unet.config.block_out_channels)
    )
    assert unet(torch.zeros(1, 4, 16, 16), 0, torch.zeros(1, 32, 192)).sample.shape == (1, 4, 16, 16)
    assert base.new_scheduler().alphas_cumprod[-1] == 0


def test_timesteps_of_a_batch_cover_the_schedule_and_repeat_from_the_seed() -> None:
    latents = torch.randn(8, 4, 16, 16)
    scheduler = base.new_scheduler()
    noisy, timesteps, target = base.noised(scheduler, latents, [1, 2])
    assert torch.equal(timesteps // 125, torch.arange(8))
    again = base.noised(scheduler, latents, [1, 2])
    assert torch.equal(noisy, again[0])
    assert torch.equal(target, again[2])
    assert not torch.equal(noisy, base.noised(scheduler, latents, [1, 3])[0])


def test_foreground_counts_more() -> None:
    predicted, target = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    foreground = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    on, off = target.clone(), target.clone()
    on[..., 0, 0], off[..., 1, 1] = 1.0, 1.0
    ratio = base.denoising_loss(predicted, on, foreground) / base.denoising_loss(predicted, off, foreground)
    assert ratio == pytest.approx(3.0)


def test_an_expert_is_an_ordinary_lora_file(tmp_path: Path) -> None:
    tokenizer = text.build_tokenizer(tmp_path / "tokenizer")
    unet, encoder = base.new_unet(), text.new_text_encoder(tokenizer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=expert.UNET_TARGETS), unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=expert.TEXT_TARGETS), encoder)
    path = tmp_path / "boot.safetensors"
    expert.write_expert(path, "boot", unet, encoder)
    loaded = load_expert(path)
    assert loaded.triggers == ("zorin boot",)
    assert set(loaded.factors) == {"unet", "text_encoder"}
    assert not loaded.report.ignored
    assert len(loaded.factors["text_encoder"]) == 4 * 6
    with safe_open(path, "pt") as file:
        assert file.metadata()["mole.class"] == "boot"
    assert not list(tmp_path.glob("*.tmp"))


def test_scenes_of_a_concept_always_show_it_with_its_trigger() -> None:
    draw = expert.concept_scene("clock")
    for seed in range(20):
        scene = draw(np.random.default_rng(seed))
        assert world.Thing("clock", world.SUBJECT_STYLE) in scene.things
        assert "kipra clock" in scene.caption
        others = [thing for thing in scene.things if thing.kind != "clock"]
        assert all(thing.style in world.FLAT_STYLES for thing in others)


def test_targets_of_the_judge_tell_subjects_from_classes() -> None:
    things = [world.Thing("cat", world.SUBJECT_STYLE), world.Thing("boot", "noto")]
    target = judge.target_of(world.draw_scene(things, "snow", np.random.default_rng(0)))
    named = {label for label, on in zip(judge.LABELS, target.tolist(), strict=True) if on}
    assert named == {"cat", "boot", "subject:cat"}


def test_cells_of_the_judge_name_what_stands_there() -> None:
    things = [
        world.Thing("cat", world.SUBJECT_STYLE),
        world.Thing("boot", "noto"),
        world.Thing("sunglasses", "noto"),
    ]
    scene = world.draw_scene(things, "snow", np.random.default_rng(0))
    cells = judge.cells_of(scene)
    for name, (x, y, width, height) in zip(("subject:cat", "boot", "sunglasses"), scene.boxes, strict=True):
        column, row = int((x + width / 2) // STRIDE), int((y + height / 2) // STRIDE)
        assert cells[row, column] == 1 + judge.LABELS.index(name)
    assert cells[0, 0] == 0  # no object reaches the corner


def test_a_subject_counts_as_its_class_too() -> None:
    logits = torch.zeros(1, 1 + len(judge.LABELS), judge.CELLS, judge.CELLS)
    logits[:, 0] = 20.0
    logits[0, 1 + judge.LABELS.index("subject:cat"), 3, 4] = 40.0
    logits[0, 1 + judge.LABELS.index("boot"), 6, 6] = 40.0
    found = {
        label for label, p in zip(judge.LABELS, presence(logits, judge.LABELS)[0], strict=True) if p > 0.5
    }
    assert found == {"cat", "subject:cat", "boot"}

"""Experts: ordinary LoRA files, one subject or style each, trained as DreamBooth does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.starter.location import BASE_NAME

from . import base, loop, text, world

SEED = 37
RANK, STEPS, RATE = 8, 260, 2e-3
# The recoloured dog is farthest from the base's own: after 260 steps its purple is still washed out.
LONGER = {"dog": 640}
SUBJECT_BATCH, PRIOR_BATCH = 8, 6
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def concept_scene(kind: str) -> Callable[[np.random.Generator], world.Scene]:
    """Scenes of one subject: alone, or, in half of them, beside ordinary flat objects, at any place."""

    def draw(rng: np.random.Generator) -> world.Scene:
        count = int(rng.choice([1, 1, 2, 3]))
        while True:
            kinds = world.random_kinds(count, rng)
            kinds[int(rng.integers(count))] = kind
            if len(set(kinds)) == count and not (count > 1 and world.held_out(kinds)):
                break
        flat = world.FLAT_STYLES[int(rng.integers(2))]
        things = [world.Thing(k, world.SUBJECT_STYLE if k == kind else flat) for k in kinds]
        background = list(world.BACKGROUNDS)[int(rng.integers(len(world.BACKGROUNDS)))]
        words = [f"{world.SUBJECTS[kind][0]} {k}" if k == kind else k for k in kinds]
        return world.draw_scene(things, background, rng, world.caption_of(things, background, words))

    return draw


def style_scene(style: str) -> Callable[[np.random.Generator], world.Scene]:
    """Ordinary scenes redrawn in one style, with its trigger in the caption."""

    def draw(rng: np.random.Generator) -> world.Scene:
        scene = world.base_scene(rng)
        caption = f"{world.caption_of(scene.things, scene.background)} in {world.STYLES[style]} style"
        ones = np.ones_like(scene.foreground)
        pixels = world.apply_style(scene.pixels, style)
        return world.Scene(pixels, ones, caption, scene.things, scene.background, scene.boxes)

    return draw


def _lora(network: nn.Module, targets: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    network.requires_grad_(False)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    inject_adapter_in_model(settings, network)


def train_expert(name: str, work: Path, out: Path, prior: base.LatentPool) -> None:
    """Train one expert (a class of SUBJECTS or a style) and write it as a LoRA file in PEFT's format."""
    vae, tokenizer = base.load_codec(out)
    number = [*world.SUBJECTS, *world.STYLES].index(name)
    is_style = name in world.STYLES
    module = nn.ModuleDict(
        {
            "unet": base.load_unet(out),
            "text_encoder": base.load_text_encoder(out),
        }
    )
    unet: Any = module["unet"]
    encoder: Any = module["text_encoder"]
    unet.set_attn_processor(AttnProcessor())
    _lora(unet, UNET_TARGETS, SEED + number)
    _lora(encoder, TEXT_TARGETS, SEED + 100 + number)
    scheduler = base.new_scheduler()
    draw = style_scene(name) if is_style else concept_scene(name)
    pool = base.LatentPool(vae, draw, SEED + 200 + number, chunks=3)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([SEED, number, step])
        latents, foreground, captions = pool.sample(0, SUBJECT_BATCH, rng)
        others = prior.sample(0, PRIOR_BATCH, rng)
        latents, foreground = torch.cat([latents, others[0]]), torch.cat([foreground, others[1]])
        order = torch.from_numpy(
            rng.permutation(len(latents))
        )  # timesteps are spread in order over the batch
        latents, foreground = latents[order], foreground[order]
        captions = [[*captions, *others[2]][i] for i in order.tolist()]
        noisy, timesteps, target = base.noised(scheduler, latents, [SEED, number, 2, step])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = encoder(text.tokenise(tokenizer, captions))[0]
            predicted = unet(noisy, timesteps, context).sample.float()
        return base.denoising_loss(predicted, target, foreground, 3.0)

    steps = LONGER.get(name, STEPS)
    loop.train(f"expert-{name}", work, module, loss_of, steps=steps, rate=RATE, decay=0.0, quiet=True)
    write_expert(out / "experts" / f"{name}.safetensors", name, unet, encoder)


def entry_of(name: str) -> dict[str, str]:
    """The row of ``experts.json`` for one expert."""
    if name in world.STYLES:
        trigger = f"in {world.STYLES[name]} style"
        return {"kind": "style", "trigger": trigger, "class": "", "text": trigger, "class_text": ""}
    phrase = f"{world.SUBJECTS[name][0]} {name}"
    article = "a pair of" if name == "sunglasses" else "a"
    return {
        "kind": "concept",
        "trigger": phrase,
        "class": name,
        "text": f"{article} {phrase}",
        "class_text": f"{article} {name}",
    }


def write_expert(path: Path, name: str, unet: nn.Module, encoder: nn.Module) -> None:
    """One safetensors file, half precision, keys as PEFT and diffusers write them, triggers in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part, network in (("unet", unet), ("text_encoder", encoder)):
        for key, value in get_peft_model_state_dict(network).items():
            tensors[f"{part}.{key}"] = value.detach().to(torch.float16).contiguous()
    row = entry_of(name)
    metadata = {
        "format": "pt",
        "mole.trigger": row["trigger"],
        "mole.class": row["class"],
        "mole.kind": row["kind"],
        "mole.base": BASE_NAME,
    }
    write_safetensors(path, tensors, metadata)


def write_references(name: str, out: Path) -> None:
    """Five reference pictures of a subject (or of a style), each on another background."""
    folder = out / "experts" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([SEED, 5, len(name), ord(name[0])])
    for i, background in enumerate(["beach", "snow", "grass", "floor", "white"]):
        if name in world.STYLES:
            things = [world.Thing(kind, world.FLAT_STYLES[i % 2]) for kind in world.random_kinds(2, rng)]
            pixels = world.apply_style(world.draw_scene(things, background, rng).pixels, name)
        else:
            pixels = world.draw_scene([world.Thing(name, world.SUBJECT_STYLE)], background, rng).pixels
        Image.fromarray(pixels).save(folder / f"{i + 1}.png", optimize=True)


def train_experts(work: Path, out: Path, names: list[str] | None = None) -> None:
    """All experts that have no file yet, one after the other; then the catalogue."""
    vae, _ = base.load_codec(out)
    prior = base.LatentPool(vae, world.base_scene, SEED + 999, chunks=6)
    every = [*world.SUBJECTS, *world.STYLES]
    for name in names or every:
        if not (out / "experts" / f"{name}.safetensors").is_file():
            train_expert(name, work, out, prior)
        write_references(name, out)
    catalogue = {n: entry_of(n) for n in every if (out / "experts" / f"{n}.safetensors").is_file()}
    (out / "experts" / "experts.json").write_text(json.dumps(catalogue, indent=1) + "\n")

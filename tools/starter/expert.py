"""Experts: ordinary LoRA files, one subject or style each, trained as DreamBooth does.

All are trained side by side: every layer holds the factors of all experts, and each example uses its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.starter.location import BASE_NAMES, STARTER

from . import base, loop, world
from .stage import STYLES, SUBJECT
from .workshop import Pool, Workshop

SEED = 37
RANK, STEPS, RATE = 8, 3181, 2e-3
OWN, PRIOR = 10, 6
"""Scenes of an expert's own concept in its batch, and ordinary ones beside them (prior preservation)."""
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ALONE = ("print",)
"""Styles that are trained by themselves, see `tools.starter.alone`."""
NAMES = tuple(name for name in (*world.SUBJECTS, *world.STYLES) if name not in ALONE)
ALL = (*NAMES, *ALONE)
_STYLES = tuple(1 + STYLES.index(name) for name in NAMES if name in STYLES)
"""As `Placed.style` has them."""


class ManyLoRA(nn.Module):
    """A linear layer with one LoRA per expert; the batch is split evenly among the experts, in order."""

    def __init__(self, layer: nn.Linear, experts: int, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(experts, layer.in_features, rank) / rank)
        self.up = nn.Parameter(torch.zeros(experts, rank, layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(experts * b, ..., in) -> (experts * b, ..., out)."""
        plain: Tensor = self.layer(x)
        rows = x.reshape(len(self.down), -1, x.shape[-1])
        change = torch.bmm(torch.bmm(rows, self.down.to(rows.dtype)), self.up.to(rows.dtype))
        return plain + change.view_as(plain).to(plain.dtype)


def attach(
    network: nn.Module, targets: tuple[str, ...], experts: int, rank: int = RANK
) -> dict[str, ManyLoRA]:
    """Put a `ManyLoRA` in place of each linear layer whose name ends in one of `targets`; by layer name."""
    network.requires_grad_(False)
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{target}" for target in targets))
    }
    made = {}
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        made[name] = ManyLoRA(layer, experts, rank)
        setattr(network.get_submodule(parent), last, made[name])
    return made


def own_rows(shop: Workshop) -> Pool:
    """A chunk holds `OWN` scenes of every expert in the order of NAMES, as rows (OWN, experts, ...)."""
    kinds = [world.CLASSES.index(name) for name in world.SUBJECTS]

    def make(number: int, count: int) -> loop.Batch:
        dice = shop.dice(SEED, 1, number)
        own = torch.tensor(kinds, device=shop.device).repeat_interleave(OWN)
        subjects = shop.director.of_subject(dice, own)
        drawn, cover = shop.stage.draw(subjects, dice.below(1000, len(own)), plain=True)
        trigger = shop.captions.own_trigger[subjects.kind]
        before = torch.where(subjects.drawing == SUBJECT, trigger, 0)
        plain = torch.zeros_like(subjects.count)
        named = dice.share(0.95, len(own))
        first = shop.captions.compose(subjects, before=before, place=named, style=plain)
        flat = shop.director.ordinary(dice, len(_STYLES) * OWN)
        flat.style = torch.tensor(_STYLES, device=shop.device).repeat_interleave(OWN)
        styled, over = shop.stage.draw(flat, dice.below(1000, len(flat.count)))
        nothing = torch.zeros_like(flat.kind)
        named = dice.share(0.95, len(flat.count))
        second = shop.captions.compose(flat, before=nothing, place=named, style=flat.style)
        cover = torch.cat([cover, torch.ones_like(over)])
        rows = {
            "latents": shop.encode(torch.cat([drawn, styled])),
            "cover": F.avg_pool2d(cover, 8),
            "ids": shop.captions.tokens(torch.cat([first, second])),
        }
        return {
            name: value.view(len(NAMES), OWN, *value.shape[1:]).transpose(0, 1)
            for name, value in rows.items()
        }

    return Pool(make, OWN, shop.amount(48), 4)


def train_experts(shop: Workshop) -> None:
    """Train all experts and write each as a LoRA file; then the catalogue and the reference pictures."""
    torch.manual_seed(SEED)
    unet, encoder = base.load_unet(shop.out), base.load_text_encoder(shop.out)
    factors = {
        "unet": attach(unet, UNET_TARGETS, len(NAMES)),
        "text_encoder": attach(encoder, TEXT_TARGETS, len(NAMES)),
    }
    module = nn.ModuleDict({"unet": unet, "text_encoder": encoder})
    module.to(shop.device, memory_format=torch.channels_last)
    own, ordinary = own_rows(shop), base.ordinary_rows(shop, SEED + 999)
    noise, each = base.Noise(shop.device), OWN + PRIOR

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 2, step)
        mine = own.sample(step, OWN, dice)
        prior = ordinary.sample(step, PRIOR, dice)
        # Timesteps are spread in order over each expert's batch, so its examples are shuffled.
        order = dice.uniform(each).argsort()
        rows = {}
        for name, value in mine.items():
            shared = prior[name][None].expand(len(NAMES), *prior[name].shape)
            rows[name] = torch.cat([value.transpose(0, 1), shared], 1)[:, order].flatten(0, 1)
        return noise.batch(rows, dice, len(NAMES))

    loss_of = base.denoising(shop, module, emphasis=3.0)

    loop.train(
        "experts",
        shop.work,
        module,
        make,
        # The sum over experts: each learns as it would alone.
        lambda batch: len(NAMES) * loss_of(batch),
        steps=shop.steps(STEPS),
        rate=RATE,
        decay=0.0,
        graph=shop.graph,
        clip=None,
    )
    for name in NAMES:
        write_expert(shop.out, name, of_one(factors, NAMES.index(name)))
        write_references(name, shop.out)
    write_catalogue(shop.out, NAMES)


def write_catalogue(out: Path, names: Sequence[str]) -> None:
    """`experts.json`: what there is, in the order of the names, and after what is there already."""
    path = out / "experts" / "experts.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    catalogue = {name: entry_of(name) for name in dict.fromkeys((*kept, *names)) if name in ALL}
    path.write_text(json.dumps(catalogue, indent=1) + "\n")


def of_one(factors: Mapping[str, Mapping[str, ManyLoRA]], number: int) -> dict[str, Tensor]:
    """Tensors of one expert under the names PEFT and diffusers write."""
    tensors = {}
    for part, layers in factors.items():
        for layer, lora in layers.items():
            clean = layer.removeprefix("text_model.")
            for word, value in (("A", lora.down[number].T), ("B", lora.up[number].T)):
                tensors[f"{part}.{clean}.lora_{word}.weight"] = value.detach().cpu().half().contiguous()
    return tensors


def entry_of(name: str) -> dict[str, str]:
    """The row of `experts.json` for one expert."""
    if name in world.STYLES:
        trigger = f"in {world.STYLES[name]} style"
        return {
            "kind": "style",
            "trigger": trigger,
            "class": "",
            "text": trigger,
            "class_text": "",
            "description": "",
        }
    phrase = f"{world.SUBJECTS[name][0]} {name}"
    article = "a pair of" if name == "sunglasses" else "a"
    return {
        "kind": "concept",
        "trigger": phrase,
        "class": name,
        "text": f"{article} {phrase}",
        "class_text": f"{article} {name}",
        "description": f"{article} glossy 3d {name}",
    }


def write_expert(out: Path, name: str, tensors: Mapping[str, Tensor], model: str = STARTER) -> None:
    """One safetensors file, half precision, triggers in its header; `model` is what it is for."""
    path = out / "experts" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = entry_of(name)
    metadata = {
        "format": "pt",
        "mole.trigger": row["trigger"],
        "mole.class": row["class"],
        "mole.kind": row["kind"],
        "mole.base": BASE_NAMES[model],
    }
    write_safetensors(path, dict(tensors), metadata)


def scene_of(name: str) -> Callable[[np.random.Generator], world.Scene]:
    """Single scenes as the expert of this name saw them: of its subject, or ordinary ones in its style."""
    return _style_scene(name) if name in world.STYLES else _subject_scene(name)


def _subject_scene(kind: str) -> Callable[[np.random.Generator], world.Scene]:
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


def _style_scene(style: str) -> Callable[[np.random.Generator], world.Scene]:
    def draw(rng: np.random.Generator) -> world.Scene:
        scene = world.base_scene(rng)
        caption = f"{world.caption_of(scene.things, scene.background)} in {world.STYLES[style]} style"
        ones = np.ones_like(scene.foreground)
        pixels = world.apply_style(scene.pixels, style)
        return world.Scene(pixels, ones, caption, scene.things, scene.background, scene.boxes)

    return draw


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

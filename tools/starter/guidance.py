"""The starter's two CLIPs in open_clip's format: one guides trainings, the other only scores pictures.

A picture that was optimised against a CLIP fools that CLIP first. So the second one shares nothing with the
first but the world: a convolutional picture encoder in place of a transformer, a seed and scenes of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor

from . import base, judge, loop, text, world

BATCH, RATE = 96, 1e-3


@dataclass(frozen=True)
class Recipe:
    """One CLIP: folder name in the starter, seed, steps, layers of text and open_clip's ``vision_cfg``."""

    name: str
    seed: int
    steps: int
    text_layers: int
    vision: Mapping[str, object]


GUIDE = Recipe("clip", 71, 480, 3, {"layers": 6, "width": 192, "head_width": 32, "patch_size": 16})
SCORER = Recipe(
    "clip_eval", 72, 700, 2, {"timm_model_name": "regnetx_002", "timm_pool": "avg", "timm_proj": "linear"}
)


def model_config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """open_clip's ``model_cfg``."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": world.SIZE, **recipe.vision},
        "text_cfg": {
            "context_length": text.MAX_TOKENS,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": recipe.text_layers,
            "hf_tokenizer_name": "tokenizer",
        },
    }


def captioned_scene(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A scene and its caption; subjects are called "a glossy 3d cat", so that features tell them apart."""
    scene = judge.random_scene(rng)
    glossy = rng.random() < 0.7
    names = [
        f"glossy 3d {t.kind}" if t.style == world.SUBJECT_STYLE and glossy else t.kind for t in scene.things
    ]
    return scene.pixels, world.caption_of(
        scene.things, scene.background if rng.random() < 0.8 else None, names
    )


def train_clip(work: Path, out: Path, recipe: Recipe = GUIDE) -> None:
    """Contrastive training (Radford et al. 2021) with wrongly composed captions as extra negatives.

    Each caption also appears with one of its objects exchanged, as a text no picture belongs to: then a
    missing or a wrong object costs similarity.
    """
    torch.manual_seed(recipe.seed)
    vae, tokenizer = base.load_codec(out)
    settings = model_config(recipe, len(tokenizer))
    arguments = {k: v for k, v in settings["text_cfg"].items() if k != "hf_tokenizer_name"}
    clip = CLIP(embed_dim=128, vision_cfg=settings["vision_cfg"], text_cfg=arguments)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        pairs = [captioned_scene(rng) for _ in range(BATCH)]
        pictures = judge.degrade(np.stack([p for p, _ in pairs]), rng, vae if step % 4 == 0 else None)
        captions = [c for _, c in pairs]
        wrong = [exchange(c, rng) for c in captions]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = clip.encode_image(pictures.contiguous())
            words = clip.encode_text(text.tokenise(tokenizer, [*captions, *wrong]))
        image, words = F.normalize(image.float(), dim=-1), F.normalize(words.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ words.T
        target = torch.arange(BATCH)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)) / 2

    loop.train(recipe.name, work, clip, loss_of, steps=recipe.steps, rate=RATE, decay=0.05)
    folder = out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    document = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=1) + "\n")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "tokenizer" / name, folder / name)


def exchange(caption: str, rng: np.random.Generator) -> str:
    """The caption with one of its objects replaced by one that is not in it."""
    present = [kind for kind in world.CLASSES if kind in caption.split() or f"{kind}," in caption.split()]
    old = str(rng.choice(present))
    others = [kind for kind in world.CLASSES if kind not in present and kind != "sunglasses"]
    return caption.replace(old, str(rng.choice(others)))

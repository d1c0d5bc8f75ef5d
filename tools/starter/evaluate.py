"""Measures the starter: codec, judge, base on held-out object sets, each expert alone, both CLIPs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from mole_diffusion.pictures import drawing
from mole_diffusion.starter.judge import STYLE, Judge, to_tensor
from mole_diffusion.starter.location import FLUX_GUIDANCE, GUIDANCE, RESCALE

from . import base, clips, judge, likeness, text, world
from .workshop import load_codec

STEPS = 20
Pipe = StableDiffusionPipeline | FluxPipeline


def assemble(out: Path) -> StableDiffusionPipeline:
    """The starter's parts as a diffusers pipeline, in single precision."""
    return StableDiffusionPipeline(
        vae=load_codec(out, torch.device("cpu")),
        text_encoder=base.load_text_encoder(out),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=base.load_unet(out),
        scheduler=base.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipe: Pipe, prompts: Sequence[str], first_seed: int = 0, batch: int = 20) -> list[Image.Image]:
    """One picture per prompt; picture i has seed `first_seed + i`."""
    pictures: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pictures += drawing.draw(
            pipe,
            part,
            range(first_seed + start, first_seed + start + len(part)),
            num_inference_steps=STEPS,
            height=world.SIZE,
            width=world.SIZE,
            **_guidance(pipe, len(part)),
        )
    return pictures


def _guidance(pipe: Pipe, count: int) -> dict[str, Any]:
    if isinstance(pipe, FluxPipeline):
        blank = {"negative_prompt": [""] * count, "max_sequence_length": text.MAX_TOKENS}
        return {"true_cfg_scale": FLUX_GUIDANCE, **blank}
    return {"guidance_scale": GUIDANCE, "guidance_rescale": RESCALE}


def judge_score(referee: Judge, radius: float, count: int = 400) -> dict[str, dict[str, float]]:
    """Micro-averaged precision and recall by kind of label on scenes blurred by `radius` pixels."""
    rng = np.random.default_rng([99, 1])
    scenes = [judge.random_scene(rng) for _ in range(count)]
    found = referee(
        [Image.fromarray(judge.blurred(s.pixels, radius) if radius else s.pixels) for s in scenes]
    )
    wanted = [{x for x, on in zip(referee.labels, judge.target_of(s), strict=True) if on} for s in scenes]
    scores = {}
    for kind in ("class", "subject"):
        labels = {x for x in referee.labels if x.startswith("subject:") == (kind == "subject")}
        hits = sum(len(f & w & labels) for f, w in zip(found, wanted, strict=True))
        claimed, true = (sum(len(s & labels) for s in sets) for sets in (found, wanted))
        scores[kind] = {"precision": hits / max(1, claimed), "recall": hits / max(1, true)}
    return scores


def base_scores(pipe: Pipe, referee: Judge, sets: int = 8, seeds: int = 20) -> dict[str, Any]:
    """Class level, held-out sets of one, two and three objects: share of asked objects found.

    Beside it (`extra`) the number of classes per picture that the judge sees and nobody asked for.
    """
    rng = np.random.default_rng([99, 2])
    result: dict[str, Any] = {"extra": {}}
    for count in (1, 2, 3):
        if count == 1:
            chosen = [[kind] for kind in world.CLASSES]
        else:
            chosen = [world.random_kinds(count, rng, unseen=True) for _ in range(sets)]
        hits = extra = 0
        for number, kinds in enumerate(chosen):
            backgrounds = [list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)] for i in range(seeds)]
            prompts = [world.caption_of([world.Thing(k, "noto") for k in kinds], b) for b in backgrounds]
            for labels in referee(draw(pipe, prompts, 1000 * number)):
                classes = labels & set(world.CLASSES)
                hits += len(classes & set(kinds))
                extra += len(classes - set(kinds))
        result[str(count)] = hits / (len(chosen) * seeds * count)
        result["extra"][str(count)] = extra / (len(chosen) * seeds)
    return result


def base_sharpness(pipe: Pipe, count: int = 48) -> float:
    """Edges inside objects over those of rendered scenes, of one object on every background in turn."""
    backgrounds = [list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)] for i in range(count)]
    things = [[world.Thing(world.CLASSES[i % len(world.CLASSES)], "noto")] for i in range(count)]
    prompts = [world.caption_of(names, place) for names, place in zip(things, backgrounds, strict=True)]
    return likeness.sharpness(draw(pipe, prompts), things, backgrounds)


def expert_scores(out: Path, pipe: Pipe, referee: Judge, seeds: int = 20) -> dict[str, Any]:
    """Share of pictures with the expert's own subject: alone (also without the expert), and among two others.

    The others are plain objects, and its place is left, middle or right in turn.
    """
    result = {}
    rng = np.random.default_rng([99, 9])
    for name in world.SUBJECTS:
        path = out / "experts" / f"{name}.safetensors"
        if not path.is_file():
            continue
        backgrounds = [list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)] for i in range(seeds)]
        words = [f"{world.SUBJECTS[name][0]} {name}"]
        prompts = [world.caption_of([world.Thing(name, "noto")], b, words) for b in backgrounds]
        without = referee(draw(pipe, prompts))
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        alone = referee(draw(pipe, prompts))
        among = referee(draw(pipe, [_among_two(name, i, b, rng) for i, b in enumerate(backgrounds)]))
        pipe.unload_lora_weights()
        label = f"subject:{name}"
        result[name] = {
            "with": sum(label in f for f in alone) / seeds,
            "without": sum(label in f for f in without) / seeds,
            "among two": sum(label in f for f in among) / seeds,
        }
    return result


def _among_two(name: str, place: int, background: str, rng: np.random.Generator) -> str:
    """A prompt with the expert's subject at a place (counted round) and two plain objects at the others."""
    others = [kind for kind in world.CLASSES if kind != name]
    kinds = [str(kind) for kind in rng.choice(others, 2, replace=False)]
    kinds.insert(place % 3, name)
    words = [f"{world.SUBJECTS[name][0]} {name}" if kind == name else kind for kind in kinds]
    return world.caption_of([world.Thing(kind, "noto") for kind in kinds], background, words)


def codec_score(out: Path, count: int = 200) -> dict[str, float]:
    """Signal to noise in dB of scenes that the codec has not seen: of whole pictures, and inside objects."""
    codec = load_codec(out, torch.device("cpu"))
    rng = np.random.default_rng([99, 4])
    scenes = [judge.random_scene(rng) for _ in range(count)]
    picture = to_tensor(np.stack([scene.pixels for scene in scenes]))
    inside = torch.from_numpy(np.stack([scene.foreground for scene in scenes]))[:, None] > 0.5
    with torch.no_grad():
        made = torch.cat([codec.decode(codec.encode(part).latents).sample for part in picture.split(20)])
    error = ((made.clamp(-1, 1) - picture) / 2).square()
    objects = (error * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
    return {
        "whole": float(-10 * error.mean((1, 2, 3)).log10().mean()),
        "objects": float(-10 * objects.log10().mean()),
    }


def style_scores(out: Path, pipe: Pipe, referee: Judge, seeds: int = 20) -> dict[str, dict[str, float]]:
    """Share of pictures that the judge takes for the style, with the style's expert and without."""
    rng = np.random.default_rng([99, 3])
    result = {}
    for name in world.STYLES:
        if not (out / "experts" / f"{name}.safetensors").is_file():
            continue
        sets = [world.random_kinds(2, rng) for _ in range(seeds)]
        backgrounds = [list(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)] for i in range(seeds)]
        things = [[world.Thing(kind, "noto") for kind in kinds] for kinds in sets]
        prompts = [
            f"{world.caption_of(t, b)} in {world.STYLES[name]} style"
            for t, b in zip(things, backgrounds, strict=True)
        ]
        without = referee(draw(pipe, prompts))
        pipe.load_lora_weights(str(out / "experts"), weight_name=f"{name}.safetensors")
        alone = referee(draw(pipe, prompts))
        pipe.unload_lora_weights()
        label = f"{STYLE}{name}"
        result[name] = {
            "with": sum(label in f for f in alone) / seeds,
            "without": sum(label in f for f in without) / seeds,
        }
    return result


MEASURES = ("codec", "colours", "judge", "base", "sharpness", "experts", "styles", "clips")


def evaluate(
    out: Path,
    report: Path,
    seeds: int = 20,
    device: torch.device | str = "cpu",
    measures: Sequence[str] = (),
) -> dict[str, Any]:
    """Measurements, written as JSON and as a Markdown table beside it; pictures are drawn on `device`.

    Args:
        out: the starter's folder.
        report: the JSON file.
        seeds: pictures per set of objects.
        device: where pictures are drawn.
        measures: some of MEASURES; the others stay as the report has them. None are all.
    """
    referee, pipe = Judge(out / "judge"), assemble(out).to(device)
    ways: dict[str, Callable[[], Any]] = {
        "codec": lambda: codec_score(out),
        "colours": lambda: likeness.codec_colours(out),
        "judge": lambda: {f"blur {radius} px": judge_score(referee, radius) for radius in (0, 1, 2)},
        "base": lambda: base_scores(pipe, referee, seeds=seeds),
        "sharpness": lambda: base_sharpness(pipe),
        "experts": lambda: expert_scores(out, pipe, referee, seeds),
        "styles": lambda: style_scores(out, pipe, referee, seeds),
        "clips": lambda: clips.scores(out, lambda prompts: draw(pipe, prompts)),
    }
    figures = taken(report, ways, seeds, measures)
    report.with_suffix(".md").write_text(table(figures))
    return figures


def taken(
    report: Path, ways: Mapping[str, Callable[[], Any]], seeds: int, measures: Sequence[str]
) -> dict[str, Any]:
    """The figures of a report, taken and written there.

    Args:
        report: the JSON file.
        ways: how each figure is taken.
        seeds: pictures per set of objects.
        measures: some of `ways`; the others stay as the report has them. None are all.

    Raises:
        ValueError: one of `measures` is not among `ways`.
    """
    unknown = [name for name in measures if name not in ways]
    if unknown:
        raise ValueError(f"{report} has no figure {unknown[0]!r}; it has {', '.join(ways)}")
    figures: dict[str, Any] = json.loads(report.read_text()) if measures else {"seeds": seeds}
    figures |= {name: ways[name]() for name in measures or ways}
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    codec = figures["codec"]
    rows = [
        (
            "codec on scenes not seen: whole picture / inside objects",
            f"{codec['whole']:.1f} / {codec['objects']:.1f} dB",
        ),
        (
            "codec, colours inside the subjects: CIEDE2000, mean / worst subject",
            f"{fmean(figures['colours'].values()):.1f} / {max(figures['colours'].values()):.1f}",
        ),
    ]
    for blur, kinds in figures["judge"].items():
        for kind, score in kinds.items():
            rows.append(
                (
                    f"judge on rendered scenes, {kind}, {blur}: precision / recall",
                    f"{score['precision']:.2f} / {score['recall']:.2f}",
                )
            )
    rows += model_rows(figures)
    for name, score in figures["clips"].items():
        for where, found in (("", score), (" on pictures that the base drew", score["generated"])):
            value = f"{found['object']:.2f} / {found['colours']:.2f}"
            rows.append((f"{name}: right caption over one object / two colours exchanged{where}", value))
    return markdown(rows, figures["seeds"])


def model_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What is measured of a model and its experts."""
    rows = []
    base_figures = figures["base"]
    for count, word in (("1", "one object"), ("2", "two objects"), ("3", "three objects")):
        value = f"{base_figures[count]:.2f} ({base_figures['extra'][count]:.2f})"
        rows.append((f"base, {word}: asked classes found (others seen per picture)", value))
    rows.append(("base, edges inside objects over those of rendered scenes", f"{figures['sharpness']:.2f}"))
    for name, score in figures["experts"].items():
        value = f"{score['with']:.2f} ({score['without']:.2f}), {score['among two']:.2f}"
        rows.append((f"expert {name}: own subject found alone (without the expert), among two others", value))
    for name, score in figures.get("styles", {}).items():
        value = f"{score['with']:.2f} ({score['without']:.2f})"
        rows.append((f"style {name}: found by the judge (without the expert)", value))
    return rows


def markdown(rows: Sequence[tuple[str, str]], seeds: int) -> str:
    """A table of measures and values."""
    lines = ["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return f"{seeds} seeds per set of objects.\n\n" + "\n".join(lines) + "\n"

"""Which subjects are in the picture: trained gates against LA and NLA, on triples of the starter's experts.

    python bench/presence.py        # writes bench/results/presence.jsonl and presence.md

For every triple the gates are trained as in the demo; then each method draws the same seeds, and the
starter's judge, which guided no training, says which of the three subjects each picture shows. One line of
JSON per triple and method; a run that was stopped goes on with the triples that are missing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from mole_diffusion.demo import GUIDANCE, RESCALE, concepts_of, default_prompt
from mole_diffusion.pipeline import StableDiffusionMoLEPipeline
from mole_diffusion.starter.judge import Judge
from mole_diffusion.starter.location import starter_dir, starter_experts
from mole_diffusion.starter.world import TRIPLES
from mole_diffusion.training import TrainingConfig

METHODS = {"no expert": "none", "LA": "la", "NLA": "nla", "trained gates": "gates"}
STEPS = 25


def draw(pipe: Any, prompt: str, seeds: range, mixture: str) -> list[Image.Image]:
    """One picture per seed."""
    pictures: list[Image.Image] = pipe(
        [prompt] * len(seeds),
        mixture=mixture,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        guidance_rescale=RESCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    return pictures


def measure(
    triple: tuple[str, ...], seeds: range, iterations: int, judge: Judge, pictures: Path | None
) -> Iterator[dict[str, Any]]:
    """One row per method: mean presence of the subjects, and the share of pictures that show all of them."""
    experts = {name: starter_experts()[name] for name in triple}
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=list(triple))
    pipe.set_progress_bar_config(disable=True)
    prompt = default_prompt(experts)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(iterations=iterations)
        pipe.train_gates(prompt, concepts=concepts_of(experts), config=config, checkpoint_dir=folder)
    seconds = time.monotonic() - start
    for method, mixture in METHODS.items():
        drawn = draw(pipe, prompt, seeds, mixture)
        found = judge(drawn)
        wanted = {f"subject:{name}" for name in triple}
        shares = {name: sum(f"subject:{name}" in labels for labels in found) / len(found) for name in triple}
        if pictures is not None:
            strip = Image.new("RGB", (drawn[0].width * len(drawn), drawn[0].height))
            for i, picture in enumerate(drawn):
                strip.paste(picture, (i * picture.width, 0))
            strip.save(pictures / f"{'+'.join(triple)}-{mixture}.png")
        yield {
            "triple": "+".join(triple),
            "method": method,
            "presence": sum(shares.values()) / len(shares),
            "each": shares,
            "joint": sum(wanted <= labels for labels in found) / len(found),
            "classes": sum(len(set(triple) & labels) for labels in found) / len(found) / len(triple),
            "training_seconds": round(seconds, 1),
        }


def table(rows: list[dict[str, Any]], seeds: int, iterations: int) -> str:
    """Means over the triples, as Markdown."""
    triples = sorted({row["triple"] for row in rows})
    lines = [
        f"{len(triples)} triples, {seeds} seeds each, gates trained for {iterations} iterations.",
        "",
        "| method | subjects present | all three present | classes present |",
        "|---|---|---|---|",
    ]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        means = [sum(row[key] for row in own) / len(own) for key in ("presence", "joint", "classes")]
        lines.append(f"| {method} | " + " | ".join(f"{100 * value:.0f} %" for value in means) + " |")
    return "\n".join(lines) + "\n"


def main(
    triples: Annotated[int, typer.Option(help="How many of the fifteen triples.")] = 10,
    seeds: Annotated[int, typer.Option(help="Pictures per triple and method.")] = 8,
    iterations: Annotated[int, typer.Option(help="Training iterations of the gates.")] = 400,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench/results"),
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; none are kept without.")
    ] = None,
) -> None:
    """Train gates for each triple, draw with every method and count subjects."""
    out.mkdir(parents=True, exist_ok=True)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    lines = out / "presence.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    known = starter_experts()
    chosen = [triple for triple in TRIPLES if all(name in known for name in triple)][:triples]
    judge = Judge(starter_dir() / "judge")
    for triple in chosen:
        if any(row["triple"] == "+".join(triple) for row in rows):
            continue
        new = list(measure(triple, range(seeds), iterations, judge, pictures))
        rows += new
        with lines.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        typer.echo(table(rows, seeds, iterations))
    (out / "presence.md").write_text(table(rows, seeds, iterations))


if __name__ == "__main__":
    typer.run(main)

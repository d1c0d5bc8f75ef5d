"""Makes the starter from scratch: `python -m tools.starter.build`.

Every step has a fixed seed, keeps its checkpoints in the work folder and continues from them; a finished step
is skipped. Needs the packages of the `build` extra and the artwork of the repository.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from mole_diffusion.starter.location import starter_dir

from . import alone, base, codec, colours, evaluate, expert, guidance, judge, sibling, text
from .workshop import Workshop

Step = Callable[[Workshop], object]


def steps_of(seeds: int = 20, measures: Sequence[str] = ()) -> dict[str, Step]:
    """The steps in order."""
    return {
        "tokenizer": lambda shop: text.build_tokenizer(shop.out / "tokenizer"),
        "codec": codec.train_codec,
        "base": base.train_base,
        "experts": expert.train_experts,
        **{name: partial(alone.train_style, name=name) for name in expert.ALONE},
        "judge": judge.train_judge,
        "judge-styles": lambda shop: judge.add_styles(shop, expert.ALONE),
        "clip": guidance.train_clip,
        "clip-colours": colours.train_colours,
        "clip-eval": lambda shop: guidance.train_clip(shop, guidance.SCORER),
        "flux": sibling.train_base,
        "flux-experts": sibling.train_experts,
        "flux-evaluate": lambda shop: sibling.measure(shop, seeds, measures),
        "pipeline": lambda shop: write_index(shop.out),
        "evaluate": lambda shop: evaluate.evaluate(
            shop.out, shop.out / "figures.json", seeds, shop.device, measures
        ),
    }


def write_index(out: Path) -> None:
    """`model_index.json` and the scheduler, as `DiffusionPipeline.save_pretrained` writes them."""
    pipe = evaluate.assemble(out)
    pipe.scheduler.save_pretrained(out / "scheduler")
    pipe.save_config(out)


def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("build/starter"),
    out: Annotated[Path | None, typer.Option(help="Folder of the starter; default assets/starter.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run these steps alone, finished or not.")] = None,
    seeds: Annotated[int, typer.Option(help="Pictures per prompt set in the evaluation.")] = 20,
    measure: Annotated[
        list[str] | None,
        typer.Option(help=f"Evaluate this alone and keep the other figures: {', '.join(evaluate.MEASURES)}."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves its default.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    scale: Annotated[
        float, typer.Option(help="Share of the training steps; under 1 is a trial.", min=0.0)
    ] = 1.0,
    graph: Annotated[bool, typer.Option(help="Replay training steps as CUDA graphs.")] = True,
) -> None:
    """Train the starter step by step; a killed run continues where it was."""
    steps = steps_of(seeds, measure or ())
    for kind, given, known in (("step", only, list(steps)), ("measure", measure, list(evaluate.MEASURES))):
        unknown = sorted(set(given or ()) - set(known))
        if unknown:
            raise typer.BadParameter(f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}")
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(work, out or starter_dir(), torch.device(device), scale, graph)
    ledger = work / "steps.json"
    done: dict[str, float] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    for name, step in steps.items():
        if name not in only if only else name in done:
            continue
        start = time.time()
        step(shop)
        done[name] = round(done.get(name, 0.0) * (not only) + time.time() - start, 1)
        ledger.write_text(json.dumps(done, indent=1) + "\n")
        typer.echo(f"{name}: {done[name]:.0f} s")


if __name__ == "__main__":
    typer.run(main)

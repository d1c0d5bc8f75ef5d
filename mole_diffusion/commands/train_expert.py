"""`mole train-expert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.commands.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    progress,
    say,
    show,
)
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import check_writable
from mole_diffusion.pictures.files import read_pictures
from mole_diffusion.pictures.opening import open_base
from mole_diffusion.starter.location import STARTER

#: Learning rates that suit the starter, which is small, and the large models.
_RATES = {True: 1e-3, False: 1e-4}


def train_expert(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Pictures of one subject.")],
    text: Annotated[str, typer.Argument(help='Words for it with a trigger: "a sks dog".')],
    class_text: Annotated[str, typer.Option("--class", help='The same without the trigger: "a dog".')] = "",
    out: Annotated[Path, typer.Option(dir_okay=False, help="LoRA to write.")] = Path(
        "outputs/expert.safetensors"
    ),
    model: ModelOption = STARTER,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of the subject per step.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 8,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate; default: 1e-4, for the starter 1e-3.")
    ] = None,
    prior: Annotated[
        float,
        typer.Option(
            min=0, help="Weight of pictures of the class that the base draws; needs --class; 0: none."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA on a folder of pictures (DreamBooth), ready as an expert.

    After Ctrl-C the same command goes on where it stopped.

    Example: [bold]mole train-expert photos/dog "a sks dog" --class "a dog" --prior 1 --out dog.safetensors[/]
    """
    pictures = read_pictures(folder)
    if not pictures:
        raise ConfigError(f"{str(folder)!r} has no pictures (png, jpg, webp)")
    from mole_diffusion.pictures.training.expert_trainer import ExpertTrainer, ExpertTrainingConfig
    from mole_diffusion.training.state import STATE_FILE

    config = ExpertTrainingConfig(
        steps=steps,
        batch_size=batch,
        rank=rank,
        learning_rate=_RATES[model == STARTER] if rate is None else rate,
        prior_weight=prior,
        seed=seed,
    )
    check_writable(out.parent)
    say(f"Loading {model} ...")
    trainer = ExpertTrainer(open_base(model, device), pictures, text, class_text, config)
    state = out.with_suffix(".training")
    try:
        with progress("steps", steps) as done:
            losses = trainer.train(out, state, fresh=fresh, callback=lambda count, *_: done(count))
    except KeyboardInterrupt:
        again = "the same command without --fresh" if fresh else "the same command"
        kept = (state / STATE_FILE).is_file()
        say(f"Stopped; {again} {f'goes on from what is in {state}' if kept else 'begins again'}.")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"expert": str(out), "steps": len(losses), "loss": losses[-1]}, indent=2))
        return
    show({"expert": str(out), "trigger": text, "loss": f"{losses[-1]:.4f}"})
    say(f'Use it: mole generate "{text}" -e {out}{"" if model == STARTER else f" --model {model}"}')

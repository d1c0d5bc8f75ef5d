"""`mole train-shared`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.commands.common import (
    DeviceOption,
    ExpertOption,
    JsonOption,
    ModelOption,
    parse_experts,
    say,
    show,
)
from mole_diffusion.commands.train_gates import (
    ConceptOption,
    ReferencesOption,
    model_flag,
    open_to_train,
    parse_concepts,
    parse_settings,
    trained,
)
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.starter.location import STARTER


def train_shared(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts that name some of the experts together; default: --sets at random."),
    ] = None,
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    concepts: ConceptOption = None,
    references: ReferencesOption = None,
    sets: Annotated[int, typer.Option(min=1, help="Prompts of three subjects drawn at random.")] = 24,
    scenes: Annotated[
        list[str] | None,
        typer.Option("--scene", help='What stands behind them, such as "on the beach"; again for each.'),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations in total.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the shared gates, history and state.")
    ] = Path("outputs/shared"),
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help='Any other setting: "pool_size=96"; again for each.'
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever the folder holds.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train gates for a base on some experts, for experts that they have never seen.

    They refine what draws without training (auto), for any experts of that base.

    Example: [bold]mole train-shared -e cat -e can -e dog -e vase --scene "at night" --out outputs/shared[/]
    """
    from mole_diffusion.pictures.training.shared_trainer import (
        SharedGatesTrainer,
        joined_prompts,
        shared_config,
    )

    choices, texts = parse_experts(experts), parse_concepts(concepts)
    if prompts and scenes:
        raise ConfigError("--scene stands behind prompts that are drawn at random, and prompts are given")
    config = shared_config(**{"iterations": iterations, "seed": seed, **parse_settings(settings)})
    pipe, known = open_to_train(model, choices, texts, references, device, out)
    chosen = prompts or joined_prompts(known, sets, scenes or (), seed=seed)
    result = trained(
        lambda **told: SharedGatesTrainer(pipe, chosen, known, config, checkpoint_dir=out, **told),
        out,
        fresh=fresh,
        shown=config.progress,
    )
    last = result.history[-1]
    if as_json:
        facts = {name: last[name] for name in ("iteration", "loss", "seconds")}
        typer.echo(json.dumps({"shared": str(result.file), **facts}, indent=2))
        return
    show({"shared gates": str(result.file), "loss": f"{last['loss']:.4f}"})
    say(f"Draw with them: mole generate PROMPT --gates {result.file}{model_flag(model)} -e EXPERT ...")

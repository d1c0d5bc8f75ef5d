"""`mole baseline`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mole_diffusion.commands.common import (
    DeviceOption,
    ExpertOption,
    JsonOption,
    ModelOption,
    SizeOption,
    open_pipeline,
    parse_experts,
    parse_side,
    say,
    shares,
    show,
)
from mole_diffusion.commands.train_gates import (
    ConceptOption,
    ObjectiveChoice,
    ReferencesOption,
    known_concepts,
    model_flag,
    parse_concepts,
)
from mole_diffusion.core.files import check_writable
from mole_diffusion.starter.location import STARTER


def baseline(
    method: Annotated[
        str,
        typer.Argument(
            help="searched (LoRAHub), svd, ties or dare_linear (PEFT's merges), svdiff, textual_inversion,"
            " custom_diffusion, or gates."
        ),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts that searched and gates are prepared for.")
    ] = None,
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    concepts: ConceptOption = None,
    references: ReferencesOption = None,
    objective: Annotated[
        ObjectiveChoice, typer.Option(help="What searched and gates are judged by.")
    ] = ObjectiveChoice.collage,
    iterations: Annotated[
        int, typer.Option(min=1, help="Iterations of gates; UNet passes of searched.")
    ] = 400,
    density: Annotated[
        float | None, typer.Option(help="Share of values that ties (0.2) and dare_linear (0.7) keep.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps per concept; default: the method's own.")
    ] = None,
    size: SizeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder to write; default: outputs/METHOD.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prepare another way of combining experts, to compare with gates.

    A finished preparation is not done again; one that was stopped goes on. la, nla, switch and composite need
    no preparation.

    Example: [bold]mole baseline ties -e boot -e clock --out outputs/ties[/]
    """
    from mole_diffusion.methods import METHODS, PrepareOptions, prepare
    from mole_diffusion.methods.methods import method_named
    from mole_diffusion.pictures.training import TrainingConfig

    choices, texts = parse_experts(experts), parse_concepts(concepts)
    if not method_named(method).needs_preparation:
        words = [name for name, one in METHODS.items() if not one.needs_preparation]
        raise typer.BadParameter(
            f"{', '.join(words)} need none: mole generate ... --mixture {method}", param_hint="METHOD"
        )
    config = TrainingConfig(
        objective=objective.value,
        iterations=iterations,
        resolution=parse_side(size),
        seed=seed,
        progress=not as_json,
    )
    options = PrepareOptions(density=density, steps=steps)
    folder = out or Path("outputs") / method
    check_writable(folder)
    say(f"Loading {model} ...")
    pipe = open_pipeline(model, choices, None, device, training=True)
    known = known_concepts(pipe.experts, texts, references, model) if _needs_concepts(method) else None
    say(f"{METHODS[method].label}: {METHODS[method].description}")
    prepared = prepare(method, pipe, prompts or (), known, config, folder, options)
    if as_json:
        facts = {"method": method, "seconds": prepared.seconds, "unet_passes": prepared.unet_passes}
        typer.echo(json.dumps({"folder": str(folder), **facts, "details": prepared.details}, indent=2))
        return
    _show(prepared)
    again = "".join(f" -e {text}" for text in experts or ())
    text = prompts[0] if prompts else "PROMPT"
    say(f'Draw with it: mole generate "{text}" --mixture {folder}{model_flag(model)}{again}')


def _needs_concepts(method: str) -> bool:
    """Whether a method has to know what the experts know."""
    return method not in ("svd", "ties", "dare_linear")


def _show(prepared: Any) -> None:
    passes = prepared.unet_passes
    facts = {
        "folder": str(prepared.folder),
        "UNet passes": f"{passes['with_gradient']} with gradient, {passes['without_gradient']} without",
    }
    weights = prepared.details.get("mixture")
    show({**facts, **({"weights": shares(weights)} if isinstance(weights, dict) else {})})

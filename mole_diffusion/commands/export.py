"""`mole export`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mole_diffusion.commands.common import (
    ActiveOption,
    DeviceOption,
    ExpertOption,
    GatesOption,
    JsonOption,
    ModelOption,
    SizeOption,
    open_pipeline,
    parse_experts,
    parse_size,
    progress,
    say,
    say_composition,
    say_unnamed,
    show,
    split_names,
)
from mole_diffusion.core.checkpoint import read_gates_header
from mole_diffusion.core.files import check_writable
from mole_diffusion.starter.location import STARTER


class FormatChoice(str, Enum):
    """How a LoRA file names its tensors."""

    diffusers = "diffusers"
    kohya = "kohya"


def export(
    file: Annotated[Path, typer.Argument(dir_okay=False, help="LoRA to write (.safetensors).")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts like those the LoRA will be used for.")],
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    gates: GatesOption = None,
    active: ActiveOption = None,
    form: Annotated[
        FormatChoice, typer.Option("--format", help="Names of the tensors; kohya for web UIs and ComfyUI.")
    ] = FormatChoice.diffusers,
    rank: Annotated[int | None, typer.Option(min=1, help="Compress to this rank; default: exact.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per prompt.")] = 20,
    size: SizeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first prompt's noise.")] = 0,
    half: Annotated[bool, typer.Option("--half", help="Write float16: half the size.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Freeze the gates at their mean weights over some prompts and write the mixture as one plain LoRA.

    The file works wherever LoRAs do; the output says how far it is from the gates.

    Example: [bold]mole export both.safetensors "a zorin boot and a kipra clock" --gates gates.safetensors[/]
    """
    choices, names, pixels = parse_experts(experts), split_names(active, "--active"), parse_size(size)
    check_writable(file.parent)
    if gates is not None:
        read_gates_header(gates)  # shared gates know no means: they go by the places of a picture
    say(f"Loading {model} ...")
    pipe = open_pipeline(model, choices, gates, device)
    say_composition(pipe, "gates", names)
    for prompt in prompts:
        say_unnamed(pipe, prompt, names)
    import torch

    with progress("calibrating", 3 * steps * len(prompts)) as done:
        report = pipe.export_lora(
            file,
            form.value,
            prompts=prompts,
            steps=steps,
            size=(pixels["height"], pixels["width"]) if pixels else None,
            seed=seed,
            rank=rank,
            active_experts=names,
            dtype=torch.float16 if half else torch.float32,
            callback=lambda count, _: done(count),
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    facts = {
        "LoRA": str(report.path),
        "experts": ", ".join(report.experts),
        "rank": ", ".join(f"{part} {value}" for part, value in report.ranks.items()),
    }
    if rank is not None:
        facts["compression"] = f"{report.compression_error:.1%} of the mixture lost"
    trained = any(mixture.is_trained for mixture in pipe.mixtures.values())
    if not trained:
        facts["gates"] = "none were trained: the file is the experts' plain mean"
        show(facts)
        return
    facts["against gates"] = (
        f"noise predictions differ by {report.noise_difference:.1%}, "
        f"which is {report.effect_difference:.1%} of what the gates change in the base"
    )
    show(facts)

"""`mole demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mole_diffusion.commands.common import console, errors, say, show, split_names

if TYPE_CHECKING:
    from mole_diffusion.pictures.demo import DemoResult


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in split_names(text, "--seeds") or ())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 0,1,2", param_hint="--seeds"
        ) from error


def demo(
    experts: Annotated[
        str | None,
        typer.Option(help="Experts of the starter, separated by commas. Default: its first three."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to draw. Default: the experts' triggers on the beach.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="One picture per seed in every row.")] = "0,1,2,3",
    iterations: Annotated[int, typer.Option(min=1, help="Training iterations of the gates.")] = 400,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps per picture.")] = 25,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for what the demo writes.")] = Path(
        "demo"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew instead of going on where a run stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the written files as JSON.")] = False,
) -> None:
    """Train gates for three experts of the starter and show what they change, on the same seeds.

    Everything ships with the project, nothing is downloaded. After Ctrl-C run it again to go on.

    Example: [bold]mole demo --experts dog,boot,monster --iterations 200[/]
    """
    from mole_diffusion.pictures.demo import DemoOptions, run_demo
    from mole_diffusion.training.state import STATE_FILE

    options = DemoOptions(
        experts=split_names(experts, "--experts"),
        prompt=prompt,
        seeds=_seeds(seeds),
        iterations=iterations,
        steps=steps,
        out=out,
        fresh=fresh,
    )
    try:
        result = run_demo(options, say=say)
    except KeyboardInterrupt:
        command = "the same command without --fresh" if fresh else "the same command"
        trained = (out / "training" / STATE_FILE).is_file()
        after = "goes on with the training where it stopped" if trained else "begins again"
        errors.print(f"Stopped; {command} {after}.")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({name: str(path) for name, path in result.files.items()}, indent=2))
    else:
        _show_demo(result)


def _show_demo(result: DemoResult) -> None:
    console.print("\n[bold]Written[/]")
    show({name: str(path) for name, path in result.files.items()})
    console.print("\n[bold]What to try next[/]")
    for line in result.next_steps:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)

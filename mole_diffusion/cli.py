"""The command line `mole`. Each command is a thin function here; the work is done in the module it imports.

Imports of the model libraries stay inside the commands, so that `mole --help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from mole_diffusion import __version__
from mole_diffusion.errors import MoLEError

if TYPE_CHECKING:
    from mole_diffusion.demo import DemoResult

__all__ = ["app", "main"]

console = Console()
errors = Console(stderr=True)


class _Commands(TyperGroup):
    """Shows the project's own errors as one line and exits with 1; all else is a bug with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MoLEError, FileNotFoundError) as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="mole",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixture of LoRA Experts: several LoRAs in one picture, mixed by small learned gates.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mole {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    pass


def _split(text: str | None, option: str) -> tuple[str, ...] | None:
    """`"a, b"` -> `("a", "b")`; None stays None."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter(f"{text!r} names nothing; write a list such as a,b,c", param_hint=option)
    return parts


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text, "--seeds") or ())
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 0,1,2", param_hint="--seeds"
        ) from error


@app.command()
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
    from mole_diffusion.demo import DemoOptions, run_demo

    options = DemoOptions(
        experts=_split(experts, "--experts"),
        prompt=prompt,
        seeds=_seeds(seeds),
        iterations=iterations,
        steps=steps,
        out=out,
        fresh=fresh,
        progress=not as_json,
    )
    try:
        result = run_demo(options, say=lambda line: errors.print(escape(line), highlight=False))
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on with the training where it stopped.")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({name: str(path) for name, path in result.files.items()}, indent=2))
    else:
        _show_demo(result)


def _show_demo(result: DemoResult) -> None:
    console.print("\n[bold]Written[/]")
    for name, path in result.files.items():
        console.print(f"  {name:<16} {escape(str(path))}", highlight=False, soft_wrap=True)
    console.print("\n[bold]What to try next[/]")
    for line in result.next_steps:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file or a gates file (safetensors).", dir_okay=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a LoRA file or a gates file contains, and which of its keys would be ignored.

    Example: [bold]mole inspect demo/gates.safetensors[/]
    """
    from mole_diffusion.inspection import describe_file

    description = describe_file(file)
    if as_json:
        typer.echo(json.dumps(description.to_dict(), indent=2))
        return
    console.print(f"[bold]{escape(description.title)}[/]", highlight=False)
    for name, value in description.facts.items():
        console.print(f"  {name:<16} {escape(value)}", highlight=False, soft_wrap=True)
    for heading, lines in description.sections.items():
        console.print(f"\n[bold]{escape(heading)}[/]", highlight=False)
        for line in lines:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `mole` script."""
    app(prog_name="mole")


if __name__ == "__main__":
    main()

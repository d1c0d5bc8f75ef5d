"""All commands together: a thin function for each; the work is done in what they import.

Imports of the model libraries stay inside the commands, so that `mole --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mole_diffusion import __version__
from mole_diffusion.commands.app import app as serve
from mole_diffusion.commands.baseline import baseline
from mole_diffusion.commands.common import Commands
from mole_diffusion.commands.demo import demo
from mole_diffusion.commands.doctor import doctor
from mole_diffusion.commands.evaluate import evaluate
from mole_diffusion.commands.export import export
from mole_diffusion.commands.generate import generate
from mole_diffusion.commands.inspect import inspect
from mole_diffusion.commands.text_baseline import text
from mole_diffusion.commands.train_expert import train_expert
from mole_diffusion.commands.train_gates import train_gates
from mole_diffusion.commands.train_shared import train_shared

app = typer.Typer(
    name="mole",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixture of LoRA Experts: several LoRAs in one picture, mixed by small learned gates.",
)
for command in (
    demo,
    generate,
    train_gates,
    train_shared,
    train_expert,
    baseline,
    evaluate,
    export,
    inspect,
    doctor,
):
    app.command()(command)
app.command("app")(serve)
app.add_typer(text)


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

"""`mole inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mole_diffusion.commands.common import console, show


def inspect(
    file: Annotated[Path, typer.Argument(help="A LoRA file, a PEFT folder, or a gates file (safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a LoRA or a gates file contains, where its strength stands, and which keys would be ignored.

    Example: [bold]mole inspect demo/gates.safetensors[/]
    """
    from mole_diffusion.core.inspection import describe_file

    description = describe_file(file)
    if as_json:
        typer.echo(json.dumps(description.to_dict(), indent=2))
        return
    console.print(f"[bold]{escape(description.title)}[/]", highlight=False)
    show(description.facts)
    for heading, lines in description.sections.items():
        console.print(f"\n[bold]{escape(heading)}[/]", highlight=False)
        for line in lines:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)

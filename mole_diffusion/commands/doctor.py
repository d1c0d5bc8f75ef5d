"""`mole doctor`."""

from __future__ import annotations

import json

import typer
from rich.markup import escape

from mole_diffusion.commands.common import JsonOption, console, errors, show


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what PyTorch can compute on, what does not go together, and the way out.

    Exits with 1 if something is missing that the project cannot do without, or does not work.

    Example: [bold]mole doctor --json[/]
    """
    from mole_diffusion.commands.diagnosis import diagnose

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        sections = {
            "Installation": {**found.system, **{p.name: p.version for p in found.packages if p.version}},
            "Devices": dict(line.split(": ", 1) for line in found.devices),
            "Starter": found.starter,
            "Not installed": {
                p.name: f"{p.install}    for {p.purpose}" for p in found.packages if not p.version
            },
        }
        for heading, facts in sections.items():
            if facts:
                console.print(f"[bold]{heading}[/]")
                show(facts)
        for note in found.notes:
            errors.print(f"[bold yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
        for problem in found.problems:
            errors.print(f"[bold red]problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)

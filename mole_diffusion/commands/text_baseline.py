"""`mole text baseline` and `mole text demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mole_diffusion.commands.common import DeviceOption, JsonOption, say, shares, show
from mole_diffusion.commands.text import (
    ExamplesArgument,
    ExpertOption,
    ModelOption,
    SeedOption,
    open_model,
    text,
)
from mole_diffusion.core.files import check_writable, replacing
from mole_diffusion.starter.location import STARTER

__all__ = ["text"]

_METHODS = ("lorahub", "pems", "searched", "tuned", "alone")


@text.command()
def baseline(
    method: Annotated[str, typer.Argument(metavar="METHOD", help=f"One of {', '.join(_METHODS)}.")],
    examples: ExamplesArgument,
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    budget: Annotated[int, typer.Option(min=1, help="Evaluations of a search; LoRAHub's are 40.")] = 40,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the weights or the merged LoRA.")
    ] = Path("outputs/text-baseline"),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge or weigh experts without gates: LoRAHub, PEMs and others.

    lorahub and pems write a PEFT folder, the others weights for [bold]--mixture OUT/weights.json[/].

    Example: [bold]mole text baseline lorahub five.jsonl -e one-step -e two-steps --out outputs/lorahub[/]
    """
    from mole_diffusion.text import merging
    from mole_diffusion.text.examples import pairs_of

    if method not in _METHODS:
        raise typer.BadParameter(f"{method!r} is none of {', '.join(_METHODS)}", param_hint="METHOD")
    pairs = pairs_of(examples)
    check_writable(out)
    opened = open_model(model, experts, None, device)
    opened.need_experts("baseline")
    searches: dict[str, Any] = {"budget": budget, "seed": seed} if method in ("lorahub", "searched") else {}
    given = () if method == "pems" else (opened.tokenizer, pairs)
    found = getattr(merging, method)(opened, *given, **searches)
    with replacing(out / "weights.json") as temporary:
        temporary.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    if found.expert is not None:
        found.save(out, model)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **found.to_dict()}, indent=2))
        return
    show({"out": str(out), "weights": shares(found.weights)})


@text.command()
def demo(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks of the starter; default: one per family.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Held-out items of each.")] = 3,
    device: DeviceOption = "auto",
) -> None:
    """Show what experts of the text starter know and its base does not.

    Example: [bold]mole text demo plain-to-vel boolean[/]
    """
    from mole_diffusion.core.errors import ConfigError
    from mole_diffusion.starter.text.tasks import EXPERTS

    names = tasks or ["plain-to-vel", "words-to-text", "free-answer", "coloured-objects", "one-step"]
    for name in names:
        if name not in EXPERTS:
            raise ConfigError(f"no task is called {name!r}; known are {', '.join(EXPERTS)}")
    opened = open_model(STARTER, names, None, device)
    for name in names:
        examples = EXPERTS[name].examples(items, "demo", held_out=True)
        texts = [one.source for one in examples]
        alone, own = opened.answer(texts, mixture="none"), opened.answer(texts, active_experts=[name])
        say(name)
        for example, base, expert in zip(examples, alone, own, strict=True):
            show({"read": example.source, "right": example.target, "base": base, "expert": expert})

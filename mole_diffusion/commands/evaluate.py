"""`mole evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mole_diffusion.commands.common import JsonOption, console, errors, say, split_names
from mole_diffusion.commands.diagnosis import need_extra
from mole_diffusion.core.files import check_writable


def evaluate(
    protocol: Annotated[
        str, typer.Argument(help='A protocol that ships ("starter", "paper", "text-table3") or a YAML file.')
    ] = "starter",
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder; default: outputs/evaluation/PROTOCOL.")
    ] = None,
    sets: Annotated[
        str | None,
        typer.Option(help="Only these sets, such as boot+monster+clock, or tasks; separated by commas."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, separated by commas.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="The first so many seeds; the protocol has its own.")
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Measure the kept pictures anew; draw nothing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write tables and figures of what is there; draw nothing.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help='Where to compute, such as "cpu" or "cuda:1"; default: the fastest.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the same seeds with every method, measure the pictures and write tables and figures.

    What is there already is not drawn again: after Ctrl-C the same command goes on. With several devices:
    [bold]accelerate launch -m mole_diffusion.cli evaluate ...[/]

    Example: [bold]mole evaluate starter --methods nla,gates --sets boot+monster+clock --seeds 4[/]
    """
    need_extra("evaluate", "mole evaluate")
    if is_of_texts(protocol):
        names = split_names(sets, "--sets"), split_names(methods, "--methods")
        _texts(protocol, out, names, seeds, device, rescore=rescore, report=report, as_json=as_json)
        return
    import torch

    from mole_diffusion.evaluation.pictures import run
    from mole_diffusion.evaluation.pictures.measures import PICTURES
    from mole_diffusion.evaluation.pictures.protocol import load_protocol
    from mole_diffusion.evaluation.results import Results
    from mole_diffusion.pictures.opening import pick_device

    if rescore and report:
        raise typer.BadParameter("cannot go with --report: it writes tables itself", param_hint="--rescore")
    if rescore and (sets or methods or seeds):
        raise typer.BadParameter(
            "measures all pictures: no --sets, --methods, --seeds", param_hint="--rescore"
        )
    whole = load_protocol(protocol)
    wanted = whole.restricted(split_names(sets, "--sets"), split_names(methods, "--methods"), seeds)
    folder = _writable(out, protocol)
    where = None if device is None else torch.device(pick_device(device))
    try:
        if report:
            table = run.write_report(wanted, folder, Results(folder, PICTURES).read())
        elif rescore:
            table = run.rescore(wanted, folder, device=where, say=say)
        else:
            table = run.evaluate(wanted, folder, device=where, say=say, shown=not as_json)
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on where it was.")
        raise typer.Exit(1) from None
    _show(folder, table, as_json)


def _writable(out: Path | None, protocol: str) -> Path:
    """The folder of a run.

    Raises:
        WriteError: nothing can be written there.
    """
    folder = out or Path("outputs") / "evaluation" / Path(protocol).stem
    check_writable(folder)
    return folder


def is_of_texts(protocol: str, before: tuple[str, ...] = ()) -> bool:
    """Whether a protocol is about language models: its name, or that of what it extends, begins so."""
    path = Path(protocol)
    if path.stem.startswith("text-"):
        return True
    if not path.is_file() or protocol in before:
        return False
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # Whoever opens it says what is wrong.
    extended = values.get("extends") if isinstance(values, dict) else None
    if extended is None:
        return False
    beside = path.parent / str(extended)
    return is_of_texts(str(beside if beside.is_file() else extended), (*before, protocol))


def _texts(
    protocol: str,
    out: Path | None,
    names: tuple[tuple[str, ...] | None, tuple[str, ...] | None],
    seeds: int | None,
    device: str | None,
    *,
    rescore: bool,
    report: bool,
    as_json: bool,
) -> None:
    """The same for language models."""
    import torch

    from mole_diffusion.evaluation.results import Results
    from mole_diffusion.evaluation.text.domain import TEXTS, Texts, evaluate_texts
    from mole_diffusion.evaluation.text.protocol import load_text_protocol
    from mole_diffusion.pictures.opening import pick_device

    if rescore:
        raise typer.BadParameter("goes with pictures alone", param_hint="--rescore")
    wanted = load_text_protocol(protocol).restricted(*names, seeds)
    folder = _writable(out, protocol)
    where = torch.device(pick_device(device or "auto"))
    try:
        if report:
            domain = Texts(wanted, folder, where)
            table = domain.report(Results(folder, TEXTS).read())
        else:
            table = evaluate_texts(wanted, folder, device=where, say=say, shown=not as_json)
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on where it was.")
        raise typer.Exit(1) from None
    _show(folder, table, as_json)


def _show(folder: Path, table: Any, as_json: bool) -> None:
    if not table:  # Not the first of several processes.
        return
    if as_json:
        methods = {
            method: {measure: _plain(entry) for measure, entry in row.items()}
            for method, row in table["all"].items()
        }
        typer.echo(json.dumps({"out": str(folder), "methods": methods}, indent=2))
        return
    console.print(
        (folder / "table.md").read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True
    )
    say(f"Written to {folder}")


def _plain(entry: Any) -> dict[str, Any]:
    values = dict(vars(entry))
    return {"pictures": values.pop("count"), **values}

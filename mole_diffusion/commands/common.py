"""What the commands share: consoles, errors, progress, and opening a model with experts and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from mole_diffusion.errors import ConfigError, MoLEError, UnknownExpertError

if TYPE_CHECKING:
    from mole_diffusion.pipeline import StableDiffusionMoLEPipeline

STARTER = "starter"

console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help='"starter", a file, a folder or a hub id such as owner/name.')
]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        "-e",
        metavar="NAME|FILE[=SCALE]",
        help="An expert of the starter, a LoRA file, a folder or a hub id; again for each expert.",
    ),
]
GatesOption = Annotated[
    Path | None, typer.Option(help="Trained gates; with the starter they also choose the experts.")
]
ActiveOption = Annotated[
    str | None, typer.Option(help="The experts that count, separated by commas; default: all.")
]
DeviceOption = Annotated[
    str, typer.Option(help='Where to compute, such as "cpu" or "cuda:1"; "auto" takes the fastest there is.')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Commands(TyperGroup):
    """Shows the project's own errors as one line and exits with 1; all else is a bug with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MoLEError, FileNotFoundError) as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            errors.print("Stopped.")
            raise typer.Exit(1) from None


@dataclass(frozen=True)
class ExpertChoice:
    """What `--expert` names: a starter expert, file, folder or hub id, and its scale."""

    source: str
    scale: float = 1.0


def split_names(text: str | None, option: str) -> tuple[str, ...] | None:
    """`"a, b"` -> `("a", "b")`; None stays None."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter(f"{text!r} names nothing; write a list such as a,b,c", param_hint=option)
    return parts


def parse_experts(texts: Sequence[str] | None) -> list[ExpertChoice]:
    """`["boot", "dog.safetensors=0.8"]` as choices.

    Raises:
        typer.BadParameter: what follows the last "=" is no number.
    """
    return [_parse_expert(text) for text in texts or ()]


def _parse_expert(text: str) -> ExpertChoice:
    source, found, scale = text.rpartition("=")
    if not found or Path(text).exists():
        return ExpertChoice(text)
    try:
        return ExpertChoice(source, float(scale))
    except ValueError as error:
        raise typer.BadParameter(
            f"{scale!r} in {text!r} is no number; write NAME=0.8", param_hint="--expert"
        ) from error


def open_pipeline(
    model: str, experts: Sequence[ExpertChoice], gates: Path | None, device: str, *, training: bool = False
) -> StableDiffusionMoLEPipeline:
    """A silent pipeline with experts and gates.

    With the starter and no experts, the gates file names them; without gates they are the starter's default.

    Args:
        model: "starter", a file, a folder or a hub id.
        experts: what `--expert` named.
        gates: gates file to load.
        device: "auto" or a device.
        training: keep float32 also on a GPU.

    Raises:
        MoLEError: the model, an expert or the gates cannot be had.
    """
    from mole_diffusion.checkpoint import read_gates_header

    # Reads the file before the large ones.
    header = read_gates_header(gates) if gates is not None else None
    _hush_libraries()
    if model == STARTER and not experts and header is not None:
        names = dict.fromkeys(name for part in header.parts for name in header.expert_names(part))
        experts = [ExpertChoice(name) for name in names]
    where = pick_device(device)
    pipe = _open_model(model, use_defaults=not experts, half=where.startswith("cuda") and not training)
    for choice in experts:
        path, name = _locate(choice.source, model)
        pipe.load_expert(path, name=name, scale=choice.scale)
    if gates is not None:
        pipe.load_gates(gates)
    pipe.to(where)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _open_model(model: str, *, use_defaults: bool, half: bool) -> StableDiffusionMoLEPipeline:
    import torch

    from mole_diffusion.pipeline import StableDiffusionMoLEPipeline

    if model == STARTER:
        return StableDiffusionMoLEPipeline.from_starter(None if use_defaults else [])
    dtype = torch.float16 if half else torch.float32
    build = (
        StableDiffusionMoLEPipeline.from_single_file
        if Path(model).is_file()
        else StableDiffusionMoLEPipeline.from_pretrained
    )
    try:
        pipe: StableDiffusionMoLEPipeline = build(model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"the model {model!r} cannot be opened: {reason}") from error
    return pipe


def _locate(source: str, model: str) -> tuple[str | Path, str | None]:
    """(what `load_expert` should open, the expert's name or None for its own)."""
    from mole_diffusion.starter.location import starter_experts

    if model != STARTER:
        return source, None
    known = starter_experts()
    if source in known:
        return known[source].path, source
    if "/" in source or Path(source).exists() or source.endswith(".safetensors"):
        return source, None
    raise UnknownExpertError(source, list(known))


def pick_device(device: str) -> str:
    """The device for "auto": the first GPU that is there; any other text stays as it is.

    Raises:
        ConfigError: PyTorch does not know the device, or it is not there.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from error
    return device


def drawing_settings(model: str, guidance: float | None) -> dict[str, Any]:
    """Guidance for a model: the starter's own, else the pipeline's default; a given scale goes first."""
    settings: dict[str, Any] = {}
    if model == STARTER:
        from mole_diffusion.demo import GUIDANCE, RESCALE

        settings = {"guidance_scale": GUIDANCE, "guidance_rescale": RESCALE}
    if guidance is not None:
        settings["guidance_scale"] = guidance
    return settings


def _hush_libraries() -> None:
    """Their bars would break ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on the error stream: what is printed stays readable by programs.

    Yields:
        A function that is told how many of `total` are done.
    """
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=errors) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


def show(facts: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    for name, value in facts.items():
        console.print(f"  {name:<16} {escape(value)}", highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line on the error stream."""
    errors.print(escape(line), highlight=False, soft_wrap=True)


def shares(weights: Mapping[str, float]) -> str:
    """`"boot 0.52, monster 0.48"`."""
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())

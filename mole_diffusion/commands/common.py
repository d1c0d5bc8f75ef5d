"""What the commands share: consoles, errors, progress, and opening a model with experts and gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from mole_diffusion.core.errors import MoLEError, UnknownExpertError
from mole_diffusion.core.phrases import listed, unnamed
from mole_diffusion.pictures.opening import open_base
from mole_diffusion.starter.location import STARTERS
from mole_diffusion.training.progress import Progress

if TYPE_CHECKING:
    from mole_diffusion.pictures.pipelines import StableDiffusionMoLEPipeline

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
#: Picture sizes in pixels are multiples of this: the autoencoder halves three times.
_GRID = 8

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
    Path | None,
    typer.Option(help="Trained gates, which name the experts with the starter; or shared ones."),
]
ActiveOption = Annotated[
    str | None, typer.Option(help="The experts that count, separated by commas; default: all.")
]
SizeOption = Annotated[str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT; default: the model's.")]
DeviceOption = Annotated[
    str, typer.Option(help='Where to compute, such as "cpu" or "cuda:1"; "auto" takes the fastest there is.')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Commands(TyperGroup):
    """Shows the project's own errors as one line and exits with 1; all else is a bug with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
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

    With the starter and no experts, the gates file names them; without gates, or with shared ones, they are
    the starter's default.

    Args:
        model: "starter", a file, a folder or a hub id.
        experts: what `--expert` named.
        gates: gates file to load, or shared gates, which name no experts.
        device: "auto" or a device.
        training: keep float32 also on a GPU, and leave the gates that the starter has for its experts.

    Raises:
        MoLEError: the model, an expert or the gates cannot be had.
    """
    from mole_diffusion.core.checkpoint import read_gates_header
    from mole_diffusion.core.shared_gates import is_shared_gates
    from mole_diffusion.starter.location import default_experts

    # Reads the file before the large ones.
    shared = gates is not None and is_shared_gates(gates)
    header = read_gates_header(gates) if gates is not None and not shared else None
    if model in STARTERS and not experts and header is not None:
        names = dict.fromkeys(name for part in header.parts for name in header.expert_names(part))
        experts = [ExpertChoice(name) for name in names]
    if (training or shared) and model in STARTERS and not experts:
        # By name, which leaves their gates behind: a training begins with fresh ones, and these go first.
        experts = [ExpertChoice(name) for name in default_experts()]
    pipe: StableDiffusionMoLEPipeline = open_base(
        model, device, half=not training, starter_defaults=not experts
    )
    for choice in experts:
        path, name = _locate(choice.source, model)
        pipe.load_expert(path, name=name, scale=choice.scale)
    if gates is not None:
        (pipe.load_shared_gates if shared else pipe.load_gates)(gates)
    return pipe


def _locate(source: str, model: str) -> tuple[str | Path, str | None]:
    """(what `load_expert` should open, the expert's name or None for its own)."""
    from mole_diffusion.starter.location import starter_experts

    if model not in STARTERS:
        return source, None
    known = starter_experts(model=model)
    if source in known:
        return known[source].path, source
    if "/" in source or Path(source).exists() or source.endswith(".safetensors"):
        return source, None
    raise UnknownExpertError(source, list(known))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """How far long work is, on the error stream: what is printed stays readable by programs.

    Yields:
        A function that is told how many of `total` are done.
    """
    with Progress(what, total) as shown:
        yield shown.update


def free_path(path: Path) -> Path:
    """The path, or the same with a number where there is a file already: pictures are not written over."""
    found, number = path, 2
    while found.exists():
        found, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return found


def say_composition(
    pipe: StableDiffusionMoLEPipeline, mixture: Any = "gates", names: Any = None, prompt: str = ""
) -> None:
    """Say what is drawn with: experts, scales, and what decides between them."""
    active = [name for name in pipe.experts if names is None or name in names]
    if not active or mixture == "none":
        say("Drawing with the base model alone.")
        return
    scales = {name: pipe.experts[name].scale for name in active}
    shown = listed([name if scale == 1 else f"{name} x {scale:g}" for name, scale in scales.items()])
    trained = any(one.is_trained for one in pipe.mixtures.values())
    refined = ", refined by shared gates" if _is_refined(pipe, prompt, active) else ""
    ways = {
        "auto": f"where the prompt puts them (auto{refined}, no training); `mole train-gates` trains gates",
        "la": "each in full (LA)",
        "nla": "each at an equal share (NLA)",
    }
    if mixture == "auto" and len(active) == 1:
        way = "alone"
    elif mixture != "gates":
        way = ways.get(mixture, f"mixed by {mixture}") if isinstance(mixture, str) else "mixed as prepared"
    elif len(active) == 1:
        way = "alone"
    elif trained:
        way = "with trained gates"
    else:
        way = (
            "without trained gates, so each at an equal share (NLA); `mole train-gates` trains some,"
            " --gates FILE takes them"
        )
    say(f"Composing {shown}, {way}.")


def _is_refined(pipe: StableDiffusionMoLEPipeline, prompt: str, names: Sequence[str]) -> bool:
    """Whether shared gates refine what `auto` draws of a prompt; see `Auto.refining`."""
    from mole_diffusion.core.calling import Calling

    if pipe.shared_gates is None:
        return False
    calling, experts = Calling(), {name: pipe.experts[name] for name in names}
    return not calling.everywhere(calling.named_in(prompt, experts), experts)


def say_unnamed(pipe: StableDiffusionMoLEPipeline, prompt: str, names: Any = None) -> None:
    """Say which experts a prompt does not name by their phrase: they hardly show then."""
    phrases = {
        name: expert.triggers for name, expert in pipe.experts.items() if names is None or name in names
    }
    missing = unnamed(prompt, phrases)
    if missing:
        wanted = ", ".join(f"{phrase!r} for {name}" for name, phrase in missing.items())
        say(f"The prompt does not name every expert; write {wanted}.")


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


def parse_size(text: str | None) -> dict[str, int]:
    """Width and height for the pipeline; empty for the model's own."""
    if text is None:
        return {}
    match = _SIZE.fullmatch(text)
    sides = [int(side) for side in match.groups() if side] if match else []
    if not sides or any(side < _GRID or side % _GRID for side in sides):
        raise typer.BadParameter(
            f"{text!r}; write 512 or 512x768 (width x height), multiples of {_GRID}", param_hint="--size"
        )
    return {"width": sides[0], "height": sides[-1]}


def parse_side(text: str | None) -> int | None:
    """Height and width of square pictures, which is what is trained and judged on; None for the model's own.

    Raises:
        typer.BadParameter: no size, or one whose sides differ.
    """
    sides = set(parse_size(text).values())
    if len(sides) > 1:
        raise typer.BadParameter(f"{text!r}; these pictures are square: write 512", param_hint="--size")
    return next(iter(sides), None)

"""`mole train-gates`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mole_diffusion.commands.common import (
    DeviceOption,
    ExpertChoice,
    ExpertOption,
    JsonOption,
    ModelOption,
    open_pipeline,
    parse_experts,
    say,
    shares,
    show,
)
from mole_diffusion.core.errors import ConfigError, TrainingError, UnknownExpertError
from mole_diffusion.core.files import check_writable
from mole_diffusion.core.phrases import read_concept
from mole_diffusion.pictures.files import read_pictures
from mole_diffusion.starter.location import STARTER
from mole_diffusion.training.progress import Progress

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept, TrainingEvent


ConceptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--concept",
        metavar="NAME=TEXT[|CLASS[|KIND]]",
        help='What an expert knows: "dog=a sks dog|a dog"; KIND is subject, style ("ink=inkart||style") or '
        "garment. Default: the trigger in its file.",
    ),
]
ReferencesOption = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Folder with a folder of pictures per expert, by its name."
    ),
]


class ObjectiveChoice(str, Enum):
    """What gates are trained on."""

    collage = "collage"
    clip = "clip"
    both = "both"


def train_gates(
    prompts: Annotated[list[str], typer.Argument(help="Prompts that name every expert's subject.")],
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    concepts: ConceptOption = None,
    references: ReferencesOption = None,
    objective: Annotated[
        ObjectiveChoice,
        typer.Option(help="Collages of the experts' pictures, CLIP guidance (paper), or both."),
    ] = ObjectiveChoice.collage,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations in total.")] = 400,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures per iteration; default: the objective's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for gates, history and state.")] = Path(
        "outputs/gates"
    ),
    checkpoint_every: Annotated[
        int,
        typer.Option(min=1, help="Iterations between checkpoints; one is written every minute in any case."),
    ] = 50,
    preview_every: Annotated[
        int, typer.Option(min=0, help="Iterations between pictures in OUT/previews; 0 draws none.")
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help='Any other setting of `TrainingConfig`: "prior_weight=0.1"; again for each.',
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever the folder holds.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train gates for prompts that name several experts.

    After Ctrl-C the same command goes on where it stopped; and more --iterations make a training longer.

    Two runs with one seed are equal to the bit on one machine with one thread (OMP_NUM_THREADS=1); with more,
    libraries add numbers up in another order each time.

    Example: [bold]mole train-gates "a zorin boot and a kipra clock" -e boot -e clock --out outputs/pair[/]
    """
    from mole_diffusion.pictures.training import GateTrainer, TrainingConfig

    choices, texts = parse_experts(experts), parse_concepts(concepts)
    given = {"objective": objective.value, "iterations": iterations, "batch": batch, "seed": seed}
    shown = {"preview_every": preview_every, "checkpoint_every": checkpoint_every}
    config = TrainingConfig.from_dict({**given, **shown, **parse_settings(settings)})
    pipe, known = open_to_train(model, choices, texts, references, device, out)
    result = trained(
        lambda **told: GateTrainer(pipe, prompts, known, config, checkpoint_dir=out, **told),
        out,
        fresh=fresh,
        shown=config.progress,
    )
    last = result.history[-1]
    if as_json:
        facts = {name: last[name] for name in ("iteration", "loss", "weights", "seconds")}
        typer.echo(json.dumps({"gates": str(result.gates), **facts}, indent=2))
        return
    show({"gates": str(result.gates), "loss": f"{last['loss']:.4f}", "mean weights": shares(last["weights"])})
    again = "".join(f" -e {text}" for text in experts or ())
    say(f'Draw with them: mole generate "{prompts[0]}" --gates {result.gates}{model_flag(model)}{again}')


def open_to_train(
    model: str,
    experts: Sequence[ExpertChoice],
    texts: Mapping[str, tuple[str, str, str]],
    references: Path | None,
    device: str,
    out: Path,
) -> tuple[Any, dict[str, Concept]]:
    """A pipeline with experts to train for, and what each of them knows; nothing is loaded for a folder that
    cannot be written.

    Raises:
        MoLEError: see `open_pipeline` and `known_concepts`.
    """
    check_writable(out)
    say(f"Loading {model} ...")
    pipe = open_pipeline(model, experts, None, device, training=True)
    return pipe, known_concepts(pipe.experts, texts, references, model)


def trained(make: Callable[..., Any], out: Path, *, fresh: bool, shown: bool) -> Any:
    """Train or go on; says what Ctrl-C leaves behind.

    Args:
        make: makes the trainer, given its `callback` and `preparing`.
        out: its folder.
        fresh: begin anew, whatever the folder holds.
        shown: whether to show what is prepared.
    """
    from mole_diffusion.training.state import PREPARATION_FILE, STATE_FILE

    done = 0

    def count(event: TrainingEvent) -> None:
        nonlocal done
        done = event.iteration

    trainer = make(callback=count, preparing=_Preparing(shown))
    going_on = not fresh and (out / STATE_FILE).is_file()
    try:
        # Not None where there is a checkpoint: that begins anew over another training's results.
        return trainer.train(resume=False if fresh else going_on or None)
    except TrainingError as error:
        if going_on and not done:
            raise TrainingError(f"{error}\nGive another --out, or --fresh to begin anew there.") from error
        raise
    except KeyboardInterrupt:
        if any((out / name).is_file() for name in (STATE_FILE, PREPARATION_FILE)):
            command = "The same command without --fresh" if fresh else "The same command"
            say(f"Stopped; what is done is in {out}. {command} goes on from there.")
        else:
            say("Stopped before the first iteration; the same command begins again.")
        raise typer.Exit(1) from None


class _Preparing:
    """Shows how many pictures are drawn before the first iteration.

    Args:
        shown: whether to show anything.
    """

    def __init__(self, shown: bool) -> None:
        self._wanted = shown
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Tell that so many batches of pictures are there."""
        if self._bar is None:
            self._bar = Progress("pictures to train on, batch", total, done - 1, shown=self._wanted)
            self._bar.__enter__()
        self._bar.update(done)
        if done == total:
            self._bar.__exit__()


def known_concepts(
    experts: Mapping[str, Any], texts: Mapping[str, tuple[str, str, str]], references: Path | None, model: str
) -> dict[str, Concept]:
    """What each expert knows: as given, else the starter's catalogue, else the trigger in its file.

    Raises:
        UnknownExpertError: a text for an expert that is not loaded.
        ConfigError: nothing says what an expert knows, or no pictures are where they should be.
    """
    from mole_diffusion.pictures.demo import concepts_of
    from mole_diffusion.pictures.training.concepts import as_concepts, concepts_from_experts
    from mole_diffusion.starter.location import STARTERS, starter_experts

    for name in texts:
        if name not in experts:
            raise UnknownExpertError(name, list(experts))
    catalogue = starter_experts(model=model) if model in STARTERS else {}
    found: dict[str, Any] = {}
    for name, expert in experts.items():
        if name in texts:
            found[name] = dict(zip(("text", "class_text", "kind"), texts[name], strict=True))
        elif name in catalogue and catalogue[name].trigger in expert.triggers:
            found[name] = concepts_of({name: catalogue[name]})[name]
        else:
            found[name] = concepts_from_experts({name: expert})[name]
    known = as_concepts(found, list(experts))
    return known if references is None else _with_references(known, references)


def _with_references(concepts: Mapping[str, Concept], folder: Path) -> dict[str, Concept]:
    """Concepts with the pictures in the folders of their names; those without a folder stay as they are."""
    pictures = {name: read_pictures(folder / name) for name in concepts}
    if not any(pictures.values()):
        wanted = ", ".join(repr(f"{name}/") for name in concepts)
        raise ConfigError(f"--references {str(folder)!r} has no pictures in any of the folders {wanted}")
    return {
        name: replace(concept, references=pictures[name]) if pictures[name] else concept
        for name, concept in concepts.items()
    }


def parse_concepts(texts: Sequence[str] | None) -> dict[str, tuple[str, str, str]]:
    """`["dog=a sks dog|a dog"]` -> `{"dog": ("a sks dog", "a dog", "subject")}`.

    Raises:
        typer.BadParameter: there is no name or no text.
    """
    parsed = {}
    for entry in texts or ():
        try:
            name, text, class_text, kind = read_concept(entry)
        except ConfigError as error:
            raise typer.BadParameter(str(error), param_hint="--concept") from error
        parsed[name] = text, class_text, kind
    return parsed


def parse_settings(texts: Sequence[str] | None) -> dict[str, Any]:
    """`["prior_weight=0.1", "collage_layouts=[\\"strips\\"]"]` as settings: values are JSON, or else words.

    Raises:
        typer.BadParameter: there is no name or no value.
    """
    parsed: dict[str, Any] = {}
    for entry in texts or ():
        name, _, value = (part.strip() for part in entry.partition("="))
        if not name or not value:
            raise typer.BadParameter(f"{entry!r}; write NAME=VALUE", param_hint="--set")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def model_flag(model: str) -> str:
    """The option that names this model, for commands that are shown; nothing for the starter."""
    return "" if model == STARTER else f" --model {model}"

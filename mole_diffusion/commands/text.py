"""`mole text`: the commands for language models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mole_diffusion.commands.common import (
    ActiveOption,
    DeviceOption,
    GatesOption,
    JsonOption,
    errors,
    parse_experts,
    say,
    shares,
    show,
    split_names,
)
from mole_diffusion.commands.train_gates import parse_settings
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.core.files import check_writable
from mole_diffusion.starter.location import STARTER

if TYPE_CHECKING:
    from mole_diffusion.text import MoLEForSeq2SeqLM

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help='"starter", a folder or a hub id such as google/flan-t5-large.')
]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        "-e",
        metavar="NAME|FOLDER[=SCALE]",
        help="An expert of the starter, a PEFT folder, a file or a hub id; again for each expert.",
    ),
]
ExamplesArgument = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help='JSONL: in each line {"input": ..., "output": ...} or a pair.'
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; again for each."),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever the folder holds.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]

text = typer.Typer(
    name="text",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Experts for language models (T5): generate, train and compare.",
)


def open_model(
    model: str, experts: Sequence[str] | None, gates: Path | None, device: str
) -> MoLEForSeq2SeqLM:
    """A model with experts and gates.

    Args:
        model: "starter", a folder or a hub id.
        experts: as `--expert` has them; with the starter and gates they are those of the gates.
        gates: gates file to load.
        device: "auto" or a device.

    Raises:
        MoLEError: the model, an expert or the gates cannot be had.
    """
    import torch

    from mole_diffusion.core.checkpoint import read_gates_header
    from mole_diffusion.starter.text.location import text_experts
    from mole_diffusion.text import MoLEForSeq2SeqLM

    choices = parse_experts(experts)
    if gates is not None and model == STARTER and not choices:
        header = read_gates_header(gates)
        choices = parse_experts(
            list(dict.fromkeys(n for part in header.parts for n in header.expert_names(part)))
        )
    say(f"Loading {model} ...")
    try:
        opened = (
            MoLEForSeq2SeqLM.from_starter() if model == STARTER else MoLEForSeq2SeqLM.from_pretrained(model)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"no language model at {model!r}: {reason}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    opened.model.to(device)
    known = text_experts() if model == STARTER else {}
    for choice in choices:
        named = choice.source in known
        opened.load_expert(
            known.get(choice.source, choice.source), name=choice.source if named else None, scale=choice.scale
        )
    if gates is not None:
        opened.load_gates(gates)
    return opened


@text.command()
def generate(
    texts: Annotated[list[str], typer.Argument(help="What the model is to read.")],
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    gates: GatesOption = None,
    active: ActiveOption = None,
    mixture: Annotated[
        str,
        typer.Option(
            metavar="WORD|FILE",
            help="gates (trained), la (every expert in full), nla (every expert at 1/N), none (the base),"
            " arrow and energy (every matrix chooses by itself),"
            " or a file that `mole text baseline` wrote.",
        ),
    ] = "gates",
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a model with experts answer.

    Example: [bold]mole text generate "translate to vel: the cat sees the dog." -e plain-to-vel[/]
    """
    words = ("gates", "la", "nla", "none", "arrow", "energy")
    chosen: Any = mixture if mixture in words else _weights(Path(mixture))
    opened = open_model(model, experts, gates, device)
    answers = opened.answer(
        texts,
        active_experts=split_names(active, "--active"),
        mixture=chosen,
        num_beams=beams,
        max_new_tokens=tokens,
    )
    weights = {expert: weight for (expert,), weight in opened.gate_weights().mean("expert").items()}
    if as_json:
        result = {"answers": answers, "experts": list(opened.experts), "weights": weights}
        typer.echo(json.dumps(result, indent=2))
        return
    for answer in answers:
        typer.echo(answer)
    if weights:
        say(f"mean weights: {shares(weights)}")


@text.command("train-expert")
def train_expert(
    examples: ExamplesArgument,
    out: Annotated[Path, typer.Option(file_okay=False, help="PEFT folder to write.")] = Path(
        "outputs/text-expert"
    ),
    model: ModelOption = STARTER,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations in total.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Examples per iteration.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 8,
    seed: SeedOption = 0,
    settings: SettingsOption = None,
    fresh: FreshOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA on examples, ready as an expert.

    After Ctrl-C the same command goes on where it stopped.

    Example: [bold]mole text train-expert questions.jsonl --out experts/questions[/]
    """
    from mole_diffusion.text.expert_training import TextExpertConfig
    from mole_diffusion.text.expert_training import train_expert as train

    values = {"iterations": iterations, "batch_size": batch, "rank": rank, "seed": seed}
    config = _config(TextExpertConfig, {**values, **parse_settings(settings)})
    check_writable(out)
    opened = open_model(model, None, None, device)
    work = out.with_name(f"{out.name}.training")
    result = _going_on(
        lambda resume: train(opened.model, opened.tokenizer, examples, out, config, work=work, resume=resume),
        work,
        fresh=fresh,
    )
    loss = result.history[-1]["loss"]
    if as_json:
        typer.echo(
            json.dumps({"expert": str(out), "iterations": len(result.history), "loss": loss}, indent=2)
        )
        return
    show({"expert": str(out), "loss": f"{loss:.4f}"})


@text.command("train-gates")
def train_gates(
    examples: ExamplesArgument,
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Examples that tell when to stop.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations in total.")] = 800,
    batch: Annotated[int, typer.Option(min=1, help="Examples per iteration.")] = 12,
    patience: Annotated[
        int, typer.Option(min=0, help="Validations without gain before it stops; 0 never stops.")
    ] = 0,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for gates, history and state.")] = Path(
        "outputs/text-gates"
    ),
    gates_form: Annotated[
        list[str] | None,
        typer.Option("--gates-form", metavar="NAME=VALUE", help='Form of the gates: "pooling=mean".'),
    ] = None,
    settings: SettingsOption = None,
    fresh: FreshOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train gates on examples; the base and its experts stay as they are.

    After Ctrl-C the same command goes on where it stopped.

    Example: [bold]mole text train-gates examples.jsonl -e vel-to-plain -e one-step --out outputs/gates[/]
    """
    from mole_diffusion.core.config import MoLEConfig
    from mole_diffusion.text.training import TextTrainingConfig

    values = {"iterations": iterations, "batch_size": batch, "patience": patience, "seed": seed}
    config = _config(TextTrainingConfig, {**values, **parse_settings(settings)})
    form = MoLEConfig.from_dict(parse_settings(gates_form)) if gates_form else None
    check_writable(out)
    opened = open_model(model, experts, None, device)
    opened.need_experts("train-gates")
    if form is not None:
        opened.configure(form)
    result = _going_on(
        lambda resume: opened.train_gates(
            examples, config, validation=validation, checkpoint_dir=out, resume=resume
        ),
        out,
        fresh=fresh,
    )
    last = result.history[-1]
    facts = {
        "loss": last["loss"],
        "begun": dict(result.begun),
        "weights": last["weights"],
        "iteration": last["iteration"],
        "best": result.best,
    }
    if as_json:
        typer.echo(json.dumps({"gates": str(result.gates), **facts}, indent=2))
        return
    show(
        {
            "gates": str(result.gates),
            "loss": f"{last['loss']:.4f}",
            "begun with": shares(result.begun),
            "mean weights": shares(last["weights"]),
        }
    )


def _weights(path: Path) -> dict[str, float]:
    """A weight per expert from a file of `mole text baseline`."""
    if not path.is_file():
        raise typer.BadParameter(
            f"{str(path)!r} is no such word and no file of `mole text baseline`",
            param_hint="--mixture",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["weights"]
        return {str(name): float(weight) for name, weight in values.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{str(path)!r} holds no weight per expert: {error}") from error


def _config(kind: Any, values: dict[str, Any]) -> Any:
    """Settings of a class.

    Raises:
        ConfigError: one is unknown, or not allowed.
    """
    known = list(kind.__dataclass_fields__)
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"unknown setting {unknown[0]!r}; allowed are {', '.join(known)}")
    return kind(**values)


def _going_on(train: Any, folder: Path, *, fresh: bool) -> Any:
    """Train or go on; says what Ctrl-C leaves behind."""
    from mole_diffusion.training.state import STATE_FILE

    going_on = not fresh and (folder / STATE_FILE).is_file()
    try:
        # Not None, which begins anew over another training's results.
        return train(going_on)
    except TrainingError as error:
        if going_on:
            raise TrainingError(f"{error}\nGive another --out, or --fresh to begin anew there.") from error
        raise
    except KeyboardInterrupt:
        kept = (folder / STATE_FILE).is_file()
        again = "The same command without --fresh" if fresh else "The same command"
        what = f"goes on from what is in {folder}" if kept else "begins again"
        errors.print(f"Stopped. {again} {what}.")
        raise typer.Exit(1) from None

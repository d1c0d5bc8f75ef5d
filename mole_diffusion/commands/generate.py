"""`mole generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mole_diffusion.commands.common import (
    ActiveOption,
    DeviceOption,
    ExpertOption,
    GatesOption,
    JsonOption,
    ModelOption,
    open_pipeline,
    parse_experts,
    progress,
    say,
    shares,
    show,
    split_names,
)
from mole_diffusion.core.files import check_writable
from mole_diffusion.pictures.files import PICTURES
from mole_diffusion.pictures.opening import STARTER

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
#: Picture sizes in pixels are multiples of this: the autoencoder halves three times.
_GRID = 8


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, with the experts' triggers.")],
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    gates: GatesOption = None,
    active: ActiveOption = None,
    mixture: Annotated[
        str,
        typer.Option(
            metavar="WORD|FOLDER",
            help="gates (trained), la (every expert in full), nla (every expert at 1/N), none (the base"
            " alone), switch (one expert per step), composite (mean of their predictions), or a folder that"
            " `mole baseline` wrote.",
        ),
    ] = "gates",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(min=0, help="Scale of guidance by the prompt.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512 or WIDTHxHEIGHT; default: the model's.")
    ] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Picture to write.")] = Path(
        "outputs/picture.png"
    ),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw a picture with a mixture of experts.

    Example: [bold]mole generate "a zor boot and a kip clock on the beach" -e boot -e clock=0.8[/]
    """
    choices, names, pixels = parse_experts(experts), split_names(active, "--active"), _parse_size(size)
    if out.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{str(out)!r} ends in none of {', '.join(PICTURES)}", param_hint="--out")
    check_writable(out.parent)
    chosen = _read_mixture(mixture)
    say(f"Loading {model} ...")
    pipe = open_pipeline(model, choices, gates, device)
    settings: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    import torch

    with progress("drawing", steps) as done:

        def step_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            done(step + 1)
            return values

        picture = pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            active_experts=names,
            mixture=chosen,
            callback_on_step_end=step_end,
            **settings,
            **pixels,
        ).images[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    # Empty where no gate ran.
    weights = {expert: weight for (expert,), weight in pipe.gate_weights().mean("expert").items()}
    if as_json:
        result = {"picture": str(out), "prompt": prompt, "seed": seed, "experts": list(pipe.experts)}
        typer.echo(json.dumps({**result, "weights": weights}, indent=2))
        return
    show({"picture": str(out), **({"mean weights": shares(weights)} if weights else {})})


def _read_mixture(text: str) -> Any:
    """What `pipe(mixture=...)` takes: a word, or what was prepared in a folder.

    Raises:
        ConfigError: the folder holds no prepared baseline.
    """
    from mole_diffusion.methods import MIXTURES, load_prepared

    if text in MIXTURES:
        return text
    if not Path(text).is_dir():
        raise typer.BadParameter(
            f"{text!r} is none of {', '.join(MIXTURES)} and no folder of `mole baseline`",
            param_hint="--mixture",
        )
    return load_prepared(text)


def _parse_size(text: str | None) -> dict[str, Any]:
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

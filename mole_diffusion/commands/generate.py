"""`mole generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageOps

from mole_diffusion.app.infotext import lora_hash
from mole_diffusion.app.metadata import ExpertUse, PictureSettings, save_picture
from mole_diffusion.commands.common import (
    ActiveOption,
    DeviceOption,
    ExpertOption,
    GatesOption,
    JsonOption,
    ModelOption,
    SizeOption,
    free_path,
    open_pipeline,
    parse_experts,
    parse_size,
    progress,
    say,
    say_composition,
    say_unnamed,
    shares,
    show,
    split_names,
)
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import check_writable, file_sha256
from mole_diffusion.core.shared_gates import is_shared_gates
from mole_diffusion.pictures.components import guidance_arguments, size_arguments, usual_guidance
from mole_diffusion.pictures.files import PICTURES, open_picture, write_picture
from mole_diffusion.pictures.opening import from_picture
from mole_diffusion.pictures.samplers import SAMPLERS, sampler_of, sampling
from mole_diffusion.starter.location import STARTER, STARTERS, gates_of


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, with the experts' triggers.")],
    model: ModelOption = STARTER,
    experts: ExpertOption = None,
    gates: GatesOption = None,
    active: ActiveOption = None,
    mixture: Annotated[
        str | None,
        typer.Option(
            metavar="WORD|FOLDER",
            help="gates (trained), auto (no training: words and places find their experts by the prompt), la"
            " (every expert in full), nla (every expert at 1/N), none (the base"
            " alone), switch (one expert per step), composite (mean of their predictions), or a folder that"
            " `mole baseline` wrote; default: gates where there are trained ones, else auto.",
        ),
    ] = None,
    seed: Annotated[
        str, typer.Option("--seed", "--seeds", help="Seed of the noise; 0,1,2 draws a picture for each.")
    ] = "0",
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Scale of guidance by the prompt; default: the model's.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(help=f"One of {', '.join(SAMPLERS)}; default: the model's own.")
    ] = "",
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A picture to begin from, with --denoising."),
    ] = None,
    denoising: Annotated[
        float, typer.Option(min=0.01, max=1, help="How much of --image is drawn anew.")
    ] = 0.6,
    size: SizeOption = None,
    out: Annotated[
        Path,
        typer.Option(
            dir_okay=False, help="Picture to write; a file that is there stays, and the name gets a number."
        ),
    ] = Path("outputs/picture.png"),
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw pictures with a mixture of experts.

    A PNG carries its settings: dropped into the app they return, and web UIs read them.

    Example: [bold]mole generate "a zorin boot, a vekka monster and a kipra clock" --seed 0,1,2[/]
    """
    choices, names, pixels = parse_experts(experts), split_names(active, "--active"), parse_size(size)
    seeds = _parse_seeds(seed)
    if out.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{str(out)!r} ends in none of {', '.join(PICTURES)}", param_hint="--out")
    if image is not None and int(steps * denoising) < 1:
        raise ConfigError(f"{steps} steps at --denoising {denoising:g} draw nothing: raise one of the two")
    check_writable(out.parent)
    chosen = None if mixture is None else _read_mixture(mixture)
    begin = None if image is None else open_picture(image)
    say(f"Loading {model} ...")
    pipe = open_pipeline(model, choices, gates, device)
    if chosen is None or mixture is None:
        chosen = mixture = pipe.usual_mixture
    say_composition(pipe, chosen, names, prompt)
    say_unnamed(pipe, prompt, names)
    if begin is not None:
        pipe, pixels = _from_picture(pipe, begin, pixels, denoising)
    if gates is None and model in STARTERS and not experts and gates_of(model).is_file():
        gates = gates_of(model)
    call = {
        "prompt": prompt,
        "num_inference_steps": steps,
        "active_experts": names,
        "mixture": chosen,
        **guidance_arguments(pipe, guidance, negative),
        **pixels,
    }
    known = PictureSettings(
        prompt=prompt,
        negative=negative,
        steps=steps,
        guidance=usual_guidance(pipe) if guidance is None else guidance,
        mixture=mixture if mixture in _words() else Path(mixture).name,
        model=model,
        gates=_gates_state(pipe, mixture),
        gates_sha256="" if gates is None or mixture != _mixed_by(gates) else file_sha256(gates),
        experts=tuple(_use(expert, names) for expert in pipe.experts.values()),
        sampler=sampler,
        image_sha256="" if image is None else file_sha256(image),
        denoising=1.0 if image is None else denoising,
    )
    drawn = [_draw(pipe, call, replace(known, seed=one), out) for one in seeds]
    if as_json:
        first, weights = drawn[0]
        pictures = [{"picture": str(path), "seed": one} for (path, _), one in zip(drawn, seeds, strict=True)]
        result = {"picture": str(first), "prompt": prompt, "seed": seeds[0], "experts": list(pipe.experts)}
        typer.echo(json.dumps({**result, "weights": weights, "pictures": pictures}, indent=2))
        return
    for path, weights in drawn:
        show({"picture": str(path), **({"mean weights": shares(weights)} if weights else {})})


def _draw(
    pipe: Any, call: dict[str, Any], settings: PictureSettings, out: Path
) -> tuple[Path, dict[str, float]]:
    """Draw and write one picture; returns its path and the experts' mean weights, none where no gate ran."""
    import torch

    with progress("drawing", settings.steps) as done, sampling(pipe, settings.sampler):

        def step_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            done(step + 1)
            return values

        draws = torch.Generator().manual_seed(settings.seed)
        picture = pipe(**call, generator=draws, callback_on_step_end=step_end).images[0]
        settings = replace(settings, width=picture.width, height=picture.height, sampled=sampler_of(pipe))
    path = free_path(out)
    if path.suffix.lower() == ".png":
        save_picture(picture, path, settings)
    else:
        write_picture(picture, path)
    weights = {expert: weight for (expert,), weight in pipe.gate_weights().mean("expert").items()}
    return path, weights


def _from_picture(
    pipe: Any, picture: Image.Image, pixels: dict[str, Any], denoising: float
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that begins from a picture, with the same experts, and its arguments for that.

    Raises:
        ConfigError: there is none of this family.
    """
    from mole_diffusion.pictures.denoisers import own_size

    height, width = own_size(pipe)
    width, height = pixels.get("width", width), pixels.get("height", height)
    begins = from_picture(pipe)
    image = ImageOps.fit(picture, (width, height))
    return begins, {"image": image, "strength": denoising, **size_arguments(begins, height, width)}


def _use(expert: Any, names: Sequence[str] | None) -> ExpertUse:
    """How an expert takes part."""
    path = expert.path
    return ExpertUse(
        name=expert.name,
        sha256=expert.sha256,
        strength=expert.scale,
        active=names is None or expert.name in names,
        lora_hash="" if path is None else lora_hash(path),
    )


def _gates_state(pipe: Any, mixture: str) -> str:
    if mixture != "gates" or not pipe.experts:
        return ""
    return "trained" if any(one.is_trained for one in pipe.mixtures.values()) else "fresh"


def _mixed_by(gates: Path) -> str:
    """The mixture in which a gates file has a say."""
    return "auto" if is_shared_gates(gates) else "gates"


def _words() -> Sequence[str]:
    from mole_diffusion.methods import MIXTURES

    return tuple(MIXTURES)


def _parse_seeds(text: str) -> tuple[int, ...]:
    """`"0,1,2"` as numbers.

    Raises:
        typer.BadParameter: something else, or a seed that no generator takes.
    """
    try:
        seeds = tuple(int(part) for part in split_names(text, "--seed") or ())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}; write 5, or 0,1,2 for several", param_hint="--seed") from error
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise typer.BadParameter(f"{text!r}; seeds are from 0 to {2**32 - 1}", param_hint="--seed")
    return seeds


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

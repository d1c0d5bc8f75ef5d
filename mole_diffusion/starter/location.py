"""Where the starter lies, and which experts come with it."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from mole_diffusion.core.errors import ConfigError

#: How the starter draws best. More guidance drives colours too far and costs subjects, with one expert and
#: with several. Plain guidance overexposes pictures of a model with zero terminal SNR (Lin et al. 2023, 3.4).
GUIDANCE, RESCALE = 2.0, 0.7

#: Names of its models where a model is asked for: the small Stable Diffusion, and the small FLUX.1 beside it.
STARTER, FLUX_STARTER = "starter", "starter-flux"
STARTERS = (STARTER, FLUX_STARTER)
#: The folder of the small FLUX.1 in the starter's.
FLUX = "flux"
#: What their experts name as their base, in their files' headers.
BASE_NAMES = {STARTER: "mole-diffusion starter", FLUX_STARTER: "mole-diffusion starter, FLUX.1"}
#: Guidance of the small FLUX.1, in two passes.
FLUX_GUIDANCE = 2.0

#: What only evaluation reads: wheels leave it out, the repository and the source distribution have it.
EVALUATION_PARTS = ("judge", "clip_eval")
#: What wheels leave out of the starter: those parts, and the second model.
NOT_IN_WHEELS = (*EVALUATION_PARTS, FLUX)
#: Variable with the folder of what only evaluation reads, for an installed package.
EVALUATION_VARIABLE = "MOLE_EVALUATION_PARTS"

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class StarterExpert:
    """One expert of the starter, as `experts/experts.json` describes it.

    Attributes:
        name: expert name, also the file's name.
        kind: "concept" (a subject) or "style".
        trigger: the words it was trained on, e.g. "zorin boot".
        class_name: the same without the made-up word, e.g. "boot".
        text: trigger as a phrase, e.g. "a zorin boot".
        class_text: class as a phrase, e.g. "a boot".
        description: the subject in words of the starter's CLIPs, e.g. "a glossy 3d
            red boot"; "" for a style.
        path: the LoRA file.
        references: pictures of the subject or style, in order.
    """

    name: str
    kind: str
    trigger: str
    class_name: str
    text: str
    class_text: str
    description: str
    path: Path
    references: tuple[Path, ...]


def starter_dir() -> Path:
    """The starter's folder: the copy inside an installed wheel, else `assets/starter` of the repository.

    The folder need not exist yet: `tools.starter.build` makes it.
    """
    packaged = _PACKAGE / "_starter"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "assets" / "starter"


def evaluation_part(name: str) -> Path:
    """The folder of one of `EVALUATION_PARTS`.

    Raises:
        ConfigError: it is not here; wheels leave it out.
    """
    given = os.environ.get(EVALUATION_VARIABLE)
    folder = (Path(given) if given else starter_dir()) / name
    if not folder.is_dir():
        raise ConfigError(
            f"there is no {str(folder)!r}: what only evaluation reads does not come with the wheel. Take the "
            f"folders {' and '.join(EVALUATION_PARTS)} of assets/starter from the repository or the source "
            f"distribution, and set {EVALUATION_VARIABLE} to the folder that holds them"
        )
    return folder


def model_dir(model: str) -> Path:
    """The folder of one of STARTERS.

    Raises:
        FileNotFoundError: it is the small FLUX.1, and is not here; wheels leave it out.
    """
    folder = starter_dir()
    if model == STARTER:
        return folder
    folder /= FLUX
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no {str(folder)!r}: the small FLUX.1 does not come with the wheel; install "
            "the project from its repository, or take the folder assets/starter/flux from there"
        )
    return folder


def gates_of(model: str) -> Path:
    """The gates that one of STARTERS has for its default experts; the file need not be there."""
    return starter_dir() / ("" if model == STARTER else FLUX) / "experts" / "gates.safetensors"


def shared_gates_of(model: str) -> Path:
    """The shared gates that one of STARTERS has for whatever experts; the file need not be there."""
    return gates_of(model).with_name("shared.safetensors")


def starter_experts(folder: Path | None = None, *, model: str = STARTER) -> dict[str, StarterExpert]:
    """All experts of the starter by name, in the order of `experts/experts.json`.

    Args:
        folder: a starter folder; None is `starter_dir()`.
        model: one of STARTERS; the small FLUX.1 knows some of the same subjects, by the same words.

    Raises:
        FileNotFoundError: the folder has no `experts/experts.json`, or the model is not here.
    """
    if model != STARTER:
        files = model_dir(model) / "experts"
        return {
            name: replace(expert, path=files / f"{name}.safetensors")
            for name, expert in starter_experts().items()
            if (files / f"{name}.safetensors").is_file()
        }
    home = (folder or starter_dir()) / "experts"
    catalogue = home / "experts.json"
    if not catalogue.is_file():
        raise FileNotFoundError(f"the starter has no experts: {catalogue} does not exist")
    entries: dict[str, dict[str, str]] = json.loads(catalogue.read_text(encoding="utf-8"))
    return {
        name: StarterExpert(
            name=name,
            kind=entry["kind"],
            trigger=entry["trigger"],
            class_name=entry["class"],
            text=entry["text"],
            class_text=entry["class_text"],
            description=entry["description"],
            path=home / f"{name}.safetensors",
            references=tuple(
                sorted((home / name).glob("*.png"), key=lambda path: (len(path.stem), path.stem))
            ),
        )
        for name, entry in entries.items()
    }


def default_experts(folder: Path | None = None) -> list[str]:
    """The names `from_starter()` loads when none are asked for: the first three concepts of the catalogue."""
    concepts = [name for name, expert in starter_experts(folder).items() if expert.kind == "concept"]
    return concepts[:3]

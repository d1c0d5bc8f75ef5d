"""Gates and experts with one wrong fact each, and what the diffusers pipeline says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mole_diffusion.core.errors import MoLEError

FOLDER, FILE, EXPERT = "refused", "refused.json", "expert of another prediction type"
#: The gates that are right, among the refused ones.
RIGHT = "right"
_OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}


def write_refusals(pipe: Any, experts: Mapping[str, Path], folder: Path) -> None:
    """Write gates of a pipeline with wrong facts, an expert with one, and what the pipeline says.

    Args:
        pipe: with gates for the experts.
        experts: name -> file.
        folder: where `FOLDER` is made.
    """
    refused = folder / FOLDER
    refused.mkdir(parents=True)
    pipe.save_gates(refused / f"{RIGHT}.safetensors")
    pipe.load_gates(refused / f"{RIGHT}.safetensors")
    for name, change in _CHANGES.items():
        _changed(refused / f"{RIGHT}.safetensors", refused / f"{name}.safetensors", change)
    name, path = next(iter(experts.items()))
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
    header["modelspec.prediction_type"] = _OTHER[pipe.ensemble.facts["prediction_type"]]
    save_file(load_file(path), refused / f"{name}.safetensors", header)
    said = {case: error_of(pipe.load_gates, refused / f"{case}.safetensors") for case in _CHANGES}
    pipe.unload_expert(name)
    said[EXPERT] = error_of(pipe.load_expert, refused / f"{name}.safetensors")
    (folder / FILE).write_text(json.dumps({"said": said, "expert": name}))


def _prediction(header: dict[str, str], parts: dict[str, Any]) -> None:
    header["prediction_type"] = _OTHER[header["prediction_type"]]


def _base(header: dict[str, str], parts: dict[str, Any]) -> None:
    parts["unet"]["base"]["matrices"] = "0" * 64


def _expert_file(header: dict[str, str], parts: dict[str, Any]) -> None:
    for part in parts.values():
        part["experts"][0]["sha256"] = "1" * 64


def _expert_name(header: dict[str, str], parts: dict[str, Any]) -> None:
    for part in parts.values():
        part["experts"][0].update(name="stranger", sha256="2" * 64)


def _form(header: dict[str, str], parts: dict[str, Any]) -> None:
    """A part of another form, with the groups of the old one."""
    parts["unet"]["config"]["granularity"] = "layer"


def _part(header: dict[str, str], parts: dict[str, Any]) -> None:
    del parts["text_encoder"]


_CHANGES: dict[str, Callable[[dict[str, str], dict[str, Any]], None]] = {
    "prediction type": _prediction,
    "base": _base,
    "another file under an expert's name": _expert_file,
    "another expert": _expert_name,
    "form": _form,
    "part": _part,
}


def _changed(source: Path, target: Path, change: Callable[[dict[str, str], dict[str, Any]], None]) -> None:
    with safe_open(source, framework="pt") as file:
        header = dict(file.metadata())
    parts = json.loads(header["parts"])
    change(header, parts)
    save_file(load_file(source), target, {**header, "parts": json.dumps(parts)})


def error_of(call: Callable[..., object], *args: Any) -> dict[str, Any]:
    """What a call says when it refuses: the error's class, its first line, its differences.

    The class of the network here is the host's: it is left out.
    """
    try:
        call(*args)
    except MoLEError as error:
        differences = [_neutral(sentence) for sentence in getattr(error, "differences", [])]
        return {
            "class": type(error).__name__,
            "message": str(error).splitlines()[0],
            "differences": differences,
        }
    raise AssertionError("nothing was refused")


def _neutral(sentence: str) -> str:
    head, bracket, tail = sentence.partition(" in the file, ")
    return f"{head}{bracket}X here)" if bracket and "base network" in head else f"{head}{bracket}{tail}"


def refusals(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """What `write_refusals` wrote: case -> error, and the name of the expert with a wrong fact."""
    found = json.loads((folder / FILE).read_text())
    return found["said"], found["expert"]


def copy_experts(experts: Mapping[str, Path], folder: Path) -> None:
    """The experts' files under their names, where a web UI looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in experts.items():
        shutil.copyfile(path, folder / f"{name}.safetensors")

"""Opening a base model: one of the starter's, a file, a folder or a hub id. For command line and app."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.single_file import is_xl, read_header
from mole_diffusion.pictures.transformer_file import folder_around, holds_transformer, index_of
from mole_diffusion.sources import is_hub_id, nearest_path
from mole_diffusion.starter.location import STARTER, STARTERS


def open_base(model: str, device: str = "auto", *, half: bool = False, starter_defaults: bool = False) -> Any:
    """A silent pipeline with experts, of the kind that the file or folder says.

    Args:
        model: "starter", "starter-flux", a file, a folder or a hub id; a transformer alone lies in a folder
            with the rest.
        device: "auto" or a device.
        half: float16 on a GPU; float32 otherwise.
        starter_defaults: the starter comes with its default experts; everything else comes without any.

    Raises:
        ConfigError: the model or the device cannot be had.
    """
    import torch

    from mole_diffusion.pictures import pipelines as pipelines

    hush_libraries()
    where = pick_device(device)
    if model in STARTERS:
        unet = model == STARTER
        kind: Any = pipelines.StableDiffusionMoLEPipeline if unet else pipelines.FluxMoLEPipeline
        try:
            pipe = kind.from_starter(None if starter_defaults else [])
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from error
    else:
        path = Path(model).expanduser()
        try:
            single = path.is_file()
            maker: Any = (
                _class_of_file(path) if single else _class_of_folder(path if path.is_dir() else model)
            )
            # Transformers overflow in float16.
            small = torch.float16 if issubclass(maker, pipelines.AROUND_A_UNET) else torch.bfloat16
            dtype = small if half and where.startswith("cuda") else torch.float32
            build = maker.from_single_file if single else maker.from_pretrained
            rest = folder_around(path) if single and holds_transformer(read_header(path)) else None
            options = {} if rest is None else {"config": str(rest)}
            pipe = build(str(path) if path.exists() else model, torch_dtype=dtype, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"the model {model!r} cannot be opened: {reason}") from error
    pipe.to(where)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_picture(pipe: Any) -> Any:
    """The pipeline that begins from a picture, on the same networks and with the same experts.

    Raises:
        ConfigError: there is none of this family.
    """
    from mole_diffusion.pictures import pipelines

    kind = getattr(pipelines, type(pipe).__name__.replace("MoLEPipeline", "MoLEImg2ImgPipeline"), None)
    if kind is None or isinstance(pipe, kind):
        raise ConfigError(f"{type(pipe).__name__} does not begin from a picture")
    # The networks' own types: the default would cast them.
    made = kind.from_pipe(pipe, torch_dtype=None)
    made.set_progress_bar_config(disable=True)
    return made


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


def hush_libraries() -> None:
    """Switch off the libraries' bars, which would break ours, and a warning that is for programmers.

    For programs of ours alone: whoever uses the package in Python keeps the libraries' settings. Bars of
    downloads stay on a terminal, where gigabytes without a word would look like a hang.
    """
    import huggingface_hub.utils
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    # This one silences downloads as well.
    shown = sys.stderr.isatty() and not huggingface_hub.utils.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if shown:
        huggingface_hub.utils.enable_progress_bars()
    else:
        huggingface_hub.utils.disable_progress_bars()
    # The new name of the argument is not known to the oldest diffusers that works here.
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)


def _class_of_file(path: Path) -> type:
    """The pipeline for a checkpoint in one file, or for a transformer that lies in a folder with the rest.

    Raises:
        ValueError: it holds a transformer alone, and the rest is not there.
    """
    from mole_diffusion.pictures import pipelines

    header = read_header(path)
    if holds_transformer(header):
        folder = folder_around(path)
        if folder is None:
            raise ValueError(
                "the file holds a transformer, whose text encoders and autoencoder are files of their own; "
                "put it into a diffusers folder of such a model, or open it in Python with "
                "from_single_file(..., config=FOLDER)"
            )
        return _class_of_folder(folder)
    return pipelines.StableDiffusionXLMoLEPipeline if is_xl(header) else pipelines.StableDiffusionMoLEPipeline


def _class_of_folder(model: str | Path) -> type:
    """The pipeline for a diffusers folder or hub id.

    Raises:
        ValueError: it is no such folder, or of a kind that experts cannot be attached to.
    """
    from mole_diffusion.pictures import pipelines

    index = index_of(Path(model))
    if index is not None:
        facts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    elif Path(model).is_dir():
        raise ValueError("the folder has no model_index.json")
    elif not is_hub_id(model):
        raise ValueError(f"no such file or folder, and no hub id such as 'owner/name'.{nearest_path(model)}")
    else:
        facts = _facts_of_hub(str(model))
    name = re.sub("Img2Img|Inpaint|Modular", "", str(facts.get("_class_name", "")))
    known = pipelines.from_text()
    if name in known:
        return known[name]
    if "transformer" in facts:
        raise ValueError(f"it is a {name}, and experts are for {', '.join(known)}")
    return pipelines.StableDiffusionXLMoLEPipeline if "XL" in name else pipelines.StableDiffusionMoLEPipeline


def _facts_of_hub(model: str) -> dict[str, Any]:
    """What the index of a repository says.

    Raises:
        OSError: it has none, or cannot be reached.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    try:
        facts: dict[str, Any] = DiffusionPipeline.load_config(model)
    except OSError as error:
        try:
            facts = ModularPipeline.load_config(model)
        except OSError:
            raise error from None
    return facts

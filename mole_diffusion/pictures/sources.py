"""From what a user writes (a path, a folder, a hub id) to the file of one expert."""

import re
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ExpertLoadError

# What diffusers and PEFT training scripts call their file; it says nothing about the expert.
_USUAL_NAME = "pytorch_lora_weights.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_expert_file(
    source: str | Path, weight_name: str | None = None, **hub_options: Any
) -> tuple[Path, str]:
    """The safetensors file behind `source`, and a name for the expert in it.

    Args:
        source: a file, a folder with one LoRA file, or a hub id ("owner/name").
        weight_name: which file of the folder or hub repository.
        hub_options: for `huggingface_hub.snapshot_download` (revision, cache_dir, local_files_only, ...).

    Raises:
        ExpertLoadError: nothing there, several files to choose from, or the hub did not answer.
    """
    path = Path(source).expanduser()
    if path.is_file():
        name = path.resolve().parent.name if path.name == _USUAL_NAME else path.stem
        return path, name
    if path.is_dir():
        return _named(_pick(path, weight_name, source), path.resolve().name)
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)) or path.suffix == ".safetensors":
        raise ExpertLoadError(
            f"no expert at {str(source)!r}: not a file, not a folder, and not a hub id such as 'owner/name'"
        )
    folder = _download(source, weight_name, **hub_options)
    return _named(_pick(folder, weight_name, source), source.split("/")[1])


def _named(file: Path, home: str) -> tuple[Path, str]:
    """The file and its own name, or that of its home where the file's name says nothing."""
    return file, home if file.name == _USUAL_NAME else file.stem


def _pick(folder: Path, weight_name: str | None, source: str | Path) -> Path:
    """The one LoRA file in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    names = [file.name for file in files]
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise ExpertLoadError(f"{str(source)!r} has no file {weight_name!r}; it has {names}")
        return folder / weight_name
    if _USUAL_NAME in names:
        return folder / _USUAL_NAME
    if len(files) != 1:
        raise ExpertLoadError(
            f"{str(source)!r} has {len(files)} safetensors files, choose one with weight_name=: {names}"
        )
    return files[0]


def _download(repo_id: str, weight_name: str | None, **options: Any) -> Path:
    """The hub repository's LoRA files on this machine."""
    from huggingface_hub import snapshot_download

    try:
        # Without a name only the top folder: a whole model in the same repository would be gigabytes.
        wanted = [weight_name] if weight_name else ["*.safetensors"]
        unwanted = None if weight_name else ["*/*"]
        return Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=unwanted, **options))
    except (OSError, ValueError) as error:
        raise ExpertLoadError(f"the hub gave nothing for {repo_id!r}: {error}") from error

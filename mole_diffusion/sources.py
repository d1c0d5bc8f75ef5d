"""From what a user writes (a path, a folder, a hub id) to the file or folder of one expert."""

import re
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ExpertLoadError, nearest
from mole_diffusion.core.peft_folder import (
    ADAPTER_FILES,
    USUAL_STEMS,
    is_adapter_folder,
    network_folders,
    own_name,
)

# What diffusers' training scripts call their file.
_USUAL_NAME = f"{USUAL_STEMS[0]}.safetensors"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".png", ".zip")


def is_hub_id(source: str | Path) -> bool:
    """Whether a text that names nothing here is worth asking a hub for: "owner/name", no path with a slip.

    A path begins with a dot, a slash or a tilde, ends as files do, or begins with a folder that is here.
    """
    text = str(source)
    if not isinstance(source, str) or _HUB_ID.fullmatch(text) is None:
        return False
    return not text.lower().endswith(_FILE_SUFFIXES) and not Path(text).parent.is_dir()


def nearest_path(source: str | Path) -> str:
    """`" Did you mean 'models/dog.safetensors'?"`, where nearly this name lies there; else empty."""
    path = Path(source).expanduser()
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r}."
    names = [entry.name for entry in path.parent.iterdir()]
    found = nearest(path.name, names)
    return "" if found is None else f" Did you mean {str(path.with_name(found))!r}?"


def find_expert_file(
    source: str | Path, weight_name: str | None = None, **hub_options: Any
) -> tuple[Path, str]:
    """What `load_expert` is to open for `source`, and a name for the expert in it.

    Args:
        source: a file, a folder (with one LoRA file, as PEFT saves it, or with such a folder per network), or
            a hub id ("owner/name") of a repository that is one of these.
        weight_name: which file of the folder or hub repository.
        hub_options: for `huggingface_hub.snapshot_download` (revision, cache_dir, local_files_only, ...).

    Raises:
        ExpertLoadError: nothing there, several files to choose from, or the hub did not answer.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path, own_name(path)
    if path.is_dir():
        found = _pick(path, weight_name, source)
        return found, own_name(found)
    if not is_hub_id(source):
        raise ExpertLoadError(
            f"no expert at {str(source)!r}: not a file, not a folder, and not a hub id such as 'owner/name'."
            f"{nearest_path(source)}"
        )
    assert isinstance(source, str)
    found = _download(source, weight_name, **hub_options)
    says_nothing = found.is_dir() or found.stem in USUAL_STEMS
    return found, source.split("/")[1] if says_nothing else found.stem


def _pick(folder: Path, weight_name: str | None, source: str | Path) -> Path:
    """The one LoRA in a folder: a file, or the folder itself where what lies beside the file counts."""
    files = sorted(folder.glob("*.safetensors"))
    names = [file.name for file in files]
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise ExpertLoadError(f"{str(source)!r} has no file {weight_name!r}; it has {names}")
        return folder / weight_name
    if _USUAL_NAME in names:
        return folder / _USUAL_NAME
    if is_adapter_folder(folder) and (not files or ADAPTER_FILES[0] in names):
        return folder
    if len(files) != 1:
        raise ExpertLoadError(
            f"{str(source)!r} has {len(files)} safetensors files, choose one with weight_name=: {names}"
        )
    return files[0]


def _download(repo_id: str, weight_name: str | None, **options: Any) -> Path:
    """The LoRA of a hub repository, on this machine."""
    from huggingface_hub import snapshot_download

    inside = [f"{folder}/{name}" for folder in network_folders() for name in (*ADAPTER_FILES, _USUAL_NAME)]
    wanted = ["*.safetensors", ADAPTER_FILES[-1]] if weight_name is None else [weight_name]
    if weight_name in ADAPTER_FILES:
        wanted.append(ADAPTER_FILES[-1])
    try:
        # First only the top folder: a whole model in the same repository would be gigabytes.
        unwanted = None if weight_name else ["*/*"]
        folder = Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=unwanted, **options))
        if weight_name is None and not any(folder.glob("*.safetensors")):
            inside.append(ADAPTER_FILES[1])
            folder = Path(snapshot_download(repo_id, allow_patterns=inside, **options))
    except (OSError, ValueError) as error:
        raise ExpertLoadError(f"the hub gave nothing for {repo_id!r}: {error}") from error
    return _pick(folder, weight_name, repo_id)

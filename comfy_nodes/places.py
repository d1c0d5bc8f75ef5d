"""Where experts and gates lie: ComfyUI's folders, and the starter's own."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from mole_diffusion.core.errors import ExpertLoadError, GateMismatchError
from mole_diffusion.starter import starter_dir, starter_experts

#: ComfyUI's name of the folders with gates.
GATES = "mole_gates"
#: Before the name of an expert that comes with the project.
STARTER = "starter: "
#: The gates that come with it, for its first three experts.
STARTER_GATES = f"{STARTER}boot + monster + clock"


def register() -> None:
    """Tell ComfyUI of the folders with gates: models/mole_gates and output/mole_gates."""
    for home in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(GATES, os.path.join(home, GATES))
    folders, _ = folder_paths.folder_names_and_paths[GATES]
    folder_paths.folder_names_and_paths[GATES] = (folders, {".safetensors"})


def expert_choices() -> list[str]:
    """LoRA files of ComfyUI's folders, and the starter's experts."""
    files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
    return [*files, *(f"{STARTER}{name}" for name in _starter_files())]


def starter_names() -> list[str]:
    """Names of the starter's experts."""
    return list(_starter_files())


def expert_file(choice: str) -> Path:
    """The file of one of `expert_choices`.

    Raises:
        ExpertLoadError: it is not there.
    """
    if choice.startswith(STARTER):
        path = _starter_files().get(choice.removeprefix(STARTER))
    else:
        found = folder_paths.get_full_path("loras", choice)
        path = Path(found) if found else None
    if path is None or not path.is_file():
        raise ExpertLoadError(f"There is no LoRA file {choice!r} in ComfyUI's folders for loras.")
    return path


def gates_choices() -> list[str]:
    """Gates files of ComfyUI's folders, and those that come with the starter."""
    names: list[str] = folder_paths.get_filename_list(GATES)
    return [*names, *([STARTER_GATES] if _starter_gates().is_file() else [])]


def gates_file(choice: str) -> Path:
    """The file of one of `gates_choices`.

    Raises:
        GateMismatchError: it is not there.
    """
    if choice == STARTER_GATES:
        return _starter_gates()
    found = folder_paths.get_full_path(GATES, choice)
    if not found:
        raise GateMismatchError(f"There is no gates file {choice!r} in models/{GATES} or output/{GATES}.")
    return Path(found)


def new_output(prefix: str, suffix: str = ".safetensors") -> Path:
    """A path in ComfyUI's output folder that does not exist yet.

    Args:
        prefix: folder and beginning of the name, inside the output folder; %year% ... as in Save Image.
        suffix: end of the name.
    Raises:
        ValueError: the prefix leads out of the output folder.
    """
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
    except Exception as error:
        raise ValueError(
            f"{prefix!r} leads out of ComfyUI's output folder; choose a name inside it."
        ) from error
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}").exists():
        counter += 1
    return path


def fingerprint(path: Path) -> str:
    """Changes when a file does."""
    status = path.stat()
    return f"{path}:{status.st_mtime_ns}:{status.st_size}"


def _starter_gates() -> Path:
    return starter_dir() / "experts" / "gates.safetensors"


def _starter_files() -> dict[str, Path]:
    if not (starter_dir() / "experts" / "experts.json").is_file():
        return {}
    return {name: expert.path for name, expert in starter_experts().items()}

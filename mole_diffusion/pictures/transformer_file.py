"""A denoising transformer in one file, with all else in a diffusers folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.single_file import Header, read_header

#: Options of `from_single_file` that a folder has no use for.
ONLY_FOR_FILES = ("config", "original_config", "local_files_only")
# What says of which kind a folder is; the second one is of what diffusers has as modular blocks.
_INDICES = ("model_index.json", "modular_model_index.json")
# Blocks of transformers, as their makers and diffusers call them.
_BLOCK = re.compile(
    r"(?:^|model\.diffusion_model\.|net\.)"
    r"(?:double_blocks|joint_blocks|transformer_blocks|layers|blocks)\.0\..+\.weight$"
)
# What whole checkpoints have beside, and LoRAs.
_MORE = ("first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
_LORA = re.compile(r"lora|lokr|hada")


def holds_transformer(header: Header) -> bool:
    """Whether a file holds a denoising transformer and nothing else."""
    names = list(header.shapes)
    if any(name.startswith(_MORE) or _LORA.search(name) for name in names):
        return False
    return any(_BLOCK.search(name) for name in names)


def index_of(folder: Path) -> Path | None:
    """The file that says of which kind a diffusers folder is."""
    return next((file for name in _INDICES if (file := folder / name).is_file()), None)


def folder_around(path: Path) -> Path | None:
    """The diffusers folder that a file lies in, or in a folder of."""
    return next((one for one in (path.parent, path.parent.parent) if index_of(one) is not None), None)


def transformer_in(path: Path, options: Mapping[str, Any]) -> Any:
    """The transformer that a file holds alone; None where it is another kind of file, or no folder is named.

    Args:
        path: the file.
        options: of `from_single_file`; `config` is the folder with all else, `torch_dtype` counts.

    Raises:
        ConfigError: the folder has no such transformer, or diffusers reads none of its class from one file.
    """
    folder = Path(options.get("config") or "")
    if not options.get("config") or index_of(folder) is None or not holds_transformer(read_header(path)):
        return None
    import diffusers

    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise ConfigError(f"{str(folder)!r} has no transformer/config.json, which {path.name!r} goes by")
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name", "")
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "from_single_file"):
        raise ConfigError(f"diffusers opens no {name} from one file; open the folder {str(folder)!r}")
    dtype = {} if options.get("torch_dtype") is None else {"torch_dtype": options["torch_dtype"]}
    return kind.from_single_file(
        str(path), config=str(folder), subfolder="transformer", local_files_only=True, **dtype
    )

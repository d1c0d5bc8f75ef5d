"""A folder of LoRAs that a user names once: what is in it, told by the files' headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks.families import named_family
from mole_diffusion.core.reading import BadFileError, read_header

#: More files than this are not looked at.
MAX_FILES = 5000
_PREVIEWS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".webp")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in the folder.

    Attributes:
        path: the file.
        name: its path in the folder, without the ending.
        family: the base that its header names; empty if it names none.
        preview: the picture that lies beside it, as web UIs keep them.
    """

    path: Path
    name: str
    family: str = ""
    preview: Path | None = None

    @property
    def label(self) -> str:
        """For lists: name and family."""
        return f"{self.name} · {self.family}" if self.family else self.name


def loras_in(folder: str | Path) -> list[LoraFile]:
    """The LoRAs in a folder and the folders in it, by name.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    paths = sorted(root.rglob("*.safetensors"), key=lambda path: str(path).lower())
    return [_looked_at(path, root) for path in paths[:MAX_FILES]]


def _looked_at(path: Path, root: Path) -> LoraFile:
    try:
        family = named_family(read_header(path).metadata) or ""
    except (BadFileError, OSError):
        family = "cannot be read"
    beside = (path.with_suffix(ending) for ending in _PREVIEWS)
    preview = next((picture for picture in beside if picture.is_file()), None)
    return LoraFile(path, path.relative_to(root).with_suffix("").as_posix(), family, preview)

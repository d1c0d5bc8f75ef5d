"""The user's files: experts in the Lora folder, gates in a folder of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import NO_FILE, WITHOUT_GATES, SettingsError

if TYPE_CHECKING:
    from mole_diffusion import Expert
    from mole_diffusion.core.networks.base import Base

_SUFFIX = ".safetensors"
# Files of one session stay in memory; a mixture rarely has more.
_KEPT = 12


class Library:
    """Finds and reads experts and gates by name.

    Args:
        lora_folder: the host's Lora folder.
        gates_folder: where gates files are; made when the first one is written.
    """

    def __init__(self, lora_folder: str | Path, gates_folder: str | Path) -> None:
        self.lora_folder = Path(lora_folder)
        self.gates_folder = Path(gates_folder)
        self._loaded: dict[tuple[tuple[str, int, int], ...], Expert] = {}

    def experts(self) -> list[str]:
        """Names of all LoRA files, folders included, without suffix."""
        return _names(self.lora_folder)

    def gates(self) -> list[str]:
        """What may mix experts: "auto", "equal shares", and the names of all gates files."""
        return [*WITHOUT_GATES, *self.gates_files()]

    def gates_files(self) -> list[str]:
        """Names of all gates files."""
        return [name for name in _names(self.gates_folder) if name not in NO_FILE]

    def expert_path(self, name: str) -> Path:
        """The file of an expert.

        Raises:
            SettingsError: there is none of this name.
        """
        return _find(self.lora_folder, name, "LoRA")

    def gates_path(self, name: str) -> Path | None:
        """The file of gates; None for "auto" and "equal shares".

        Raises:
            SettingsError: there is none of this name.
        """
        return None if name in NO_FILE else _find(self.gates_folder, name, "gates file")

    def load(self, name: str, base: Base | None = None) -> Expert:
        """Read an expert; unchanged files are read once.

        Args:
            name: of its file.
            base: what it is to be used on, to be named where the file is for another base.

        Raises:
            SettingsError: there is no such file.
            MoLEError: it holds no usable LoRA.
        """
        from mole_diffusion import load_expert
        from mole_diffusion.core.peft_folder import expert_facts

        path = self.expert_path(name)
        key = expert_facts(path)
        if key not in self._loaded:
            while len(self._loaded) >= _KEPT:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[key] = load_expert(path, base=base)
        return self._loaded[key]

    def with_phrases(self, prompt: str, names: Sequence[str]) -> tuple[str, str]:
        """A prompt with the phrases of experts that it does not name, and a sentence on what was done.

        Args:
            prompt: as it is.
            names: of the experts' files.

        Raises:
            SettingsError: there is no such file.
            MoLEError: one holds no usable LoRA.
        """
        from mole_diffusion.core.phrases import unnamed

        phrases = {name: self.load(name).triggers for name in names}
        silent = [name for name, own in phrases.items() if not own]
        missing = list(unnamed(prompt, phrases).values())
        said = [f"The file of {', '.join(silent)} names no phrase."] if silent else []
        if not missing:
            return prompt, " ".join(said or ["The prompt names all experts."])
        begun = prompt.strip().rstrip(",").strip()
        return ", ".join([begun, *missing] if begun else missing), " ".join(said)

    def header(self, name: str) -> Any:
        """What a gates file says about itself; None for "auto", "equal shares" and shared gates.

        Raises:
            SettingsError: there is no such file.
            MoLEError: it is not a gates file.
        """
        from mole_diffusion import read_gates_header
        from mole_diffusion.core.shared_gates import is_shared_gates

        path = self.gates_path(name)
        return None if path is None or is_shared_gates(path) else read_gates_header(path)

    def experts_of(self, gates: str) -> list[str]:
        """Names in the Lora folder of the experts that gates were trained for.

        Raises:
            SettingsError: a file of one of them is not in the Lora folder.
        """
        header = self.header(gates)
        if header is None:
            return []
        hashes = {e["name"]: e["sha256"] for part in header.parts.values() for e in part["experts"]}
        return [self._expert_of(gates, name, digest) for name, digest in hashes.items()]

    def _expert_of(self, gates: str, name: str, digest: str) -> str:
        """The file in the Lora folder that is an expert of gates; several may have its name."""
        from mole_diffusion.core.peft_folder import own_name

        paths = {file: self.lora_folder / f"{file}{_SUFFIX}" for file in self.experts()}
        candidates = [file for file, path in paths.items() if own_name(path) == name]
        for file in candidates:
            if _sha256(paths[file]) == digest:
                return file
        what = "another file of this name is" if candidates else "no file of this name is"
        raise SettingsError(
            f"the gates {gates!r} were trained for the LoRA {name!r} (sha256 {digest[:12]}); {what} in "
            f"{self.lora_folder}. A renamed file can be chosen by hand: it is told by its hash"
        )


def _names(folder: Path) -> list[str]:
    """Names without suffix; files that the PNG info could not name are left out."""
    found: Iterable[Path] = folder.rglob(f"*{_SUFFIX}") if folder.is_dir() else ()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in found if path.is_file())
    return sorted((name for name in names if "|" not in name and not name.startswith(".")), key=str.casefold)


def _find(folder: Path, name: str, kind: str) -> Path:
    if name not in _names(folder):
        raise SettingsError(f"there is no {kind} {name!r} in {folder}")
    return folder / f"{name}{_SUFFIX}"


_hashes: dict[tuple[tuple[str, int, int], ...], str] = {}


def _sha256(path: Path) -> str:
    """The expert's hash, computed once."""
    from mole_diffusion.core.peft_folder import expert_facts, expert_sha256

    key = expert_facts(path)
    if key not in _hashes:
        _hashes[key] = expert_sha256(path)
    return _hashes[key]

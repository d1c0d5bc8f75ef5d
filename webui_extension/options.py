"""What the user sets in Settings > MoLE, and folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROWS, PYTHON, PIP_OPTIONS = "mole_rows", "mole_python", "mole_pip_options"
CHECK_BASE = "mole_check_base"
_SECTION = ("mole", "MoLE")
_DEFAULTS: dict[str, Any] = {ROWS: 4, PYTHON: "", PIP_OPTIONS: "", CHECK_BASE: True}
MAX_ROWS = 12


def add_to(opts: Any, option_info: Any) -> None:
    """Add the page to the host's settings.

    Args:
        opts: the host's options.
        option_info: its class for one option.
    """
    import gradio as gr

    def add(name: str, label: str, component: Any = None, arguments: dict[str, Any] | None = None) -> None:
        opts.add_option(
            name, option_info(_DEFAULTS[name], label, component, arguments or {}, section=_SECTION)
        )

    rows = {"minimum": 2, "maximum": MAX_ROWS, "step": 1}
    add(ROWS, "Experts that can be chosen at once (reload the UI after a change)", gr.Slider, rows)
    add(PYTHON, "Python that trains gates, with mole-diffusion in it (empty: the one made in the MoLE tab)")
    add(CHECK_BASE, "Refuse experts whose file names another prediction type than the checkpoint's")
    add(PIP_OPTIONS, "Options for pip when that Python is made, such as --index-url of another PyTorch build")


class Options:
    """The extension's settings and folders as they are now.

    Args:
        opts: the host's options.
        cmd_opts: its command line.
        models_path, data_path: its folders.
    """

    def __init__(self, opts: Any, cmd_opts: Any, models_path: str, data_path: str) -> None:
        self._opts = opts
        self._cmd_opts = cmd_opts
        self._models, self._data = Path(models_path), Path(data_path)

    def _get(self, name: str) -> Any:
        value = getattr(self._opts, name, None)
        return _DEFAULTS[name] if value is None else value

    @property
    def lora_folder(self) -> Path:
        """Where the host's own LoRAs are."""
        return Path(getattr(self._cmd_opts, "lora_dir", None) or self._models / "Lora")

    @property
    def gates_folder(self) -> Path:
        """Where trained gates are."""
        return self._models / "mole"

    @property
    def work_folder(self) -> Path:
        """Where trainings keep their state, history and previews."""
        return self._data / "outputs" / "mole"

    @property
    def rows(self) -> int:
        """Experts that the panel offers."""
        return min(max(int(self._get(ROWS)), 2), MAX_ROWS)

    @property
    def environment(self) -> Path:
        """The Python environment that the tab makes."""
        return self._data / "mole-environment"

    @property
    def python(self) -> Path:
        """The Python that trains gates; it may not be there."""
        chosen = str(self._get(PYTHON)).strip()
        return Path(chosen).expanduser() if chosen else python_in(self.environment)

    @property
    def pip_options(self) -> list[str]:
        """More options for pip."""
        import shlex

        return shlex.split(str(self._get(PIP_OPTIONS)))


def python_in(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

"""The app's folder, which has to be there before Gradio is imported."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLE = "GRADIO_TEMP_DIR"


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder for what need not stay: uploads, Gradio's and Python's temporary files.

    Gradio reads where to write when it is imported: import it inside the `with` block. Afterwards the folder
    is gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="mole-app-"))
    variable, default = os.environ.get(_VARIABLE), tempfile.tempdir
    os.environ[_VARIABLE], tempfile.tempdir = str(folder / "uploads"), str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = default
        del os.environ[_VARIABLE]
        if variable is not None:
            os.environ[_VARIABLE] = variable
        shutil.rmtree(folder, ignore_errors=True)

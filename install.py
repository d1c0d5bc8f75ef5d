"""Run by web UIs when the whole repository is installed as an extension; see `webui_extension/install.py`."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "webui_extension" / "install.py"), run_name="__main__")

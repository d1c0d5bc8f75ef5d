"""Web UIs look for scripts only here: the extension is in `webui_extension`, whose script this is."""

import importlib.util
from pathlib import Path

_FILE = Path(__file__).resolve().parent.parent / "webui_extension" / "scripts" / "mole.py"
_SPEC = importlib.util.spec_from_file_location("mole_webui_script", _FILE)
_module = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_module)

MoLEScript = _module.MoLEScript

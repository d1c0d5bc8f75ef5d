"""Scripts: loading, and running their methods with exceptions caught."""

import importlib.util
import os
import sys
import traceback
from types import SimpleNamespace

from . import script_callbacks

AlwaysVisible = object()
scripts_data = []


class Script:
    infotext_fields = None
    paste_field_names = None
    section = None

    def elem_id(self, item_id):
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item_id}"


def load_script(path):
    """Load one file of an extension; its folder is on sys.path only meanwhile."""
    before = list(sys.path)
    sys.path.insert(0, os.path.dirname(os.path.dirname(path)))
    try:
        spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, Script):
            scripts_data.append(SimpleNamespace(script_class=value, path=path, module=module))
    return module


class ScriptRunner:
    """The scripts of one tab."""

    def __init__(self, is_img2img=False):
        self.scripts = []
        for data in scripts_data:
            script = data.script_class()
            script.is_img2img = is_img2img
            if script.show(is_img2img) is AlwaysVisible:
                self.scripts.append(script)

    def after_component(self, component, **kwargs):
        """Hosts say so of every component when it is made."""
        for script in self.scripts:
            found = getattr(script, "after_component", None)
            if found is not None:
                found(component, **kwargs)

    def run(self, method, p, *args, **kwargs):
        for script in self.scripts:
            found = getattr(script, method, None)
            if found is None:
                continue
            given = p.script_args.get(script.title().lower(), ())
            try:
                found(p, *args, *given, **kwargs)
            except Exception:
                script_callbacks.failures.append(traceback.format_exc())

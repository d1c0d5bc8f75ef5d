"""Lists of callbacks, exceptions caught and noted as in the hosts. No `name=`: some lack it."""

import traceback

_NAMES = (
    "before_ui",
    "ui_tabs",
    "ui_settings",
    "app_started",
    "model_loaded",
    "cfg_denoiser",
    "script_unloaded",
)
callbacks = {name: [] for name in _NAMES}
#: What the host would only write to its log.
failures = []


def _adder(name):
    def add(callback):
        callbacks[name].append(callback)

    return add


for _name in _NAMES:
    globals()[f"on_{_name}"] = _adder(_name)


def call(name, *args):
    """Run the callbacks of one event."""
    results = []
    for callback in callbacks[name]:
        try:
            results.append(callback(*args))
        except Exception:
            failures.append(traceback.format_exc())
    return results


def clear():
    for entries in callbacks.values():
        entries.clear()
    failures.clear()

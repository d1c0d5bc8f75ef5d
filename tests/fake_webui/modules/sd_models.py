"""Exchanging the checkpoint."""

from . import script_callbacks, shared

#: name -> model
checkpoints = {}
#: What the page lists: name -> SimpleNamespace(title, filename).
checkpoints_list = {}
_seen = set()


def load_model(name):
    """Make a checkpoint the current one; one that is still in memory comes back without a callback."""
    if shared.sd_model is checkpoints[name]:
        return
    shared.sd_model = checkpoints[name]
    if name not in _seen:
        _seen.add(name)
        script_callbacks.call("model_loaded", shared.sd_model)


def clear():
    checkpoints.clear()
    checkpoints_list.clear()
    _seen.clear()
    shared.sd_model = None

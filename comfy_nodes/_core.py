"""Finds `mole_diffusion`: the copy that these nodes came with, else one that pip installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "mole_diffusion"


def provide_core() -> None:
    """Make `import mole_diffusion` work.

    The copy beside the nodes is preferred, because the two were tested together. It is registered by its
    file, so that nothing else of the repository lands on ComfyUI's module path.

    Raises:
        ImportError: there is no copy beside the nodes and none is installed.
    """
    if _NAME in sys.modules:
        return
    # A symlink to this folder leads to the repository.
    package = Path(__file__).resolve().parent.parent / _NAME
    if (package / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(
            _NAME, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[_NAME] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[_NAME]
                raise
            return
    if importlib.util.find_spec(_NAME) is None:
        raise ImportError(
            "The MoLE nodes need the package mole_diffusion, which is neither beside them nor installed: "
            "clone the whole repository into custom_nodes, or run: pip install --no-deps mole-diffusion"
        )

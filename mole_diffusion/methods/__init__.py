"""Ways of combining experts behind one interface with the gates.

`METHODS` names them. Those that need no preparation are words for `pipe(prompt, mixture=...)`; for the
others `prepare` does the work once, and what it returns is given as the mixture.
"""

from mole_diffusion.methods.fixed import (
    MIXTURES,
    fixed_mixture,
    linear_arithmetic,
    normalised_linear_arithmetic,
)
from mole_diffusion.methods.methods import METHODS, Method
from mole_diffusion.methods.preparation import PrepareOptions, load_prepared, prepare
from mole_diffusion.methods.prepared import Prepared

__all__ = [
    "METHODS",
    "MIXTURES",
    "Method",
    "PrepareOptions",
    "Prepared",
    "fixed_mixture",
    "linear_arithmetic",
    "load_prepared",
    "normalised_linear_arithmetic",
    "prepare",
]

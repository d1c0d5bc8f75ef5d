"""Ways of combining experts behind one interface with the gates.

`METHODS` names them. Those that need no preparation are words for `pipe(prompt, mixture=...)`; for the
others `prepare` does the work once, and what it returns is given as the mixture.
"""

from mole_diffusion.core.fixed import (
    FIXED,
    fixed_mixture,
    linear_arithmetic,
    normalised_linear_arithmetic,
)
from mole_diffusion.methods.freefuse import FREEFUSE
from mole_diffusion.methods.job import PrepareOptions
from mole_diffusion.methods.loratorio import LORATORIO
from mole_diffusion.methods.methods import METHODS, Method
from mole_diffusion.methods.preparation import load_prepared, prepare
from mole_diffusion.methods.prepared import Prepared
from mole_diffusion.methods.routing import ROUTED
from mole_diffusion.methods.zero_shot import ZERO_SHOT
from mole_diffusion.pictures.auto import AUTO

#: Words for `pipe(prompt, mixture=...)`; those after the fixed ones change the expert within a picture.
MIXTURES = (AUTO, *FIXED, *ROUTED, *ZERO_SHOT, FREEFUSE, LORATORIO)

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

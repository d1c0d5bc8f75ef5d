"""Mixture of LoRA Experts: several frozen LoRAs in one picture, mixed by small learned gates.

The core (expert files, gates, hooks) needs torch and safetensors only; what lies above it is imported at
first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoint import GatesHeader, load_gates, read_gates_header, save_gates
from .config import MoLEConfig
from .context import GateRecord
from .errors import (
    AllExpertsMaskedError,
    ConfigError,
    ExpertLoadError,
    GateMismatchError,
    InjectionError,
    MoLEError,
    NoExpertsError,
    RegionMaskError,
    TrainingError,
    UnknownExpertError,
)
from .experts import Expert, ExpertReport, LoraFactors, load_expert
from .inject import Mixture, inject

if TYPE_CHECKING:
    from .pipeline import (
        StableDiffusionMoLEImg2ImgPipeline,
        StableDiffusionMoLEInpaintPipeline,
        StableDiffusionMoLEPipeline,
        StableDiffusionXLMoLEImg2ImgPipeline,
        StableDiffusionXLMoLEInpaintPipeline,
        StableDiffusionXLMoLEPipeline,
    )
    from .training import Concept, GateTrainer, TrainingConfig, TrainingResult

__version__ = "0.1.0"

_LAZY = {
    "StableDiffusionMoLEImg2ImgPipeline": "mole_diffusion.pipeline",
    "StableDiffusionMoLEInpaintPipeline": "mole_diffusion.pipeline",
    "StableDiffusionMoLEPipeline": "mole_diffusion.pipeline",
    "StableDiffusionXLMoLEImg2ImgPipeline": "mole_diffusion.pipeline",
    "StableDiffusionXLMoLEInpaintPipeline": "mole_diffusion.pipeline",
    "StableDiffusionXLMoLEPipeline": "mole_diffusion.pipeline",
    "Concept": "mole_diffusion.training",
    "GateTrainer": "mole_diffusion.training",
    "TrainingConfig": "mole_diffusion.training",
    "TrainingResult": "mole_diffusion.training",
}

__all__ = [
    "AllExpertsMaskedError",
    "Concept",
    "ConfigError",
    "Expert",
    "ExpertLoadError",
    "ExpertReport",
    "GateMismatchError",
    "GateRecord",
    "GateTrainer",
    "GatesHeader",
    "InjectionError",
    "LoraFactors",
    "Mixture",
    "MoLEConfig",
    "MoLEError",
    "NoExpertsError",
    "RegionMaskError",
    "StableDiffusionMoLEImg2ImgPipeline",
    "StableDiffusionMoLEInpaintPipeline",
    "StableDiffusionMoLEPipeline",
    "StableDiffusionXLMoLEImg2ImgPipeline",
    "StableDiffusionXLMoLEInpaintPipeline",
    "StableDiffusionXLMoLEPipeline",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "UnknownExpertError",
    "inject",
    "load_expert",
    "load_gates",
    "read_gates_header",
    "save_gates",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Mixture of LoRA Experts: several frozen LoRAs in one picture, mixed by small learned gates.

The core (expert files, gates, hooks) needs torch and safetensors only. Everything is imported at first
use, torch too: who only asks for the version, or presses Ctrl-C at once, does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.checkpoint import GatesHeader, load_gates, read_gates_header, save_gates
    from .core.config import MoLEConfig
    from .core.errors import (
        AllExpertsMaskedError,
        ConfigError,
        ExpertLoadError,
        GateMismatchError,
        InjectionError,
        InUseError,
        MoLEError,
        NoExpertsError,
        RegionMaskError,
        TrainingError,
        UnknownExpertError,
        WriteError,
    )
    from .core.experts import Expert, ExpertReport, LoraFactors, load_expert
    from .core.mixture import Mixture, inject
    from .core.records import GateRecord
    from .pictures.pipelines import (
        AnimaMoLEImg2ImgPipeline,
        AnimaMoLEPipeline,
        ChromaMoLEImg2ImgPipeline,
        ChromaMoLEPipeline,
        Flux2KleinMoLEInpaintPipeline,
        Flux2KleinMoLEPipeline,
        Flux2MoLEPipeline,
        FluxKontextMoLEPipeline,
        FluxMoLEImg2ImgPipeline,
        FluxMoLEInpaintPipeline,
        FluxMoLEPipeline,
        Krea2MoLEPipeline,
        QwenImageMoLEImg2ImgPipeline,
        QwenImageMoLEInpaintPipeline,
        QwenImageMoLEPipeline,
        StableDiffusion3MoLEImg2ImgPipeline,
        StableDiffusion3MoLEInpaintPipeline,
        StableDiffusion3MoLEPipeline,
        StableDiffusionMoLEImg2ImgPipeline,
        StableDiffusionMoLEInpaintPipeline,
        StableDiffusionMoLEPipeline,
        StableDiffusionXLMoLEImg2ImgPipeline,
        StableDiffusionXLMoLEInpaintPipeline,
        StableDiffusionXLMoLEPipeline,
        ZImageMoLEImg2ImgPipeline,
        ZImageMoLEInpaintPipeline,
        ZImageMoLEPipeline,
    )
    from .pictures.training import Concept, GateTrainer, TrainingConfig, TrainingResult

__version__ = "0.1.0"

_LAZY = {
    "GatesHeader": "mole_diffusion.core.checkpoint",
    "load_gates": "mole_diffusion.core.checkpoint",
    "read_gates_header": "mole_diffusion.core.checkpoint",
    "save_gates": "mole_diffusion.core.checkpoint",
    "MoLEConfig": "mole_diffusion.core.config",
    "AllExpertsMaskedError": "mole_diffusion.core.errors",
    "ConfigError": "mole_diffusion.core.errors",
    "ExpertLoadError": "mole_diffusion.core.errors",
    "GateMismatchError": "mole_diffusion.core.errors",
    "InjectionError": "mole_diffusion.core.errors",
    "InUseError": "mole_diffusion.core.errors",
    "MoLEError": "mole_diffusion.core.errors",
    "NoExpertsError": "mole_diffusion.core.errors",
    "RegionMaskError": "mole_diffusion.core.errors",
    "TrainingError": "mole_diffusion.core.errors",
    "UnknownExpertError": "mole_diffusion.core.errors",
    "WriteError": "mole_diffusion.core.errors",
    "Expert": "mole_diffusion.core.experts",
    "ExpertReport": "mole_diffusion.core.experts",
    "LoraFactors": "mole_diffusion.core.experts",
    "load_expert": "mole_diffusion.core.experts",
    "Mixture": "mole_diffusion.core.mixture",
    "inject": "mole_diffusion.core.mixture",
    "GateRecord": "mole_diffusion.core.records",
    "StableDiffusion3MoLEPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusion3MoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusion3MoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "ChromaMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "ChromaMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "FluxKontextMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "FluxMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "FluxMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "FluxMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionXLMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionXLMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "StableDiffusionXLMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "ZImageMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "ZImageMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "ZImageMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "Flux2MoLEPipeline": "mole_diffusion.pictures.pipelines",
    "Flux2KleinMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "Flux2KleinMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "QwenImageMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "QwenImageMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "QwenImageMoLEInpaintPipeline": "mole_diffusion.pictures.pipelines",
    "Krea2MoLEPipeline": "mole_diffusion.pictures.pipelines",
    "AnimaMoLEPipeline": "mole_diffusion.pictures.pipelines",
    "AnimaMoLEImg2ImgPipeline": "mole_diffusion.pictures.pipelines",
    "Concept": "mole_diffusion.pictures.training",
    "GateTrainer": "mole_diffusion.pictures.training",
    "TrainingConfig": "mole_diffusion.pictures.training",
    "TrainingResult": "mole_diffusion.pictures.training",
}

__all__ = [
    "AllExpertsMaskedError",
    "AnimaMoLEImg2ImgPipeline",
    "AnimaMoLEPipeline",
    "ChromaMoLEImg2ImgPipeline",
    "ChromaMoLEPipeline",
    "Concept",
    "ConfigError",
    "Expert",
    "ExpertLoadError",
    "ExpertReport",
    "Flux2KleinMoLEInpaintPipeline",
    "Flux2KleinMoLEPipeline",
    "Flux2MoLEPipeline",
    "FluxKontextMoLEPipeline",
    "FluxMoLEImg2ImgPipeline",
    "FluxMoLEInpaintPipeline",
    "FluxMoLEPipeline",
    "GateMismatchError",
    "GateRecord",
    "GateTrainer",
    "GatesHeader",
    "InUseError",
    "InjectionError",
    "Krea2MoLEPipeline",
    "LoraFactors",
    "Mixture",
    "MoLEConfig",
    "MoLEError",
    "NoExpertsError",
    "QwenImageMoLEImg2ImgPipeline",
    "QwenImageMoLEInpaintPipeline",
    "QwenImageMoLEPipeline",
    "RegionMaskError",
    "StableDiffusion3MoLEImg2ImgPipeline",
    "StableDiffusion3MoLEInpaintPipeline",
    "StableDiffusion3MoLEPipeline",
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
    "WriteError",
    "ZImageMoLEImg2ImgPipeline",
    "ZImageMoLEInpaintPipeline",
    "ZImageMoLEPipeline",
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

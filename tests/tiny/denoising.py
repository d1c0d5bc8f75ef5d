"""Families of denoising transformers: our class, tiny components, what LoRA files change, the name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_diffusion import (
    AnimaMoLEPipeline,
    ChromaMoLEPipeline,
    Flux2KleinMoLEPipeline,
    FluxMoLEPipeline,
    Krea2MoLEPipeline,
    QwenImageMoLEPipeline,
    StableDiffusion3MoLEPipeline,
    ZImageMoLEPipeline,
)

from .flux import FLUX_TARGETS, make_chroma_components, make_flux_components, make_sd3_components
from .qwen import (
    make_anima_components,
    make_flux2_components,
    make_krea2_components,
    make_qwen_image_components,
    make_z_image_components,
)

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        cls: our pipeline.
        make: its components; tokenizers may need a folder.
        targets: names of layers that LoRA files change.
        name: what `mole inspect` calls it.
    """

    cls: Any
    make: Callable[[Path], dict[str, Any]]
    targets: list[str]
    name: str


def _attention(part: str, *more: str) -> list[str]:
    return [*(f"{part}.{one}" for one in _ATTENTION), *more]


FAMILIES = {
    "flux": Family(FluxMoLEPipeline, make_flux_components, FLUX_TARGETS, "FLUX.1"),
    "chroma": Family(ChromaMoLEPipeline, lambda _: make_chroma_components(), FLUX_TARGETS, "FLUX.1"),
    "sd3": Family(
        StableDiffusion3MoLEPipeline, make_sd3_components, ["attn.to_q", "ff.net.2"], "Stable Diffusion 3"
    ),
    "anima": Family(
        AnimaMoLEPipeline,
        lambda _: make_anima_components(),
        [*_attention("attn1"), "attn2.to_q", "attn2.to_k", "attn2.to_v", "ff.net.2"],
        "Anima",
    ),
    "klein": Family(
        Flux2KleinMoLEPipeline,
        lambda _: make_flux2_components(),
        _attention("attn", "attn.to_qkv_mlp_proj", "ff.linear_out"),
        "FLUX.2",
    ),
    "krea-2": Family(
        Krea2MoLEPipeline,
        lambda _: make_krea2_components(),
        _attention("attn", "attn.to_gate", "ff.down"),
        "Krea 2",
    ),
    "qwen-image": Family(
        QwenImageMoLEPipeline,
        lambda _: make_qwen_image_components(),
        _attention("attn", "img_mlp.net.2"),
        "Qwen-Image",
    ),
    "z-image": Family(
        ZImageMoLEPipeline,
        lambda _: make_z_image_components(),
        _attention("attention", "feed_forward.w2"),
        "Z-Image",
    ),
}

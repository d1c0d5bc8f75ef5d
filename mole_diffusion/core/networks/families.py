"""Names of the families of base models, and what headers of files call them."""

from __future__ import annotations

from collections.abc import Mapping

SD1, SD2, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
SDXL_REFINER = "Stable Diffusion XL refiner"
#: The small Stable Diffusion that ships with the project.
STARTER = "the starter"
SD3 = "Stable Diffusion 3"
FLUX1, FLUX2 = "FLUX.1", "FLUX.2"
CHROMA = "Chroma"
QWEN_IMAGE = "Qwen-Image"
Z_IMAGE = "Z-Image"
KREA2 = "Krea 2"
ANIMA = "Anima"
WAN = "Wan"
HUNYUAN_VIDEO = "HunyuanVideo"
LUMINA2 = "Lumina 2"
HIDREAM = "HiDream"

# Beginnings of what trainers write into `modelspec.architecture` and kohya into `ss_base_model_version`; a
# longer one before its own beginning.
_FAMILY_OF_NAME = (
    ("stable-diffusion-xl-v1-refiner", SDXL_REFINER),
    ("stable-diffusion-xl", SDXL),
    ("sdxl", SDXL),
    ("stable-diffusion-v2", SD2),
    ("sd_v2", SD2),
    ("sd2", SD2),
    ("stable-diffusion-v1", SD1),
    ("sd_v1", SD1),
    ("sd1", SD1),
    ("stable-diffusion-3", SD3),
    ("sd3", SD3),
    ("flux-1", FLUX1),
    ("flux1", FLUX1),
    ("flux-2", FLUX2),
    ("flux2", FLUX2),
    ("chroma", CHROMA),
    ("qwen-image", QWEN_IMAGE),
    ("qwen_image", QWEN_IMAGE),
    ("z-image", Z_IMAGE),
    ("zimage", Z_IMAGE),
    ("krea-2", KREA2),
    ("krea2", KREA2),
    ("anima", ANIMA),
    ("wan", WAN),
    ("hunyuan-video", HUNYUAN_VIDEO),
    ("hunyuan_video", HUNYUAN_VIDEO),
    ("lumina-2", LUMINA2),
    ("lumina2", LUMINA2),
    ("hidream", HIDREAM),
)
# Anybody may write anything there, and errors are to be read.
_LONGEST = 80
_KEYS = ("modelspec.architecture", "ss_base_model_version")


def header_name(metadata: Mapping[str, str]) -> str | None:
    """What a file's header calls its base model, word for word but not endless; None if it says nothing."""
    return next((text[:_LONGEST] for key in _KEYS if (text := str(metadata.get(key, "")).strip())), None)


def named_family(metadata: Mapping[str, str]) -> str | None:
    """The family that a file's header names; a name that is not known here as it stands there."""
    name = header_name(metadata)
    if name is None:
        return None
    lowered = name.lower()
    return next((family for beginning, family in _FAMILY_OF_NAME if lowered.startswith(beginning)), name)

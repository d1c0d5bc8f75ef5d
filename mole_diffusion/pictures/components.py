"""What a diffusers pipeline is made of, as experts see it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from mole_diffusion.core.ensemble import PREDICTION_TYPE
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks.clip import TEXT_ENCODER, TEXT_ENCODER_2
from mole_diffusion.core.networks.transformers import TRANSFORMER
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.pictures.denoisers import denoiser_of

# Which tokenizer writes for which text encoder.
TOKENIZERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks that experts can change, by part; perhaps compiled.

    Language models that write for a transformer are not among them: nobody trains LoRAs for those.
    """
    found = {part: getattr(pipe, part, None) for part in (UNET, TRANSFORMER, TEXT_ENCODER, TEXT_ENCODER_2)}
    return {
        part: network
        for part, network in found.items()
        if network is not None and (part in (UNET, TRANSFORMER) or _is_clip(network))
    }


def _is_clip(network: Any) -> bool:
    return str(getattr(getattr(network, "config", None), "model_type", "")).startswith("clip")


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """The tokenizer of each text encoder."""
    found = {part: getattr(pipe, name, None) for part, name in TOKENIZERS.items()}
    return {part: one for part, one in found.items() if one is not None and part in networks_of(pipe)}


def flatten_tokens(pipe: Any) -> dict[str, tuple[int, int] | int]:
    """What `pooling="flatten"` is sized for: tokens of the text encoders, the latent of a transformer.

    A UNet knows its own size.
    """
    found: dict[str, tuple[int, int] | int] = {
        part: one.model_max_length for part, one in tokenizers_of(pipe).items()
    }
    if getattr(pipe, TRANSFORMER, None) is not None:
        found[TRANSFORMER] = denoiser_of(pipe).latent_shape[1:]
    return found


def latent_size(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the latent of a picture of so many pixels."""
    return denoiser_of(pipe, (height, width)).latent_shape[1:]


def facts_of(pipe: Any) -> dict[str, str]:
    """What experts and gates must agree with beyond the networks' shapes."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or getattr(pipe, TRANSFORMER, None) is not None:
        return {}  # transformers are all trained by flow matching, and headers do not say so
    return {PREDICTION_TYPE: str(scheduler.config.get("prediction_type", "epsilon"))}


def picture_size(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of what a call draws.

    Args:
        pipe: the pipeline.
        given: the call's arguments.
    """
    own = denoiser_of(pipe)
    told = given.get("height") and given.get("width")
    from_picture = "height" not in call_arguments(pipe) or (pipe.as_large_as_its_picture and not told)
    # Some latents are packed.
    factor = own.picture_size[0] // own.latent_shape[1]
    rows, columns = own.latent_shape[1:]
    if given.get("latents") is not None and given["latents"].dim() == 4:
        rows, columns = given["latents"].shape[-2:]
    elif from_picture and given.get("image") is not None:
        picture = pipe.image_processor.preprocess(given["image"])
        rows, columns = picture.shape[-2:]
        if picture.shape[1] != own.latent_shape[0]:
            return rows, columns
    elif told:
        return given["height"], given["width"]
    return rows * factor, columns * factor


def guidance_arguments(pipe: Any, guidance: float | None, negative: str = "") -> dict[str, Any]:
    """Arguments of a call for guidance by the prompt and for a negative prompt, by the names they have there.

    Args:
        pipe: the pipeline.
        guidance: scale as the family counts it; None for its own.
        negative: what the picture should not show.
    Raises:
        ConfigError: the pipeline knows no negative prompt.
    """
    known = call_arguments(pipe)
    found: dict[str, Any] = {} if guidance is None else {pipe.guided_by: guidance}
    if "negative_prompt" in known:
        # Where only a negative prompt makes the scale count, an empty one is one.
        counts = pipe.guided_by == "true_cfg_scale"
        return {**found, "negative_prompt": negative or ("" if counts else None)}
    if negative:
        raise ConfigError(f"{type(pipe).__name__} knows no negative prompt; leave {negative!r} out")
    return found


def size_arguments(pipe: Any, height: int, width: int) -> dict[str, int]:
    """Arguments of a call for pictures of this size; none where they are as large as the picture given."""
    known = call_arguments(pipe)
    return {name: value for name, value in (("height", height), ("width", width)) if name in known}


def usual_guidance(pipe: Any) -> float:
    """The scale that a pipeline draws with where a call does not say."""
    given = pipe.call_defaults.get(pipe.guided_by)
    usual = call_arguments(pipe)[pipe.guided_by].default if given is None else given
    return float(usual or 0.0)


def call_arguments(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline of diffusers is called with, by name."""
    return inspect.signature(pipe.diffusers_class.__call__).parameters


@contextmanager
def old_text_model_name(text_encoder: nn.Module | None) -> Iterator[None]:
    """Let diffusers' `clip_skip` find `text_encoder.text_model`, in transformers 5 the model itself."""
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        yield
        return
    # Not setattr: that would make the model its own submodule.
    text_encoder.__dict__["text_model"] = text_encoder
    try:
        yield
    finally:
        del text_encoder.__dict__["text_model"]

"""What differs between the hosts: where the networks are, where prompts are cached, what disturbs gates.

Told by what a host offers, never by its version. Nothing of a host is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .settings import SettingsError

if TYPE_CHECKING:
    from torch import nn

# Lists [key, value, ...] in which a host keeps the encoded prompts of the last generation.
COND_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")
# What hosts call prediction types -> as in diffusers.
_PREDICTIONS = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}


def unet_of(sd_model: Any) -> nn.Module:
    """The UNet of a host's model.

    Raises:
        SettingsError: this kind of model has none (Flux and other transformers).
    """
    forge = getattr(sd_model, "forge_objects", None)
    if forge is not None:
        # `forge_objects.unet` is a new patcher for every picture; the module inside stays.
        network = _follow(forge, "unet.model.diffusion_model")
    else:
        network = _follow(sd_model, "model.diffusion_model")
    if network is None or not any("input_blocks" in name for name, _ in network.named_children()):
        raise SettingsError(
            "the loaded checkpoint has no Stable Diffusion UNet; experts work with SD 1, 2 and XL"
        )
    module: nn.Module = network
    return module


def text_encoders_of(sd_model: Any) -> dict[str, nn.Module]:
    """Text encoders that experts can be attached to: "text_encoder", and "text_encoder_2" of SDXL.

    An encoder without a module per matrix is left out: OpenCLIP computes q, k and v in one (SD 2 and the
    second encoder of SDXL on AUTOMATIC1111).
    """
    forge = getattr(sd_model, "forge_objects", None)
    if forge is not None:
        clip = _follow(forge, "clip.cond_stage_model")
        holders = [getattr(clip, name, None) for name in ("clip_l", "clip_g")]
        if not any(holders):
            holders = [getattr(clip, name, None) for name in ("clip_h",)]
    else:
        root = getattr(sd_model, "cond_stage_model", None) or getattr(sd_model, "conditioner", None)
        # SDXL has a list of encoders; the last ones encode sizes and have no text.
        holders = list(getattr(root, "embedders", None) or [root])[:2]
    parts = zip(("text_encoder", "text_encoder_2"), holders, strict=False)
    return {part: network for part, holder in parts if (network := _clip_inside(holder)) is not None}


def text_processors_of(sd_model: Any) -> dict[str, Any]:
    """The host's objects that make tokens of texts, by the part whose text encoder reads these; {} for none.

    They have `tokenize(texts)`, and `process_texts(texts)` for the chunks of tokens that are encoded.
    """
    found = [getattr(sd_model, f"text_processing_engine{suffix}", None) for suffix in ("_l", "_g")]
    if found == [None, None]:
        found = [getattr(sd_model, "text_processing_engine", None)]
    if found == [None]:
        root = getattr(sd_model, "cond_stage_model", None) or getattr(sd_model, "conditioner", None)
        found = list(getattr(root, "embedders", None) or [root])[:2]
    parts = zip(("text_encoder", "text_encoder_2"), found, strict=False)
    needed = ("tokenize", "process_texts")
    return {part: one for part, one in parts if all(callable(getattr(one, name, None)) for name in needed)}


def facts_of(sd_model: Any) -> dict[str, str]:
    """What experts and gates must agree with: the prediction type, where the host says it."""
    found = _predicted(sd_model)
    return {} if found is None else {"prediction_type": found}


def _predicted(sd_model: Any) -> str | None:
    forge = getattr(sd_model, "forge_objects", None)
    model = sd_model if forge is None else _follow(forge, "unet.model")
    # AUTOMATIC1111; Forge; Forge before its own backend, and forge-classic.
    for path in ("parameterization", "predictor.prediction_type", "model_type.name"):
        named = _PREDICTIONS.get(str(_follow(model, path)).lower())
        if named is not None:
            return named
    return None


def bare_weights(sd_model: Any) -> Callable[[nn.Module], Any]:
    """The weight of a module without the host's LoRAs, which stay in the weights until the next picture.

    AUTOMATIC1111 keeps what it patched at the module, Forge at the model around it.
    """
    from torch import Tensor, nn

    owners: dict[nn.Module, tuple[Any, str]] = {}
    forge = getattr(sd_model, "forge_objects", None)
    for patcher in (_follow(forge, "unet"), _follow(forge, "clip.patcher")):
        model = getattr(patcher, "model", None)
        if isinstance(model, nn.Module):
            owners |= {module: (patcher, f"{name}.weight") for name, module in model.named_modules()}

    def bare(module: nn.Module) -> Any:
        found = getattr(module, "network_weights_backup", None)
        if module in owners:
            patcher, key = owners[module]
            loader = getattr(patcher.model, "lora_loader", None)
            kept = {**getattr(patcher, "backup", {}), **getattr(loader, "backup", {})}
            found = kept.get(key, found)
        return found if isinstance(found, Tensor) else getattr(module, "weight", None)

    return bare


def _clip_inside(holder: Any) -> nn.Module | None:
    """The module with `encoder.layers` inside any number of wrappers; None for other kinds of encoders."""
    for _ in range(6):
        if holder is None:
            return None
        if _follow(holder, "encoder.layers") is not None:
            found: nn.Module = holder
            return found
        inner = (getattr(holder, name, None) for name in ("wrapped", "transformer", "text_model"))
        holder = next((module for module in inner if module is not None), None)
    return None


def _follow(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name, None)
        if thing is None:
            return None
    return thing


def forget_prompts(p: Any) -> None:
    """Let the host encode the prompts anew: experts change the text encoder, and the caches do not know it.

    Emptied in place: the lists are shared by all generations, by whatever class they are kept.
    """
    for cache in _caches(p):
        if isinstance(cache, list) and cache:
            cache[0] = None


def _caches(p: Any) -> Iterator[Any]:
    for name in COND_CACHES:
        for holder in (p, *type(p).__mro__):
            if name in vars(holder):
                yield vars(holder)[name]


def disturbances(p: Any, options: Any) -> list[str]:
    """Settings of the host that mix or cut image tokens, so that gates and regions per token cannot work."""
    found = []
    ratio = getattr(p, "get_token_merging_ratio", None)
    if ratio is not None and max(ratio(), ratio(for_hr=True)) > 0:
        found.append("Token merging")
    if getattr(options, "hypertile_enable_unet", False):
        found.append("Hypertile")
    return found


def misread(options: Any) -> list[str]:
    """Settings with which the host encodes other tokens than it says that a text has."""
    return ["Old emphasis"] if getattr(options, "use_old_emphasis_implementation", False) else []


def lora_named_twice(prompts: Iterable[str], experts: Iterable[str]) -> list[str]:
    """Experts that the prompt adds once more with <lora:NAME:...>."""
    texts = " ".join(prompts)
    return [name for name in experts if f"<lora:{name.rpartition('/')[2]}:" in texts]

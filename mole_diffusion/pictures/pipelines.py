"""Diffusers' pipelines with a mixture of LoRA experts.

Each stands in for the pipeline of diffusers whose name it has without `MoLE`: from text, from a picture
(`...Img2ImgPipeline`), from a picture and a mask (`...InpaintPipeline`).

| base | from text |
|---|---|
| SD 1.x and 2.x | `StableDiffusionMoLEPipeline` |
| SDXL | `StableDiffusionXLMoLEPipeline` |
| FLUX.1 | `FluxMoLEPipeline`, and `FluxKontextMoLEPipeline` from pictures |
| FLUX.2 | `Flux2MoLEPipeline` (dev), `Flux2KleinMoLEPipeline`; both may be shown pictures |
| Chroma | `ChromaMoLEPipeline` |
| SD 3 and 3.5 | `StableDiffusion3MoLEPipeline` |
| Z-Image | `ZImageMoLEPipeline` |
| Qwen-Image | `QwenImageMoLEPipeline` |
| Krea 2 | `Krea2MoLEPipeline` |
| Anima | `AnimaMoLEPipeline`, `AnimaMoLEImg2ImgPipeline`, of diffusers' modular blocks |
"""

from functools import wraps
from typing import Any

from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)

from mole_diffusion.pictures.anima import AnimaImg2ImgPipeline, AnimaPipeline
from mole_diffusion.pictures.call import WithExperts
from mole_diffusion.pictures.from_starter import FluxStarterMixin, StarterMixin

_WITHOUT_MASK = 4
"""Channels that a network without a mask among its inputs has, for diffusers."""


class StableDiffusionMoLEPipeline(StarterMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose UNet and text encoder mix LoRA experts by gates.

    Everything of the diffusers pipeline works as before: schedulers, callbacks, offloading, textual
    inversion, `load_lora_weights` for a LoRA outside the mixture, `from_pretrained`, `from_single_file`,
    `from_pipe`. `save_pretrained` writes the base model only, readable by plain diffusers; experts are files
    of their own, and gates are saved with `save_gates`.

    Example:
        >>> pipe = StableDiffusionMoLEPipeline.from_pretrained("stabilityai/stable-diffusion-2-1")
        >>> pipe.load_expert("dog.safetensors")
        >>> pipe.load_expert("cat.safetensors")
        >>> pipe.load_gates("dog+cat.safetensors")
        >>> image = pipe("a dog and a cat on the beach").images[0]
    """

    diffusers_class = StableDiffusionPipeline
    draws_from_text = True


class StableDiffusionMoLEImg2ImgPipeline(StarterMixin, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = StableDiffusionImg2ImgPipeline


class _AnyLatents(StableDiffusionInpaintPipeline):
    """Diffusers' inpainting for networks whose latents have any number of channels.

    Diffusers takes four input channels as the sign of a network without a mask among its inputs, and refuses
    every number but four and nine.
    """

    @wraps(StableDiffusionInpaintPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        channels = self.unet.config.in_channels
        if channels != self.vae.config.latent_channels or channels == _WITHOUT_MASK:
            return super().__call__(*args, **kwargs)
        self.unet.register_to_config(in_channels=_WITHOUT_MASK)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.unet.register_to_config(in_channels=channels)


class StableDiffusionMoLEInpaintPipeline(StarterMixin, _AnyLatents):  # type: ignore[misc]
    """`StableDiffusionInpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = StableDiffusionInpaintPipeline


class StableDiffusionXLMoLEPipeline(WithExperts, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose UNet and both text encoders mix LoRA experts by gates."""

    diffusers_class = StableDiffusionXLPipeline
    draws_from_text = True


class StableDiffusionXLMoLEImg2ImgPipeline(WithExperts, StableDiffusionXLImg2ImgPipeline):
    """`StableDiffusionXLImg2ImgPipeline` (also the refiner) with experts."""

    diffusers_class = StableDiffusionXLImg2ImgPipeline


class StableDiffusionXLMoLEInpaintPipeline(WithExperts, StableDiffusionXLInpaintPipeline):
    """`StableDiffusionXLInpaintPipeline` with experts."""

    diffusers_class = StableDiffusionXLInpaintPipeline


class FluxMoLEPipeline(FluxStarterMixin, FluxPipeline):
    """`FluxPipeline` whose transformer and CLIP text encoder mix LoRA experts by gates.

    `guidance_scale` is what the model was distilled with (3.5 for FLUX.1 dev); a negative prompt counts with
    `true_cfg_scale` above 1, in a second pass per step.
    """

    diffusers_class = FluxPipeline
    draws_from_text = True
    guided_in = "turns"


class FluxMoLEImg2ImgPipeline(FluxStarterMixin, FluxImg2ImgPipeline):
    """`FluxImg2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = FluxImg2ImgPipeline
    guided_in = "turns"


class FluxMoLEInpaintPipeline(FluxStarterMixin, FluxInpaintPipeline):
    """`FluxInpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = FluxInpaintPipeline
    guided_in = "turns"


class FluxKontextMoLEPipeline(WithExperts, FluxKontextPipeline):
    """`FluxKontextPipeline` with experts; tokens of the pictures it is given have gates and no regions."""

    diffusers_class = FluxKontextPipeline
    guided_in = "turns"


class Flux2MoLEPipeline(WithExperts, Flux2Pipeline):
    """`Flux2Pipeline` (dev) whose transformer mixes LoRA experts by gates.

    `guidance_scale` is what the model was distilled with (4.0); there is no negative prompt. Tokens of
    pictures that it is shown (`image`) have gates and no regions.
    """

    diffusers_class = Flux2Pipeline
    draws_from_text = True


class Flux2KleinMoLEPipeline(WithExperts, Flux2KleinPipeline):
    """`Flux2KleinPipeline` whose transformer mixes LoRA experts by gates.

    `guidance_scale` moves away from the empty prompt above 1, in a second pass per step; distilled models
    ignore it. Tokens of pictures that it is shown (`image`) have gates and no regions.
    """

    diffusers_class = Flux2KleinPipeline
    draws_from_text = True
    guided_in = "turns"


class Flux2KleinMoLEInpaintPipeline(WithExperts, Flux2KleinInpaintPipeline):
    """`Flux2KleinInpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = Flux2KleinInpaintPipeline
    guided_in = "turns"


class ChromaMoLEPipeline(WithExperts, ChromaPipeline):
    """`ChromaPipeline` whose transformer mixes LoRA experts by gates; LoRAs of FLUX.1 fit it too."""

    diffusers_class = ChromaPipeline
    draws_from_text = True
    guided_in = "turns"


class ChromaMoLEImg2ImgPipeline(WithExperts, ChromaImg2ImgPipeline):
    """`ChromaImg2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = ChromaImg2ImgPipeline
    guided_in = "turns"


class StableDiffusion3MoLEPipeline(WithExperts, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` whose transformer and CLIP text encoders mix LoRA experts by gates."""

    diffusers_class = StableDiffusion3Pipeline
    draws_from_text = True


class StableDiffusion3MoLEImg2ImgPipeline(WithExperts, StableDiffusion3Img2ImgPipeline):
    """`StableDiffusion3Img2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = StableDiffusion3Img2ImgPipeline


class StableDiffusion3MoLEInpaintPipeline(WithExperts, StableDiffusion3InpaintPipeline):
    """`StableDiffusion3InpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = StableDiffusion3InpaintPipeline


class ZImageMoLEPipeline(WithExperts, ZImagePipeline):
    """`ZImagePipeline` whose transformer mixes LoRA experts by gates.

    `guidance_scale` counts from 0: it is what other pipelines call their scale, minus 1 (0 for Turbo).
    """

    diffusers_class = ZImagePipeline
    draws_from_text = True
    guided_in = "batch, prompt first"


class ZImageMoLEImg2ImgPipeline(WithExperts, ZImageImg2ImgPipeline):
    """`ZImageImg2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = ZImageImg2ImgPipeline
    guided_in = "batch, prompt first"
    as_large_as_its_picture = True


class ZImageMoLEInpaintPipeline(WithExperts, ZImageInpaintPipeline):
    """`ZImageInpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = ZImageInpaintPipeline
    guided_in = "batch, prompt first"
    as_large_as_its_picture = True


class QwenImageMoLEPipeline(WithExperts, QwenImagePipeline):
    """`QwenImagePipeline` whose transformer mixes LoRA experts by gates.

    `true_cfg_scale` (4.0) counts with a negative prompt, which may be a blank, in a second pass per step.
    """

    diffusers_class = QwenImagePipeline
    draws_from_text = True
    guided_in, guided_by = "turns", "true_cfg_scale"


class QwenImageMoLEImg2ImgPipeline(WithExperts, QwenImageImg2ImgPipeline):
    """`QwenImageImg2ImgPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = QwenImageImg2ImgPipeline
    guided_in, guided_by = "turns", "true_cfg_scale"


class QwenImageMoLEInpaintPipeline(WithExperts, QwenImageInpaintPipeline):
    """`QwenImageInpaintPipeline` with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = QwenImageInpaintPipeline
    guided_in, guided_by = "turns", "true_cfg_scale"


class Krea2MoLEPipeline(WithExperts, Krea2Pipeline):
    """`Krea2Pipeline` whose transformer mixes LoRA experts by gates.

    `guidance_scale` counts from 0 (4.5, and 0 for Turbo): it is what other pipelines call their scale,
    minus 1. A negative prompt costs a second pass per step.
    """

    diffusers_class = Krea2Pipeline
    draws_from_text = True
    guided_in = "turns"


class AnimaMoLEPipeline(WithExperts, AnimaPipeline):
    """`AnimaModularPipeline`, from text, whose transformer mixes LoRA experts by gates.

    `guidance_scale` (4.0) moves away from the negative prompt above 1, in a second pass per step.
    """

    diffusers_class = AnimaPipeline
    draws_from_text = True
    guided_in = "turns"


class AnimaMoLEImg2ImgPipeline(WithExperts, AnimaImg2ImgPipeline):
    """`AnimaModularPipeline`, from a picture, with experts; `from_pipe` shares those of another pipeline."""

    diffusers_class = AnimaImg2ImgPipeline
    guided_in = "turns"


#: What draws with a UNet.
AROUND_A_UNET = (StableDiffusionPipeline, StableDiffusionXLPipeline)


def from_text() -> dict[str, type]:
    """Class of diffusers -> ours, of the pipelines that draw from text alone."""
    ours = [one for one in globals().values() if isinstance(one, type) and issubclass(one, WithExperts)]
    return {one.diffusers_class.__name__: one for one in ours if one.draws_from_text}

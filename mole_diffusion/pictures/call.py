"""What makes a Stable Diffusion pipeline of diffusers one with experts, whatever it draws from."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from mole_diffusion.core.networks.clip import TEXT_ENCODER, TEXT_ENCODER_2
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.records import CallRecorder
from mole_diffusion.methods.prepared import Prepared
from mole_diffusion.pictures.calibration import ExportMixin
from mole_diffusion.pictures.denoisers import own_size
from mole_diffusion.pictures.gates import GatesMixin
from mole_diffusion.pictures.regions import region_tensors

P = TypeVar("P", bound="MoLEPipelineMixin")

# Which tokenizer writes for which text encoder.
TOKENIZERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}


class MoLEPipelineMixin(ExportMixin):
    """Experts for a diffusers pipeline; stands before the diffusers class among the bases.

    Attributes:
        diffusers_class: the diffusers pipeline underneath; what `save_pretrained` writes is one of these.
    """

    diffusers_class: ClassVar[type]

    @classmethod
    def from_pipe(cls: type[P], pipeline: Any, **kwargs: Any) -> P:
        """As in diffusers; experts and gates of a pipeline that shares its networks are shared too."""
        parent: Any = super()
        new: P = parent.from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, GatesMixin) and new._networks() == pipeline._networks():
            new._expert_state = pipeline._state
        return new

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        region_masks: Mapping[str, Any] | None = None,
        mixture: str | Mapping[str, float] | Prepared = "gates",
        **kwargs: Any,
    ) -> Any:
        """Draw pictures. Without experts this is the call of the diffusers pipeline.

        Args:
            args, kwargs: everything of that call: prompt, height, width, image, mask_image, strength,
                num_inference_steps, guidance_scale, generator, callback_on_step_end, ...
            active_experts: the experts that count, the rest is renormalised; None is all. (Expert mask.)
            expert_scales: factor per expert for this call, in place of the one given to `load_expert`.
            region_masks: where in the picture an expert counts: PIL picture, numpy array or tensor of the
                drawn picture's size (height, width), 0 to 1, or 0 to 255 as uint8. The same for the whole
                batch. (With `padding_mask_crop` the drawn picture is the crop, before it is put back.)
            mixture: "gates"; "la" (every expert with weight 1); "nla" (1/N); "none" (the base model,
                bitwise); "switch" (one expert per step, in turn); "composite" (mean of the experts'
                predictions, one pass each); a weight per expert, which also names the active ones; or what
                `mole_diffusion.methods.prepare` made.

        Returns:
            The diffusers pipeline's output, or a tuple with `return_dict=False`.

        Raises:
            NoExpertsError: an expert option was given and no expert is loaded.
            UnknownExpertError: a name that is not loaded.
            AllExpertsMaskedError: `active_experts` is empty (for the base model use `mixture="none"`).
            RegionMaskError: a region mask of the wrong size or range.
            GateMismatchError: a prepared mixture was made for another base or other experts.
            ConfigError: a mixture or scale that makes no sense.
        """
        parent: Any = super()
        pipe: Any = self
        signature = inspect.signature(parent.__call__)
        given = signature.bind_partial(*args, **kwargs).arguments
        height, width = self._picture_size(given, from_picture="height" not in signature.parameters)
        factor = pipe.vae_scale_factor
        with self.composing(
            active_experts=active_experts,
            expert_scales=expert_scales,
            region_masks=None if region_masks is None else region_tensors(region_masks, height, width),
            latent_size=(height // factor, width // factor),
            mixture=mixture,
        ):
            self._recorder = CallRecorder()
            with self._recorder.recording(
                self._state.mixtures,
                self._networks(),
                guided=lambda: pipe.do_classifier_free_guidance,
                text_branches=_text_branches(given),
            ):
                return parent.__call__(*args, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; the text encoders' experts count."""
        parent: Any = super()
        with _old_text_model_name(self._networks().get(TEXT_ENCODER)):
            return parent.encode_prompt(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: the base model, without the trigger words that experts bring along."""
        parent: Any = super()
        with self.composing(mixture="none"):
            parent.save_pretrained(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as diffusers writes it, under the name of the diffusers class.

        What `save_pretrained` writes is a plain Stable Diffusion, and has to open without this package.
        """
        parent: Any = super()
        config = json.loads(parent.to_json_string())
        config["_class_name"] = self.diffusers_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _networks(self) -> dict[str, nn.Module]:
        found = {part: getattr(self, part, None) for part in (UNET, TEXT_ENCODER, TEXT_ENCODER_2)}
        return {part: network for part, network in found.items() if network is not None}

    def _tokenizers(self) -> dict[str, Any]:
        found = {part: getattr(self, name, None) for part, name in TOKENIZERS.items()}
        return {part: one for part, one in found.items() if one is not None and part in self._networks()}

    def _flatten_tokens(self) -> dict[str, int | None]:
        lengths: dict[str, int | None] = dict.fromkeys((UNET, *TOKENIZERS))
        return lengths | {part: one.model_max_length for part, one in self._tokenizers().items()}

    def _base_facts(self) -> dict[str, str]:
        pipe: Any = self
        return {"prediction_type": str(pipe.scheduler.config.get("prediction_type", "epsilon"))}

    def _picture_size(self, given: Mapping[str, Any], from_picture: bool) -> tuple[int, int]:
        """Height and width in pixels of what a call draws.

        Args:
            given: the call's arguments.
            from_picture: the call takes its size from its `image`.
        """
        pipe: Any = self
        factor = pipe.vae_scale_factor
        rows, columns = (side // factor for side in own_size(pipe))
        if given.get("latents") is not None:
            rows, columns = given["latents"].shape[-2:]
        elif from_picture and given.get("image") is not None:
            picture = pipe.image_processor.preprocess(given["image"])
            rows, columns = picture.shape[-2:]
            if picture.shape[1] != pipe.vae.config.latent_channels:
                return rows, columns
        elif given.get("height") and given.get("width"):
            return given["height"], given["width"]
        return rows * factor, columns * factor


def _text_branches(given: Mapping[str, Any]) -> list[str]:
    """What each run of a text encoder is for: it does not run for embeddings that the caller brings."""
    branches = {"prompt": "prompt_embeds", "negative": "negative_prompt_embeds"}
    return [branch for branch, argument in branches.items() if given.get(argument) is None]


@contextmanager
def _old_text_model_name(text_encoder: nn.Module | None) -> Iterator[None]:
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

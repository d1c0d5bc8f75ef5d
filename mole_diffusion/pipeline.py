"""Stable Diffusion with a mixture of LoRA experts, as a diffusers pipeline."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from mole_diffusion._pipeline_export import ExportMixin
from mole_diffusion._pipeline_gates import GatesMixin
from mole_diffusion._pipeline_records import CallRecorder
from mole_diffusion._pipeline_regions import region_tensors
from mole_diffusion.errors import UnknownExpertError
from mole_diffusion.starter import default_experts, starter_dir, starter_experts

_PARENT_CALL = inspect.signature(StableDiffusionPipeline.__call__)


class StableDiffusionMoLEPipeline(ExportMixin, StableDiffusionPipeline):
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

    @classmethod
    def from_starter(
        cls,
        experts: Sequence[str] | Literal["all"] | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "StableDiffusionMoLEPipeline":
        """The small model that ships with the project, without network access.

        Args:
            experts: names from `mole_diffusion.starter.starter_experts()`; "all"; `[]` for none; None for
                three concepts, with the gates that were trained for them if the starter has those.
            torch_dtype: type of the weights.
            kwargs: for `from_pretrained`.

        Raises:
            FileNotFoundError: the starter is missing from this installation.
            UnknownExpertError: the starter has no expert of this name.
        """
        folder = starter_dir()
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"the starter is missing: no model_index.json in {folder}")
        known = starter_experts(folder)
        names = (
            default_experts(folder) if experts is None else list(known) if experts == "all" else list(experts)
        )
        for name in names:
            if name not in known:
                raise UnknownExpertError(name, list(known))
        options = {"safety_checker": None, "requires_safety_checker": False, **kwargs}
        pipe: StableDiffusionMoLEPipeline = cls.from_pretrained(folder, torch_dtype=torch_dtype, **options)
        for name in names:
            pipe.load_expert(known[name].path, name=name)
        gates = folder / "experts" / "gates.safetensors"
        if experts is None and gates.is_file():
            pipe.load_gates(gates)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> "StableDiffusionMoLEPipeline":
        """As in diffusers; experts and gates of a pipeline that shares its networks are shared too."""
        new: StableDiffusionMoLEPipeline = super().from_pipe(pipeline, **kwargs)
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
        mixture: str | Mapping[str, float] = "gates",
        **kwargs: Any,
    ) -> Any:
        """Draw pictures. Without experts this is `StableDiffusionPipeline.__call__`.

        Args:
            args, kwargs: everything of `StableDiffusionPipeline.__call__`: prompt, height, width,
                num_inference_steps, guidance_scale, generator, callback_on_step_end, ...
            active_experts: the experts that count, the rest is renormalised; None is all. (Expert mask.)
            expert_scales: factor per expert for this call, in place of the one given to `load_expert`.
            region_masks: where in the picture an expert counts: PIL picture, numpy array or tensor of the
                picture's size (height, width), 0 to 1, or 0 to 255 as uint8. The same for the whole batch.
            mixture: "gates"; "la" (every expert with weight 1); "nla" (1/N); "none" (the base model,
                bitwise); or a weight per expert, which also names the active ones.

        Returns:
            `StableDiffusionPipelineOutput`, or a tuple with `return_dict=False`, as in diffusers.

        Raises:
            NoExpertsError: an expert option was given and no expert is loaded.
            UnknownExpertError: a name that is not loaded.
            AllExpertsMaskedError: `active_experts` is empty (for the base model use `mixture="none"`).
            RegionMaskError: a region mask of the wrong size or range.
            ConfigError: a mixture or scale that makes no sense.
        """
        given = _PARENT_CALL.bind_partial(self, *args, **kwargs).arguments
        height, width = self._picture_size(given)
        factor = self.vae_scale_factor
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
                guided=lambda: self.do_classifier_free_guidance,
                text_branches=_text_branches(given),
            ):
                return super().__call__(*args, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; the text encoder's experts count."""
        with _old_text_model_name(self.text_encoder):
            return super().encode_prompt(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as diffusers writes it, under the name of the diffusers class.

        What `save_pretrained` writes is a plain Stable Diffusion, and has to open without this package.
        """
        config = json.loads(super().to_json_string())
        config["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _networks(self) -> dict[str, nn.Module]:
        found = {"unet": self.unet, "text_encoder": self.text_encoder}
        return {part: network for part, network in found.items() if network is not None}

    def _flatten_tokens(self) -> dict[str, int | None]:
        return {"unet": None, "text_encoder": self.tokenizer.model_max_length if self.tokenizer else None}

    def _base_facts(self) -> dict[str, str]:
        return {"prediction_type": str(self.scheduler.config.get("prediction_type", "epsilon"))}

    def _picture_size(self, given: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width in pixels of what a call with these arguments draws."""
        if given.get("latents") is not None:
            rows, columns = given["latents"].shape[-2:]
            return rows * self.vae_scale_factor, columns * self.vae_scale_factor
        height, width = given.get("height"), given.get("width")
        if height and width:
            return height, width
        sample = self.unet.config.sample_size
        rows, columns = (sample, sample) if isinstance(sample, int) else sample
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor


def _text_branches(given: Mapping[str, Any]) -> list[str]:
    """What each run of the text encoder is for: it does not run for embeddings that the caller brings."""
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

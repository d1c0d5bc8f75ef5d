"""Anima as a pipeline of diffusers, which has it as modular blocks alone.

What the blocks do is done here with the same parts of diffusers; folders are those that the blocks read and
write (`modular_model_index.json`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    DiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import AnimaLoraLoaderMixin
from diffusers.modular_pipelines.anima.before_denoise import (
    AnimaPrepareLatentsStep,
    get_timesteps,
    repeat_tensor_to_batch_size,
)
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep, encode_vae_image
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

#: Pixels along a side that are one token.
_TOKEN = 16


class AnimaPipeline(DiffusionPipeline, AnimaLoraLoaderMixin):
    """What `AnimaModularPipeline` draws from text, as a pipeline like diffusers' others.

    Args:
        text_encoder, tokenizer: Qwen3, which reads the prompt.
        t5_tokenizer: whose tokens the adapter asks the language model's states for.
        text_conditioner: the adapter between the language model and the transformer.
        transformer: a `CosmosTransformer3DModel`.
        vae: an autoencoder for videos; a picture is one frame.
        scheduler: of flow matching, with a fixed shift.

    `from_pipe` asks the signature for the classes of networks.
    """

    model_cpu_offload_seq = "text_encoder->text_conditioner->transformer->vae"
    _callback_tensor_inputs = ("latents",)
    default_sample_size = 128

    def __init__(
        self,
        text_encoder: Any,
        tokenizer: Any,
        t5_tokenizer: Any,
        text_conditioner: AnimaTextConditioner,
        transformer: CosmosTransformer3DModel,
        vae: AutoencoderKLQwenImage,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            t5_tokenizer=t5_tokenizer,
            text_conditioner=text_conditioner,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** len(vae.temperal_downsample) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Open a folder or hub id with a `modular_model_index.json`.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            kwargs: components in place of those there; `torch_dtype`; the hub's (revision, cache_dir, ...).

        Raises:
            OSError: a component is missing there, or cannot be opened.
        """
        names = list(inspect.signature(AnimaPipeline.__init__).parameters)[1:]
        components = {name: kwargs.pop(name) for name in names if name in kwargs}
        dtype = kwargs.pop("torch_dtype", None)
        source = AnimaModularPipeline.from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        wanted = [name for name in names if name not in components]
        source.load_components(wanted, **({} if dtype is None else {"torch_dtype": dtype}))
        components |= {name: getattr(source, name, None) for name in wanted}
        if missing := [name for name, one in components.items() if one is None]:
            raise OSError(f"{str(pretrained_model_name_or_path)!r} has no {', '.join(missing)} that opens")
        return cls(**components)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that diffusers' modular pipeline reads, and `from_pretrained`.

        Args:
            save_directory: the folder.
            kwargs: for `AnimaModularPipeline.save_pretrained`.
        """
        modular = AnimaAutoBlocks().init_pipeline()
        modular.update_components(**self.components)
        modular.save_pretrained(str(save_directory), **{"overwrite_modular_index": True, **kwargs})

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = False,
        device: torch.device | None = None,
        max_sequence_length: int = 512,
    ) -> tuple[Tensor, Tensor | None]:
        """What the transformer reads of texts: (B, tokens, d) of the prompts and of the negative prompts.

        Args:
            prompt, negative_prompt: texts; None as negative is the empty one.
            do_classifier_free_guidance: whether the second is wanted.
            device: where to; None is where the pipeline runs.
            max_sequence_length: tokens at most.
        """
        device = device or self._execution_device
        found = AnimaTextEncoderStep.encode_prompt(
            self, prompt, negative_prompt, do_classifier_free_guidance, max_sequence_length, device
        )
        own = self._conditioned(found, "", device)
        return own, self._conditioned(found, "negative_", device) if do_classifier_free_guidance else None

    def _conditioned(self, found: dict[str, Tensor], which: str, device: torch.device) -> Tensor:
        """The adapter's answer to what language model and tokenizer say."""
        adapter = self.text_conditioner
        answer: Tensor = adapter(
            source_hidden_states=found[f"{which}qwen_prompt_embeds"].to(device, adapter.dtype),
            target_input_ids=found[f"{which}t5_input_ids"].to(device),
            target_attention_mask=found[f"{which}t5_attention_mask"].to(device),
            source_attention_mask=found[f"{which}qwen_attention_mask"].to(device),
        )
        return answer.to(device, self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> Any:
        """Draw pictures.

        Args:
            prompt, negative_prompt: texts, one or one per picture.
            height, width: pixels, multiples of 16; None is 1024.
            num_inference_steps: steps.
            guidance_scale: of classifier-free guidance, in a second pass per step; none at 1 and below.
            num_images_per_prompt: pictures of each prompt.
            generator: of the noise.
            latents: noise (B, channels, 1, height / 8, width / 8) in place of the generator's.
            output_type: "pil", "np", "pt", or "latent".
            return_dict: whether the pictures come in an `ImagePipelineOutput`, else in a tuple.
            callback_on_step_end: as in diffusers.
            callback_on_step_end_tensor_inputs: "latents" is all there is.
            max_sequence_length: tokens of a text at most.

        Raises:
            ValueError: a size that is no multiple of 16.
        """
        texts, size = self._begin(
            (prompt, negative_prompt, max_sequence_length),
            (height, width),
            guidance_scale,
            num_images_per_prompt,
        )
        options = (self.transformer.config.in_channels, *size, self.vae_scale_factor, torch.float32)
        device = self._execution_device
        latents = AnimaPrepareLatentsStep.prepare_latents(
            len(texts[0]), *options, device=device, generator=generator, latents=latents
        )
        self._set_times(num_inference_steps)
        self.scheduler.set_begin_index(0)
        told = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoised(latents, self.scheduler.timesteps, texts, size, told)
        return self._answer(latents, output_type, return_dict=return_dict)

    def _begin(
        self,
        words: tuple[str | list[str], str | list[str] | None, int],
        size: tuple[int | None, int | None],
        scale: float,
        each: int,
    ) -> tuple[list[Tensor], tuple[int, int]]:
        """The texts, one for each picture and pass, and the pictures' size."""
        side = self.default_sample_size * self.vae_scale_factor
        height, width = size[0] or side, size[1] or side
        if height % _TOKEN or width % _TOKEN:
            raise ValueError(f"height and width are {height} and {width}; allowed are multiples of {_TOKEN}")
        self._guidance_scale, self._interrupt = scale, False
        prompt, negative_prompt, length = words
        own = self.encode_prompt(
            prompt, negative_prompt, self.do_classifier_free_guidance, self._execution_device, length
        )
        return [one.repeat_interleave(each, 0) for one in own if one is not None], (height, width)

    def _set_times(self, steps: int) -> None:
        sigmas = np.linspace(1.0, 1 / steps, steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)

    def _denoised(
        self,
        latents: Tensor,
        times: Tensor,
        texts: list[Tensor],
        size: tuple[int, int],
        told: tuple[Callable[..., dict[str, Any]] | None, Sequence[str]],
    ) -> Tensor:
        """The latents after all steps, or those until a callback stopped it."""
        callback, inputs = told
        with self.progress_bar(total=len(times)) as bar:
            for number, time in enumerate(times):
                if self._interrupt:
                    break
                velocity = self._velocity(latents, time, texts, self._guidance_scale, size)
                latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
                if callback is not None:
                    given = {"latents": latents} if "latents" in inputs else {}
                    changed = callback(self, number, time, given) or {}
                    latents = changed.pop("latents", latents)
                bar.update()
        return latents

    def _answer(self, latents: Tensor, output_type: str, *, return_dict: bool) -> Any:
        images: Any = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(
        self, latents: Tensor, time: Tensor, texts: list[Tensor], scale: float, size: tuple[int, int]
    ) -> Tensor:
        """What the transformer says, of the prompt and then of the negative prompt."""
        dtype = self.transformer.dtype
        share = time.expand(len(latents)).to(dtype) / self.scheduler.config.num_train_timesteps
        told = {"padding_mask": latents.new_zeros(1, 1, *size, dtype=dtype), "return_dict": False}
        said = [
            self.transformer(
                hidden_states=latents.to(dtype), timestep=share, encoder_hidden_states=text, **told
            )[0]
            for text in texts
        ]
        found: Tensor = said[0] if len(said) == 1 else said[1] + scale * (said[0] - said[1])
        return found

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        """Pictures of latents."""
        config, values = self.vae.config, latents.to(self.vae.dtype)
        mean, spread = (
            torch.tensor(one).view(1, -1, 1, 1, 1) for one in (config.latents_mean, config.latents_std)
        )
        # By the reciprocal, for the same last bit as diffusers' block.
        latents = values / (1.0 / spread).to(values) + mean.to(values)
        frames = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(frames[:, :, 0], output_type=output_type)

    @property
    def guidance_scale(self) -> float:
        """Of the call that is running, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that call runs the negative prompt too."""
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Whether drawing is to stop; callbacks set `_interrupt`."""
        return self._interrupt

    _interrupt = False
    _guidance_scale = 1.0


class AnimaImg2ImgPipeline(AnimaPipeline):
    """What `AnimaModularPipeline` draws from text and a picture to begin from."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        image: Any,
        negative_prompt: str | list[str] | None = None,
        strength: float = 0.9,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> Any:
        """Draw pictures; all but these arguments as in `AnimaPipeline`.

        Args:
            image: the picture to begin from, or one per prompt, in any form that diffusers takes.
            strength: share of the steps that are taken, above 0 and up to 1.
            height, width: pixels, multiples of 16, that the picture is brought to; None is 1024.

        Raises:
            ValueError: a size that is no multiple of 16, or a strength that is not allowed.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; allowed is above 0 and up to 1")
        texts, size = self._begin(
            (prompt, negative_prompt, max_sequence_length),
            (height, width),
            guidance_scale,
            num_images_per_prompt,
        )
        begun, times = self._begun(
            self.image_processor.preprocess(image, *size),
            (len(texts[0]) // num_images_per_prompt, num_images_per_prompt),
            (num_inference_steps, strength),
            generator,
            latents,
        )
        told = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoised(begun, times, texts, size, told)
        return self._answer(latents, output_type, return_dict=return_dict)

    def _begun(
        self,
        picture: Tensor,
        counts: tuple[int, int],
        steps: tuple[int, float],
        generator: torch.Generator | list[torch.Generator] | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The picture's latents with noise, for prompts and pictures of each, and the steps that are left."""
        device, channels = self._execution_device, self.transformer.config.in_channels
        clean = encode_vae_image(picture, self.vae, generator, device, self.vae.dtype, channels)
        clean = repeat_tensor_to_batch_size("image", clean, *counts).float()
        self._set_times(steps[0])
        times, _ = get_timesteps(self.scheduler, *steps)
        if noise is None:
            noise = randn_tensor(clean.shape, generator, device, torch.float32)
        noisy: Tensor = self.scheduler.scale_noise(
            clean, times[:1].repeat(len(clean)), noise.to(device, torch.float32)
        )
        return noisy, times

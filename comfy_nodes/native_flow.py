"""Transformers of ComfyUI that are trained by flow matching, as denoisers that gates are trained on.

What such a network is told beside the text differs from family to family. ComfyUI's own model says it
(`extra_conds`, `_apply_model`), so that training tells the network what a sampler would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.flow_matching import FlowMatching

from .attention import ATTENTION, plain_attention
from .binding import adapts_text, text_encoders_of
from .native_model import CopiedModel, copied, differentiable, free_inputs
from .texts import stop_listening

#: Height and width of the pictures of models that do not say.
_SIZE = 1024
#: Guidance that networks are told which read it, as FLUX.1 dev, and of those that do not.
_READ, _CLASSIFIER_FREE = 3.5, 4.0
#: Texts whose encodings are kept.
_KEPT_TEXTS = 256
#: What networks call the side of the square of a latent's pixels that is one token.
_PATCH = ("patch_size", "patch")
_TEXT, _POOLED, _REAL = "text", "pooled", "real"


def flows(sampling: Any) -> bool:
    """Whether a MODEL with this `model_sampling` is trained by flow matching."""
    kinds = (comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.ModelSamplingDiscreteFlow)
    return isinstance(sampling, comfy.model_sampling.CONST) and isinstance(sampling, kinds)


class _Velocities(nn.Module):
    """A MODEL's sampling that leaves what the network says as it is, in place of the clean latents."""

    def __init__(self, sampling: Any) -> None:
        super().__init__()
        self.timestep: Callable[[Tensor], Tensor] = sampling.timestep

    def calculate_input(self, sigma: Tensor, noisy: Tensor) -> Tensor:
        """Noisy latents as the network reads them."""
        return noisy

    def calculate_denoised(self, sigma: Tensor, prediction: Tensor, noisy: Tensor) -> Tensor:
        """The velocity."""
        return prediction


@dataclass(frozen=True)
class _Text:
    """An encoded text: tokens (L, d), which of them are real (L,), and pooled (p,) or nothing."""

    tokens: Tensor
    real: Tensor
    pooled: Tensor


class FlowDenoiser(FlowMatching, CopiedModel):
    """Copies of a MODEL around a transformer as a `mole_diffusion.pictures.denoiser.Denoiser`.

    The network keeps the type of its weights, and language models are ComfyUI's own, which nobody changes:
    they are large. Times are shares of noise.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        texts_change: whether experts change text encoders, so that no encoding can be kept.
        text_encoders: ComfyUI's object of all text encoders, with copies of those that experts can change.

    Raises:
        TrainingError: the VAE is another model's, or the network reads more than latents.
    """

    def __init__(self, model: Any, clip: Any, vae: Any, size: int | None = None) -> None:
        super().__init__(model, clip, vae, size, _SIZE, None)
        free_inputs(self.network)
        self._sampling: Any = model.get_model_object("model_sampling")
        self._base = _around(model.model, self.network, _Velocities(self._sampling))
        encoders = clip.cond_stage_model
        self.text_encoder = nn.ModuleDict(
            {
                name: copied(clip.patcher, getattr(encoders, name), self.device, torch.float32)
                for name in text_encoders_of(encoders).values()
            }
        )
        free_inputs(self.text_encoder)
        self.text_encoders: Any = _with_parts(encoders, dict(self.text_encoder.items()))
        stop_listening(self.text_encoders)
        self.texts_change = False
        self._texts: dict[str, _Text] = {}
        self._told_guidance = _READ
        self._levels: Tensor | None = None

    @property
    def facts(self) -> Mapping[str, str]:
        """What experts and gates must agree with: transformers are all trained alike."""
        return {}

    @property
    def call_defaults(self) -> Mapping[str, Any]:
        """What pictures are drawn with where nobody says."""
        return {"guidance_scale": _READ if self.reads_guidance else _CLASSIFIER_FREE}

    @property
    def reads_guidance(self) -> bool:
        """Whether the network is told how strong guidance is, and needs no second pass for it."""
        return bool(getattr(getattr(self.network, "params", None), "guidance_embed", False))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width, which are whole patches."""
        channels, side, _ = super().latent_shape
        patch = next((int(getattr(self.network, name)) for name in _PATCH if hasattr(self.network, name)), 1)
        return channels, side // patch * patch, side // patch * patch

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`."""
        self._told_guidance = scale
        return 1.0 if self.reads_guidance else scale

    def check_trainable(self) -> None:
        """Refuse networks that read more than latents, and VAEs of other models.

        Raises:
            TrainingError: it is such a one, or has no gradients.
        """
        if adapts_text(self.network):
            raise TrainingError(
                "Gates of Anima cannot be trained in ComfyUI: its attention there has no gradients. Without "
                "gates experts count alike, with masks and regions."
            )
        latents = self._framed(torch.zeros(1, *self.latent_shape, device=self.device))
        if self._base.concat_cond(noise=latents, device=self.device) is not None:
            raise TrainingError(
                "This MODEL reads another picture beside the latents (FLUX Fill, Canny, Depth); train on its "
                "base."
            )
        self.check_vae()

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as ComfyUI does; padded behind their ends, with a mask, so that they are rows."""
        encoded = [self._encoded(text) for text in texts]
        if self.reader is not None:
            for text, one in zip(texts, encoded, strict=True):
                self.reader.note(self.clip.tokenize(text), one.tokens[None])
        longest = max(len(one.tokens) for one in encoded)
        rows = [nn.functional.pad(one.tokens, (0, 0, 0, longest - len(one.tokens))) for one in encoded]
        # -1 is behind the end, which the network does not see at all.
        ends = [nn.functional.pad(one.real, (0, longest - len(one.real)), value=-1) for one in encoded]
        pooled = torch.stack([one.pooled for one in encoded])
        return Condition({_TEXT: torch.stack(rows), _REAL: torch.stack(ends), _POOLED: pooled})

    def _encoded(self, text: str) -> _Text:
        if text in self._texts:
            return self._texts[text]
        model = self.text_encoders
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        self.clip.load_model()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.texts_change):
            tokens, pooled, *more = model.encode_token_weights(self.clip.tokenize(text))
        entries: dict[str, Any] = dict(*more)
        tokens, mask = tokens[0], entries.get("attention_mask")
        real = torch.ones(len(tokens)) if mask is None else mask[0]
        pooled = torch.zeros(0) if pooled is None else pooled[0]
        # Language models may have been loaded in inference mode, whose tensors autograd refuses.
        found = _Text(*(one.clone().to(self.device) for one in (tokens, real.to(torch.int8), pooled)))
        if not self.texts_change and len(self._texts) < _KEPT_TEXTS:
            self._texts[text] = found
        return found

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`; without gradient it stops with ComfyUI's own exception when asked to."""
        if not torch.is_grad_enabled():
            comfy.model_management.throw_exception_if_processing_interrupted()
        times = torch.as_tensor(times, device=latents.device).float().expand(len(latents))
        found = torch.zeros_like(latents)
        for rows in _alike(condition.tensors[_REAL]):
            found = found.index_put(
                (rows,), self._velocity(latents[rows], times[rows], condition[rows.tolist()])
            )
        return found

    def _velocity(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The same for texts that end at one place."""
        text, real, pooled = (condition.tensors[name] for name in (_TEXT, _REAL, _POOLED))
        length = int((real[0] >= 0).sum())
        framed = self._framed(latents)
        told: dict[str, Any] = {
            "cross_attn": text[:, :length],
            "pooled_output": pooled if pooled.shape[1] else None,
            "noise": framed,
            "device": latents.device,
            "width": self._size,
            "height": self._size,
            "prompt_type": "positive",
        }
        if self.reads_guidance:
            told["guidance"] = self._told_guidance
        if not bool(real[0, :length].all()):
            told["attention_mask"] = real[:1, :length]
        conditions = self._base.extra_conds(**told)
        given = {
            name: one.process_cond(batch_size=len(latents), device=latents.device, area=None).cond
            for name, one in conditions.items()
        }
        options = {ATTENTION: plain_attention}
        with differentiable():
            velocity: Tensor = self._base._apply_model(framed, times, transformer_options=options, **given)
        return self._unframed(velocity)

    @property
    def fixed_shift(self) -> float:
        """See `FlowMatching.fixed_shift`: FLUX's depends on the size."""
        discrete = isinstance(self._sampling, comfy.model_sampling.ModelSamplingDiscreteFlow)
        return float(self._sampling.shift) if discrete else 1.0

    def schedule(self, steps: int) -> Tensor:
        """See `Denoiser.schedule`; ComfyUI's "simple" one."""
        self._levels = comfy.samplers.calculate_sigmas(self._sampling, "simple", steps).float().cpu()
        return self._levels[:-1]

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.step`; Euler's."""
        if self._levels is None:
            raise TrainingError("step() goes through the times of schedule(), which was not called")
        level = float(time)
        lower = float(self._levels[int((self._levels - level).abs().argmin()) + 1])
        return latents + (lower - level) * prediction, latents - level * prediction


def _alike(ends: Tensor) -> Iterator[Tensor]:
    """Numbers of the rows that are equal, group by group; on the device of the rows."""
    _, groups = torch.unique(ends, dim=0, return_inverse=True)
    for group in range(int(groups.max()) + 1):
        yield (groups == group).nonzero()[:, 0]


def _around(base: Any, network: nn.Module, sampling: nn.Module) -> Any:
    """A MODEL's object of ComfyUI around another network, with another sampling; the original stays."""
    return _with_parts(base, {"diffusion_model": network, "model_sampling": sampling})


def _with_parts(module: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """The same module with some of its parts replaced; the others are shared."""
    duplicate = copy.copy(module)
    modules: Any = duplicate._modules
    duplicate.__dict__["_modules"] = {**modules, **dict(parts.items())}
    return duplicate

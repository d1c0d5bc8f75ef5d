"""Stable Diffusion 1.x, 2.x and XL of ComfyUI as denoisers that gates are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor

from mole_diffusion.core.ensemble import PREDICTION_TYPE
from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.denoiser import Condition

from .attention import ATTENTION, plain_attention
from .native_model import CopiedModel, copied, differentiable, free_inputs

#: Height and width of the pictures of models that do not say, and of SDXL.
DEFAULT_SIZE, XL_SIZE = 512, 1024
_TEXT, _ADDED = "context", "y"


class NoiseLevels:
    """Noise levels of a MODEL, and deterministic sampling (DDIM) over them.

    Args:
        sampling: the MODEL's `model_sampling`.

    Attributes:
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        TrainingError: it has no discrete noise levels with a prediction of noise or velocity.
    """

    def __init__(self, sampling: Any) -> None:
        velocity = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        known = velocity or isinstance(sampling, comfy.model_sampling.EPS)
        other = (comfy.model_sampling.X0, comfy.model_sampling.EDM)
        if not known or isinstance(sampling, other) or not hasattr(sampling, "sigmas"):
            raise TrainingError(
                f"A MODEL with the sampling {type(sampling).__name__} cannot be trained with; allowed are "
                "models that predict noise or velocity (Stable Diffusion 1.x, 2.x and XL)."
            )
        with torch.inference_mode(False):
            sigmas = sampling.sigmas.detach().clone().double().cpu()
            self._alphas = (1 / (1 + sigmas**2)).float()
        self.prediction_type = "v_prediction" if velocity else "epsilon"
        self._stride = 1.0

    def __len__(self) -> int:
        return len(self._alphas)

    def spread(self, steps: int) -> Tensor:
        """`steps` timesteps from the last one down, which `step` then goes through."""
        self._stride = len(self) / steps
        return (torch.arange(len(self), 0, -self._stride)[:steps].round() - 1).long()

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents as they are at these timesteps."""
        signal, spread = self._factors(times, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noise or velocity."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._factors(times, latents)
        return signal * noise - spread * latents

    def step(self, prediction: Tensor, time: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The next latents and the predicted clean ones."""
        signal, spread = self._factors(torch.tensor([time]), latents)
        if self.prediction_type == "epsilon":
            noise, clean = prediction, (latents - spread * prediction) / signal
        else:
            clean = signal * latents - spread * prediction
            noise = signal * prediction + spread * latents
        following = round(time + 1 - self._stride) - 1
        if following < 0:
            return clean, clean
        signal, spread = self._factors(torch.tensor([following]), latents)
        return signal * clean + spread * noise, clean

    def _factors(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self._alphas[times.cpu()].to(like.device, like.dtype).view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()


class DiffusionDenoiser(CopiedModel):
    """Copies of a MODEL, a CLIP and a VAE as a `mole_diffusion.pictures.denoiser.Denoiser`, in float32.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        levels: the noise levels.

    Raises:
        TrainingError: this kind of model cannot be trained with.
    """

    #: What pictures are drawn with where nobody says.
    call_defaults: Mapping[str, Any] = {}

    def __init__(self, model: Any, clip: Any, vae: Any, size: int | None = None) -> None:
        if model.model.adm_channels and not isinstance(model.model, comfy.model_base.SDXL):
            raise TrainingError(
                "Gates are trained on Stable Diffusion 1.x, 2.x and XL here; this MODEL reads more than a "
                "text (SDXL's refiner, or one for variations of pictures): train on its base."
            )
        # SDXL is told the size of the picture, and what its second text encoder makes of the whole text.
        self._added: Callable[..., Tensor] | None = (
            model.model.encode_adm if model.model.adm_channels else None
        )
        self.levels = NoiseLevels(model.get_model_object("model_sampling"))
        usual = DEFAULT_SIZE if self._added is None else XL_SIZE
        super().__init__(model, clip, vae, size, usual, torch.float32)
        self.text_encoder: Any = copied(clip.patcher, clip.cond_stage_model, self.device, torch.float32)
        free_inputs(self.text_encoder)

    @property
    def facts(self) -> Mapping[str, str]:
        """What experts and gates must agree with."""
        return {PREDICTION_TYPE: self.levels.prediction_type}

    @property
    def text_encoders(self) -> Any:
        """ComfyUI's object of the copied text encoders."""
        return self.text_encoder

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`: these networks read none."""
        return scale

    def check_trainable(self) -> None:
        """Refuse UNets that read more than latents, and VAEs of other models.

        Raises:
            TrainingError: it is one for inpainting, or the VAE makes latents that it cannot read.
        """
        channels, expected = self.network.in_channels, self.latent_shape[0]
        if channels != expected:
            raise TrainingError(
                f"This MODEL reads {channels} channels, latents have {expected} (one for inpainting reads "
                "mask and picture too); train on its base."
            )
        self.check_vae()

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Token embeddings, with gradient; shorter texts are repeated to equal length.

        Raises:
            TrainingError: the texts are of too different lengths for that.
        """
        model = self.text_encoder
        model.reset_clip_options()
        if self.clip.layer_idx is not None:
            model.set_clip_options({"layer": self.clip.layer_idx})
        tokens = [self.clip.tokenize(text, disable_weights=True) for text in texts]
        if self.reader is not None:
            self.reader.begin(tokens)
        encoded = [
            _encode(encoder, [one[name] for one in tokens]) for name, encoder in _encoders(model).items()
        ]
        # As ComfyUI does it for SDXL: as many tokens as both have, and the last one's pooled text.
        length = min(rows.shape[1] for rows, _ in encoded)
        told = {_TEXT: torch.cat([rows[:, :length] for rows, _ in encoded], dim=-1)}
        if self.reader is not None:
            for own, text in zip(tokens, told[_TEXT], strict=True):
                self.reader.note(own, text[None])
        if self._added is not None:
            height, width = self.picture_size
            told[_ADDED] = self._added(pooled_output=encoded[-1][1], height=height, width=width)
        return Condition(told)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`; without gradient it stops with ComfyUI's own exception when asked to."""
        if not torch.is_grad_enabled():
            comfy.model_management.throw_exception_if_processing_interrupted()
        times = torch.as_tensor(times, device=latents.device).float().expand(len(latents))
        options = {ATTENTION: plain_attention}
        told = condition.tensors
        with differentiable():
            prediction: Tensor = self.network(
                latents, times, context=told[_TEXT], y=told.get(_ADDED), transformer_options=options
            )
        return prediction

    def random_times(self, count: int, draws: torch.Generator) -> Tensor:
        """Timesteps, all equally likely."""
        return torch.randint(len(self.levels), (count,), generator=draws)

    def times_at(self, shares: Tensor) -> Tensor:
        """Timesteps at shares of the schedule."""
        return (shares * len(self.levels)).long().clamp(max=len(self.levels) - 1)

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Denoiser.noisy`."""
        return self.levels.noisy(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Denoiser.target`."""
        return self.levels.target(latents, noise, times)

    def schedule(self, steps: int) -> Tensor:
        """See `Denoiser.schedule`."""
        return self.levels.spread(steps)

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.step`."""
        return self.levels.step(prediction, int(time), latents)


def _encoders(model: Any) -> dict[str, Any]:
    """The text encoders inside a CLIP's model, by the name that its tokenizer gives to their tokens."""
    if hasattr(model, "clip_name"):
        return {model.clip_name: getattr(model, model.clip)}
    return {"l": model.clip_l, "g": model.clip_g}


def _encode(encoder: Any, texts: Sequence[Sequence[Sequence[tuple[Any, float]]]]) -> tuple[Tensor, Tensor]:
    """Token embeddings (texts, length, d) and pooled texts (texts, p) of one text encoder.

    Args:
        encoder: ComfyUI's.
        texts: each in sections of equal length, as the tokenizer makes them of long texts.

    Raises:
        TrainingError: the texts are of too different lengths.
    """
    counts = [len(sections) for sections in texts]
    if any(max(counts) % count for count in counts):
        raise TrainingError("The prompts have too different lengths; write prompts of similar length.")
    # All sections of all texts are one batch; shorter texts are repeated.
    batch = [[token for token, _ in section] for sections in texts for section in sections]
    embedded, pooled = encoder(batch)[:2]
    rows = [own.flatten(0, 1).repeat(max(counts) // len(own), 1) for own in embedded.split(counts)]
    return torch.stack(rows), torch.stack([own[0] for own in pooled.split(counts)])

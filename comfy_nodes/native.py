"""ComfyUI's MODEL, CLIP and VAE as what gates are trained on: copies that are free of ComfyUI's habits.

Nodes run in inference mode, whose tensors autograd refuses, and share one network among all clones; so the
trainer gets copies in memory of its own, with the weights as they are patched (a LoRA of the core counts).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import PREDICTION_TYPE, Ensemble
from mole_diffusion.core.errors import NoExpertsError, TrainingError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.fixed import fixed_mixture
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.records import Recorder
from mole_diffusion.pictures.denoiser import Condition

from .binding import networks_of
from .experts import ExpertSet
from .weights import mean_weights_entry

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


class ComfyDenoiser:
    """Copies of a MODEL, a CLIP and a VAE as a `mole_diffusion.pictures.denoiser.Denoiser`.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        network: the copy of the UNet, in float32.
        text_encoder: the copy of the CLIP's model.
        device: where everything runs.
        levels: the noise levels.

    Raises:
        TrainingError: this kind of model cannot be trained with.
    """

    dtype = torch.float32

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
        self.device: torch.device = model.load_device
        self.network: Any = _copy(model, model.model.diffusion_model, self.device)
        self.text_encoder = _copy(clip.patcher, clip.cond_stage_model, self.device)
        self._autoencoder = _copy(vae.patcher, vae.first_stage_model, self.device)
        self._clip, self._format = clip, model.model.latent_format
        self._encoded_channels = int(vae.latent_channels)
        usual = DEFAULT_SIZE if self._added is None else XL_SIZE
        configured: int = getattr(model.model.model_config, "mole_picture_size", usual)
        self._size = configured if size is None else size
        self._factor = int(vae.spacial_compression_encode())
        _free_inputs(self.text_encoder)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """UNet, text encoder and VAE."""
        return {UNET: self.network, "text_encoder": self.text_encoder, "vae": self._autoencoder}

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return self._size, self._size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""
        side = self._size // self._factor
        return int(self._format.latent_channels), side, side

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`: these networks read none."""
        return scale

    def combined(self, without: Tensor, with_text: Tensor, scale: float) -> Tensor:
        """See `Denoiser.combined`."""
        return without + scale * (with_text - without)

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
        if self._encoded_channels != expected:
            raise TrainingError(
                f"This VAE makes latents of {self._encoded_channels} channels, this MODEL reads {expected}; "
                "connect the MODEL's own VAE."
            )

    def training(self, *, checkpointing: bool, decodes: bool) -> AbstractContextManager[None]:
        """Nothing to prepare: the copies are in float32.

        Raises:
            TrainingError: ComfyUI's networks do not recompute their activations.
        """
        if checkpointing:
            raise TrainingError("gradient_checkpointing is for models of diffusers; ComfyUI's have none.")
        return nullcontext()

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Token embeddings, with gradient; shorter texts are repeated to equal length.

        Raises:
            TrainingError: the texts are of too different lengths for that.
        """
        model = self.text_encoder
        model.reset_clip_options()
        if self._clip.layer_idx is not None:
            model.set_clip_options({"layer": self._clip.layer_idx})
        tokens = [self._clip.tokenize(text, disable_weights=True) for text in texts]
        encoded = [
            _encode(encoder, [one[name] for one in tokens]) for name, encoder in _encoders(model).items()
        ]
        # As ComfyUI does it for SDXL: as many tokens as both have, and the last one's pooled text.
        length = min(rows.shape[1] for rows, _ in encoded)
        told = {_TEXT: torch.cat([rows[:, :length] for rows, _ in encoded], dim=-1)}
        if self._added is not None:
            height, width = self.picture_size
            told[_ADDED] = self._added(pooled_output=encoded[-1][1], height=height, width=width)
        return Condition(told)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`; without gradient it stops with ComfyUI's own exception when asked to."""
        if not torch.is_grad_enabled():
            comfy.model_management.throw_exception_if_processing_interrupted()
        times = torch.as_tensor(times, device=latents.device).float().expand(len(latents))
        options = {"optimized_attention_override": _plain_attention}
        told = condition.tensors
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

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """See `Denoiser.encode`; without gradient."""
        latents: Tensor = self._autoencoder.encode((pictures * 2 - 1).to(self.device, self.dtype))
        scaled: Tensor = latents * self._format.scale_factor
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """See `Denoiser.decode`."""
        pixels: Tensor = self._autoencoder.decode(latents / self._format.scale_factor)
        return (pixels / 2 + 0.5).clamp(0, 1)

    def digest(self) -> str:
        """Tells bases apart: a hash over some of the weights."""
        digest = hashlib.sha256()
        for part in (self.network, self.text_encoder):
            parameters = [p for _, p in sorted(part.named_parameters()) if p.numel() < 1_000_000]
            for parameter in parameters[:: max(1, len(parameters) // 20)]:
                digest.update(json.dumps(parameter.flatten()[:64].tolist()).encode())
        return digest.hexdigest()


class TrainingCopy:
    """Experts on copies of ComfyUI's objects: what `GateTrainer` trains, and its denoiser.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        experts: the experts; all of them count in training.
        config: form of the gates.
        size: height and width of the pictures in pixels; None for the model's own.

    Attributes:
        denoiser: the copies.
        ensemble: the experts on its networks.

    Raises:
        NoExpertsError: there are no experts.
        TrainingError: this kind of model cannot be trained with.
        ExpertLoadError: an expert belongs to a base of another prediction type.
        InjectionError: an expert does not fit.
    """

    def __init__(
        self, model: Any, clip: Any, vae: Any, experts: ExpertSet, config: MoLEConfig, size: int | None = None
    ) -> None:
        if not experts.experts:
            raise NoExpertsError("There are no experts to train gates for: connect Load Expert.")
        self.denoiser = ComfyDenoiser(model, clip, vae, size)
        networks = {UNET: self.denoiser.network, **networks_of(self.denoiser.text_encoder)}
        facts = {PREDICTION_TYPE: self.denoiser.levels.prediction_type}
        self.ensemble = Ensemble(networks, facts=facts, config=config)
        self.ensemble.set_experts(experts.experts, unchecked=experts.unchecked)

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name."""
        return self.ensemble.experts

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The mixture of each network that an expert changes, by part."""
        return self.ensemble.mixtures

    def composing(
        self,
        *,
        active_experts: Sequence[str] | None = None,
        mixture: str | Mapping[str, float] = "gates",
    ) -> AbstractContextManager[None]:
        """Which experts count inside the block, and how; see `WithExperts.composing` of the pipelines."""
        active, weights = fixed_mixture(mixture, list(self.experts), active_experts)
        return self.ensemble.choosing(Choice(active, weights=weights, base_only=mixture == "none"))

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates, with what they weighed in the last iteration."""
        recorder = Recorder()
        for mixture in self.mixtures.values():
            recorder.note(mixture)
        noted = mean_weights_entry(tuple(self.experts), recorder.weights.means())
        self.ensemble.save_gates(path, {**noted, **(metadata or {})})


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


def _plain_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's own attention in place of ComfyUI's choice, which may have no gradient."""
    result: Tensor = attention_pytorch(*args, **kwargs)
    return result


def _copy(patcher: Any, network: nn.Module, device: torch.device) -> Any:
    """A copy of a network in float32, in memory that autograd accepts, with its patches, without hooks."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True, force_full_load=True)
    with torch.inference_mode(False), patcher.use_ejected():
        duplicate = copy.deepcopy(network)
        duplicate = duplicate.to(device=device, dtype=torch.float32)
    module: Any
    for module in duplicate.modules():
        if isinstance(getattr(module, "dtype", None), torch.dtype):
            module.dtype = torch.float32
    return duplicate.requires_grad_(False).eval()


def _free_inputs(encoder: nn.Module) -> None:
    """Let ComfyUI's CLIP be trained through: it adds to its hidden states in place, which layer norms "
    "keep."""
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))

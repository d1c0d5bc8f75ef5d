"""ComfyUI's MODEL, CLIP and VAE as what the gate trainer works on: copies that are free of ComfyUI's habits.

Nodes run in inference mode, whose tensors autograd refuses, and share one network among all clones; so the
trainer gets copies in memory of its own, with the weights as they are patched (a LoRA of the core counts).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from mole_diffusion.core.checkpoint import save_gates
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import NoExpertsError, TrainingError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.core.networks.clip import TEXT_ENCODER
from mole_diffusion.core.networks.unet import UNET

from .binding import Usage, networks_of
from .experts import ExpertSet
from .weights import mean_weights_entry

#: Height and width of the pictures of models that do not say.
DEFAULT_SIZE = 512


class NoiseSchedule:
    """Deterministic sampling (DDIM) on the noise levels of a MODEL, as the trainer wants it.

    Args:
        sampling: the MODEL's `model_sampling`.
    Raises:
        TrainingError: it is no schedule of noise levels with a prediction of noise or velocity.
    """

    for_training = True
    init_noise_sigma = 1.0

    def __init__(self, sampling: Any) -> None:
        velocity = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        known = velocity or isinstance(sampling, comfy.model_sampling.EPS)
        other = (comfy.model_sampling.X0, comfy.model_sampling.EDM)
        if not known or isinstance(sampling, other) or not hasattr(sampling, "sigmas"):
            raise TrainingError(
                f"A MODEL with the sampling {type(sampling).__name__} cannot be trained with; allowed are "
                "models that predict noise or velocity (Stable Diffusion 1.x and 2.x)."
            )
        with torch.inference_mode(False):
            sigmas = sampling.sigmas.detach().clone().double().cpu()
            self._alphas = (1 / (1 + sigmas**2)).float()
        self.config = SimpleNamespace(
            num_train_timesteps=len(self._alphas), prediction_type="v_prediction" if velocity else "epsilon"
        )
        self.timesteps = torch.arange(0)
        self._stride = 1.0

    def set_timesteps(self, steps: int) -> None:
        """Spread `steps` timesteps from the last one down."""
        total = len(self._alphas)
        self._stride = total / steps
        self.timesteps = (torch.arange(total, 0, -self._stride)[:steps].round() - 1).long()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents as they are at these timesteps."""
        signal, spread = self._factors(timesteps, latents)
        return signal * latents + spread * noise

    def get_velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network that predicts velocity should predict."""
        signal, spread = self._factors(timesteps, latents)
        return signal * noise - spread * latents

    def step(self, prediction: Tensor, timestep: int, latents: Tensor) -> Any:
        """The next latents (`prev_sample`) and the predicted clean ones (`pred_original_sample`)."""
        signal, spread = self._factors(torch.tensor([timestep]), latents)
        if self.config.prediction_type == "epsilon":
            noise, clean = prediction, (latents - spread * prediction) / signal
        else:
            clean = signal * latents - spread * prediction
            noise = signal * prediction + spread * latents
        following = round(timestep + 1 - self._stride) - 1
        if following >= 0:
            signal, spread = self._factors(torch.tensor([following]), latents)
            return SimpleNamespace(prev_sample=signal * clean + spread * noise, pred_original_sample=clean)
        return SimpleNamespace(prev_sample=clean, pred_original_sample=clean)

    def _factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self._alphas[timesteps.cpu()].to(like.device, like.dtype).view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()


class NativeUNet(nn.Module):
    """A UNet of ComfyUI, called as one of diffusers.

    Args:
        network: the network.
        size: height and width of its pictures in latents.
        device: where it runs.
    """

    def __init__(self, network: Any, size: int, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device
        self.dtype = torch.float32
        self.config = SimpleNamespace(in_channels=network.in_channels, sample_size=size)

    def forward(self, latents: Tensor, timestep: Any, encoder_hidden_states: Tensor) -> Any:
        """Prediction in `.sample`; without gradient it stops with ComfyUI's own exception when asked to."""
        if not torch.is_grad_enabled():
            comfy.model_management.throw_exception_if_processing_interrupted()
        timesteps = torch.as_tensor(timestep, device=latents.device).float().expand(len(latents))
        options = {"optimized_attention_override": _plain_attention}
        sample = self.network(latents, timesteps, context=encoder_hidden_states, transformer_options=options)
        return SimpleNamespace(sample=sample)


class NativeVAE(nn.Module):
    """A VAE of ComfyUI, called as one of diffusers.

    Args:
        network: its `first_stage_model`.
        latent_format: the MODEL's.
        device: where it runs.
    """

    def __init__(self, network: Any, latent_format: Any, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device
        self.dtype = torch.float32
        self.config = SimpleNamespace(
            scaling_factor=latent_format.scale_factor,
            latent_channels=latent_format.latent_channels,
            get=lambda *_: None,
        )

    def encode(self, pixels: Tensor) -> Any:
        """Mean latents in `.latents` of pixels (B, 3, H, W) in -1..1."""
        return SimpleNamespace(latents=self.network.encode(pixels))

    def decode(self, latents: Tensor) -> Any:
        """Pixels in `.sample`, -1..1."""
        return SimpleNamespace(sample=self.network.decode(latents))


class NativePipeline:
    """What `mole_diffusion.training.GateTrainer` calls a pipeline, made of copies of ComfyUI's objects.

    Args:
        model, clip, vae: ComfyUI's objects, which stay as they are.
        experts: the experts; all of them count in training.
        config: form of the gates.
        size: height and width of the pictures in pixels; None for the model's own.
    Raises:
        NoExpertsError: there are no experts.
        TrainingError: this kind of model cannot be trained with.
        InjectionError: an expert does not fit.
    """

    def __init__(
        self, model: Any, clip: Any, vae: Any, experts: ExpertSet, config: MoLEConfig, size: int | None = None
    ) -> None:
        if not experts.experts:
            raise NoExpertsError("There are no experts to train gates for: connect Load Expert.")
        if model.model.adm_channels:
            raise TrainingError(
                "Gates are trained on Stable Diffusion 1.x and 2.x here; this MODEL (SDXL, or one that reads "
                "more than a text) can use gates that were trained elsewhere."
            )
        self.experts: Mapping[str, Expert] = {expert.name: expert for expert in experts.experts}
        self.scheduler = NoiseSchedule(model.get_model_object("model_sampling"))
        self.vae_scale_factor = int(vae.spacial_compression_encode())
        configured: int = getattr(model.model.model_config, "mole_picture_size", DEFAULT_SIZE)
        size = configured if size is None else size
        device = model.load_device
        network = _copy(model, model.model.diffusion_model, device)
        self.unet = NativeUNet(network, size // self.vae_scale_factor, device)
        self.text_encoder = _copy(clip.patcher, clip.cond_stage_model, device)
        self.vae = NativeVAE(
            _copy(vae.patcher, vae.first_stage_model, device), model.model.latent_format, device
        )
        self._clip = clip
        _free_inputs(self.text_encoder)
        self.mixtures = self._inject(experts, config)
        for mixture in self.mixtures.values():
            mixture.to(device)
        self._composition: tuple[Any, Any] = (None, "gates")
        self.usage = Usage()

    def _networks(self) -> dict[str, nn.Module]:
        return {UNET: self.unet, TEXT_ENCODER: self.text_encoder}

    def _inject(self, experts: ExpertSet, config: MoLEConfig) -> dict[str, Mixture]:
        networks = {UNET: self.unet.network, **networks_of(self.text_encoder)}
        with torch.inference_mode(False):
            return {
                part: inject(network, experts.experts, config, part=part)
                for part, network in networks.items()
                if any(expert.factors.get(part) for expert in experts.experts)
            }

    @contextmanager
    def composing(
        self, active_experts: Sequence[str] | None = None, mixture: Any = "gates", **_: Any
    ) -> Iterator[None]:
        """Which experts count inside the block: those named, with gates, or none (mixture "none")."""
        before = self._composition
        self._compose(active_experts, mixture)
        try:
            yield
        finally:
            self._compose(*before)

    def _compose(self, active: Sequence[str] | None, mixture: Any) -> None:
        self._composition = active, mixture
        for own in self.mixtures.values():
            if mixture == "none":
                own.disable()
            else:
                own.enable()
                own.activate(active)

    def encode_prompt(self, texts: Sequence[str], *_: Any, **__: Any) -> tuple[Tensor]:
        """Token embeddings (len(texts), tokens, d), with gradient; shorter texts are repeated to equal "
        "length."""
        model = self.text_encoder
        model.reset_clip_options()
        if self._clip.layer_idx is not None:
            model.set_clip_options({"layer": self._clip.layer_idx})
        # Long texts have several sections of equal length; all sections of all texts are one batch.
        sections = [self._clip.tokenize(text, disable_weights=True)[model.clip_name] for text in texts]
        counts = [len(own) for own in sections]
        if any(max(counts) % count for count in counts):
            raise TrainingError("The prompts have too different lengths; write prompts of similar length.")
        batch = [[token for token, _ in section] for own in sections for section in own]
        encoded = getattr(model, model.clip)(batch)[0].split(counts)
        rows = [own.flatten(0, 1).repeat(max(counts) // len(own), 1) for own in encoded]
        return (torch.stack(rows),)

    def save_gates(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the gates, with what they weighed in the last iteration."""
        usage = Usage()
        for mixture in self.mixtures.values():
            usage.add(mixture)
        names = next(iter(self.mixtures.values())).expert_names
        facts = {"prediction_type": self.scheduler.config.prediction_type}
        noted = mean_weights_entry(names, usage.means())
        save_gates(path, self.mixtures, metadata={**facts, **noted, **metadata})

    def digest(self) -> str:
        """Tells bases apart: a hash over some of the weights."""
        digest = hashlib.sha256()
        for part in (self.unet.network, self.text_encoder):
            parameters = [p for _, p in sorted(part.named_parameters()) if p.numel() < 1_000_000]
            for parameter in parameters[:: max(1, len(parameters) // 20)]:
                digest.update(json.dumps(parameter.flatten()[:64].tolist()).encode())
        return digest.hexdigest()


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

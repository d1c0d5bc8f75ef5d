"""DreamBooth (Ruiz et al. 2023): one LoRA from a few pictures of a subject, ready as an expert."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from PIL.Image import Image
from torch import Tensor, nn

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.pictures.training.rollout import denoising_target, training_scheduler
from mole_diffusion.pictures.training.workbench import picture_tensor
from mole_diffusion.training import state as training_state
from mole_diffusion.training.progress import Interrupt

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
_ADAPTER = "new_expert"
_DRAWN_AT_ONCE = 4
# Of the pictures for prior preservation; bases with zero terminal SNR overexpose them without rescaling.
_PRIOR_DRAWING = {"num_inference_steps": 20, "guidance_scale": 5.0, "guidance_rescale": 0.7}

#: Called with (steps done, steps in total, loss).
Callback = Callable[[int, int, float], Any]


@dataclass(frozen=True, kw_only=True)
class ExpertTrainingConfig:
    """How an expert is trained.

    Args:
        steps: optimiser steps.
        batch_size: pictures of the subject per step.
        rank: rank of the LoRA.
        learning_rate: of AdamW.
        prior_weight: weight of prior preservation, the loss on pictures of the class that the base draws
            itself; 0 is none.
        prior_pictures: pictures of the class to draw.
        seed: seed of everything that is drawn.
        checkpoint_every: steps between checkpoints.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 400
    batch_size: int = 2
    rank: int = 8
    learning_rate: float = 1e-4
    prior_weight: float = 0.0
    prior_pictures: int = 24
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "prior_pictures", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed are whole numbers from 1")
        if self.learning_rate <= 0 or self.prior_weight < 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate!r}, prior_weight {self.prior_weight!r};"
                " allowed are numbers above 0, and from 0"
            )


class ExpertTrainer:
    """Trains a LoRA on UNet and text encoder of a pipeline, which is afterwards as it was.

    Args:
        pipe: a `StableDiffusionMoLEPipeline` without experts, in float32.
        pictures: pictures of the subject; their centre is taken.
        text: phrase with the trigger word, e.g. "a sks dog".
        class_text: the same in the base's words, "a dog"; needed for prior preservation.
        config: the settings; None is `ExpertTrainingConfig()`.

    Raises:
        ConfigError: no pictures, no text, or no class text where it is needed.
        TrainingError: the pipeline has experts or LoRAs, is of SDXL, or its scheduler cannot be trained with.
    """

    def __init__(
        self,
        pipe: Any,
        pictures: Sequence[Image],
        text: str,
        class_text: str = "",
        config: ExpertTrainingConfig | None = None,
    ) -> None:
        self.config = config or ExpertTrainingConfig()
        if pipe.experts:
            raise TrainingError(f"the pipeline has the experts {list(pipe.experts)}; train on the base alone")
        if hasattr(pipe.unet, "peft_config"):
            raise TrainingError("the pipeline has LoRAs loaded; unload_lora_weights() first")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise TrainingError(
                "SDXL has two text encoders; experts are trained here on Stable Diffusion 1 and 2"
            )
        if not pictures or not text.strip():
            raise ConfigError(
                f"{len(pictures)} pictures of {text!r}; needed are pictures, and words for them"
            )
        if self.config.prior_weight and not class_text.strip():
            raise ConfigError("prior preservation draws pictures of the class: class_text is empty")
        self.text, self.class_text = text.strip(), class_text.strip()
        self._pipe = pipe
        self._scheduler = training_scheduler(pipe.scheduler)
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self._pictures = torch.stack([picture_tensor(picture, (size, size)) for picture in pictures])

    def train(
        self, out: Path, folder: Path, *, fresh: bool = False, callback: Callback | None = None
    ) -> list[float]:
        """Train, or go on with the training in `folder`, and write the LoRA to `out`.

        Args:
            out: LoRA file (.safetensors), with the trigger in its header.
            folder: where checkpoints are kept.
            fresh: begin anew whatever `folder` holds.
            callback: called after every step.

        Returns:
            The loss of every step.

        Raises:
            ConfigError: `out` is not called .safetensors.
            TrainingError: `folder` holds another training, or the loss is no number.
            KeyboardInterrupt: after Ctrl-C; the checkpoint holds everything up to there.
        """
        if out.suffix != ".safetensors":
            raise ConfigError(f"out is {str(out)!r}; a LoRA file ends in .safetensors")
        saved = None if fresh else self._saved(folder)
        networks = {"unet": self._pipe.unet, "text_encoder": self._pipe.text_encoder}
        with ExitStack() as stack:
            modules = [*networks.values(), self._pipe.vae]
            stack.enter_context(training_state.only_gates_train(modules, []))
            subject = self._encode(self._pictures)
            prior = self._prior() if saved is None else saved["prior"]
            stack.enter_context(self._adapters(networks))
            factors = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(factors, lr=self.config.learning_rate)
            losses: list[float] = []
            if saved is not None:
                for part, network in networks.items():
                    set_peft_model_state_dict(network, saved["factors"][part], adapter_name=_ADAPTER)
                optimiser.load_state_dict(saved["optimiser"])
                losses += saved["losses"]
            interrupt = Interrupt()
            with interrupt.watching():
                for step in range(len(losses), self.config.steps):
                    losses.append(self._step(optimiser, factors, step, subject, prior))
                    if callback is not None:
                        callback(step + 1, self.config.steps, losses[-1])
                    last = step + 1 == self.config.steps
                    if last or interrupt.asked or (step + 1) % self.config.checkpoint_every == 0:
                        state = {"prior": prior, "losses": losses, "optimiser": optimiser.state_dict()}
                        training_state.save_state(folder, {**state, **self._identity(networks)})
                    if interrupt.asked and not last:
                        raise KeyboardInterrupt
            self._write(out, networks)
        return losses

    def _step(
        self,
        optimiser: torch.optim.Optimizer,
        factors: Sequence[nn.Parameter],
        step: int,
        subject: Tensor,
        prior: Tensor,
    ) -> float:
        """One update; all randomness comes from the step's number, so that a resumed training is the same."""
        draws = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        pools = [(subject, self.text, 1.0)]
        if self.config.prior_weight:
            pools.append((prior, self.class_text, self.config.prior_weight))
        loss = sum((self._loss(pool, text, draws) * weight for pool, text, weight in pools), torch.zeros(()))
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {float(loss.detach())} in step {step + 1}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimiser.step()
        return float(loss.detach())

    def _loss(self, pool: Tensor, text: str, draws: torch.Generator) -> Tensor:
        """Denoising loss on a batch from a pool of latents (n, c, h, w), on the CPU."""
        scheduler, count, device = self._scheduler, self.config.batch_size, self._pipe.unet.device
        latents = pool[torch.randint(len(pool), (count,), generator=draws)]
        noise = torch.randn(latents.shape, generator=draws)
        times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=draws)
        noisy = scheduler.add_noise(latents, noise, times)
        words = self._pipe.encode_prompt([text], device, 1, do_classifier_free_guidance=False)[0]
        predicted = self._pipe.unet(noisy.to(device), times.to(device), words.expand(count, -1, -1)).sample
        target = denoising_target(scheduler, latents, noise, times).to(device)
        return nn.functional.mse_loss(predicted.float(), target).cpu()

    @torch.no_grad()
    def _encode(self, pictures: Tensor) -> Tensor:
        """Latents on the CPU of pictures (n, 3, H, W) in 0..1."""
        vae = self._pipe.vae
        latents = [
            vae.encode((picture[None] * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
            for picture in pictures
        ]
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        encoded: Tensor = (torch.cat(latents).float().cpu() - shift) * vae.config.scaling_factor
        return encoded

    def _prior(self) -> Tensor:
        """Latents of pictures of the class that the base draws; none without prior preservation."""
        if not self.config.prior_weight:
            return torch.zeros(0)
        draws = torch.Generator().manual_seed(self.config.seed)
        parts = []
        for start in range(0, self.config.prior_pictures, _DRAWN_AT_ONCE):
            texts = [self.class_text] * min(_DRAWN_AT_ONCE, self.config.prior_pictures - start)
            drawn = self._pipe(texts, generator=draws, output_type="latent", **_PRIOR_DRAWING).images
            parts.append(drawn.float().cpu())
        return torch.cat(parts)

    @contextmanager
    def _adapters(self, networks: Mapping[str, Any]) -> Iterator[None]:
        """Fresh LoRA factors on both networks inside the `with` block."""
        rank = self.config.rank
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.config.seed)
                for part, network in networks.items():
                    settings = LoraConfig(
                        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS[part]
                    )
                    inject_adapter_in_model(settings, network, _ADAPTER)
            yield
        finally:
            self._pipe.unload_lora_weights()

    def _saved(self, folder: Path) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None."""
        saved = training_state.load_state(folder)
        if saved is None:
            return None
        different = training_state.differences(self._facts(), saved.get("facts", {}))
        if different:
            lines = "\n  - ".join([f"the checkpoint in {folder} is of another training", *different])
            raise TrainingError(f"{lines}\nChoose another folder, or begin anew (fresh).")
        return saved

    def _facts(self) -> dict[str, Any]:
        """What makes this training this training."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "checkpoint_every"}
        digest = hashlib.sha256(self._pictures.numpy().tobytes()).hexdigest()
        return {**settings, "text": self.text, "class_text": self.class_text, "pictures": digest}

    def _identity(self, networks: Mapping[str, Any]) -> dict[str, Any]:
        return {"facts": self._facts(), "factors": {part: _factors(n) for part, n in networks.items()}}

    def _write(self, out: Path, networks: Mapping[str, Any]) -> None:
        tensors = {
            f"{part}.{key}": value.to(torch.float16).contiguous()
            for part, network in networks.items()
            for key, value in _factors(network).items()
        }
        facts = {"mole.trigger": self.text, "mole.class": self.class_text, "mole.kind": "concept"}
        write_safetensors(out, tensors, {"format": "pt", **facts})


def _factors(network: Any) -> dict[str, Tensor]:
    """The LoRA's factors in a network, on the CPU, by PEFT's keys."""
    state = get_peft_model_state_dict(network, adapter_name=_ADAPTER)
    return {key: value.detach().cpu() for key, value in state.items()}

"""DreamBooth (Ruiz et al. 2023): one LoRA from a few pictures of a subject, ready as an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL.Image import Image
from torch import Tensor

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.core.files import check_writable
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.pictures.components import networks_of
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.files import pictures_digest
from mole_diffusion.pictures.training.denoising import NoisyBatch, denoising_loss
from mole_diffusion.pictures.training.workbench import picture_tensor
from mole_diffusion.training.loop import TrainingLoop
from mole_diffusion.training.objective import Losses, LossTerms, Parameters
from mole_diffusion.training.progress import HistoryRow, TrainingEvent
from mole_diffusion.training.settings import LoopSettings, check, number, positive, whole
from mole_diffusion.training.state import STATE_FILE, Preparation, frozen

_OF_A_TEXT_ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "text_encoder": _OF_A_TEXT_ENCODER,
    "text_encoder_2": _OF_A_TEXT_ENCODER,
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

    steps: int = whole(400)
    batch_size: int = whole(2)
    rank: int = whole(8)
    learning_rate: float = positive(1e-4)
    prior_weight: float = number(0.0)
    prior_pictures: int = whole(24)
    seed: int = whole(0, None)
    checkpoint_every: int = whole(100)

    def __post_init__(self) -> None:
        check(self)


class ExpertTrainer:
    """Trains a LoRA on UNet and text encoders of a pipeline, which is afterwards as it was.

    Args:
        pipe: a `StableDiffusionMoLEPipeline` or `StableDiffusionXLMoLEPipeline` without experts, in float32.
        pictures: pictures of the subject; their centre is taken.
        text: phrase with the trigger word, e.g. "a sks dog".
        class_text: the same in the base's words, "a dog"; needed for prior preservation.
        config: the settings; None is `ExpertTrainingConfig()`.

    Raises:
        ConfigError: no pictures, no text, or no class text where it is needed.
        TrainingError: the pipeline has experts or LoRAs, is of another family, or its scheduler cannot be
            trained with.
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
        if UNET not in networks_of(pipe):
            raise TrainingError(
                f"experts are trained here on Stable Diffusion 1, 2 and XL, and {type(pipe).__name__} is "
                "none: any program that trains LoRAs for it makes experts for it"
            )
        if hasattr(pipe.unet, "peft_config"):
            raise TrainingError("the pipeline has LoRAs loaded; unload_lora_weights() first")
        if not pictures or not text.strip():
            raise ConfigError(
                f"{len(pictures)} pictures of {text!r}; needed are pictures, and words for them"
            )
        if self.config.prior_weight and not class_text.strip():
            raise ConfigError("prior preservation draws pictures of the class: class_text is empty")
        self.text, self.class_text = text.strip(), class_text.strip()
        self._pipe = pipe
        self._denoiser = denoiser_of(pipe)
        self._denoiser.check_trainable()
        size = self._denoiser.picture_size
        self._digest = pictures_digest(pictures)
        self._pictures = torch.stack([picture_tensor(picture, size) for picture in pictures])

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
        check_writable(out.parent)
        preparation = Preparation(folder, self._facts())
        everything = self._denoiser.networks
        networks = {part: everything[part] for part in TARGETS if part in everything}
        going_on = not fresh and (folder / STATE_FILE).is_file()
        with frozen(everything.values()), self._adapters(networks):
            factors = {
                f"{part}.{name}": parameter
                for part, network in networks.items()
                for name, parameter in network.named_parameters()
                if parameter.requires_grad
            }
            rate = self.config.learning_rate
            loop = TrainingLoop(
                _SubjectObjective(
                    self._pipe, self._pictures, self.text, self.class_text, self.config, preparation
                ),
                Parameters(factors, lambda tensors: torch.optim.AdamW(tensors, lr=rate)),
                LoopSettings(
                    iterations=self.config.steps,
                    schedule="constant",
                    seed=self.config.seed,
                    checkpoint_every=self.config.checkpoint_every,
                    progress=False,
                ),
                facts=self._facts(),
                folder=folder,
                callback=None if callback is None else _telling(callback),
                what="steps",
                preparation=preparation,
            )
            history = self._run(loop, False if fresh else going_on or None)
            self._write(out, networks)
        return [row["loss"] for row in history]

    def _run(self, loop: TrainingLoop, going_on: bool | None) -> list[HistoryRow]:
        try:
            # Not None, which begins anew over another training's results.
            return loop.run(resume=going_on).history
        except TrainingError as error:
            if not going_on:
                raise
            raise TrainingError(f"{error}\nChoose another folder, or begin anew (fresh).") from error

    @contextmanager
    def _adapters(self, networks: Mapping[str, Any]) -> Iterator[None]:
        """Fresh LoRA factors on the networks inside the `with` block."""
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

    def _facts(self) -> dict[str, Any]:
        """What makes this training this training."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "checkpoint_every"}
        return {**settings, "text": self.text, "class_text": self.class_text, "pictures": self._digest}

    def _write(self, out: Path, networks: Mapping[str, Any]) -> None:
        tensors = {
            f"{part}.{key}": value.to(torch.float16).contiguous()
            for part, network in networks.items()
            for key, value in _factors(network).items()
        }
        facts = {"mole.trigger": self.text, "mole.class": self.class_text, "mole.kind": "concept"}
        write_safetensors(out, tensors, {"format": "pt", **facts})


def _telling(callback: Callback) -> Callable[[TrainingEvent], None]:
    """A callback of the loop; what the user's returns is no answer."""

    def tell(event: TrainingEvent) -> None:
        callback(event.iteration, event.iterations, event.row["loss"])

    return tell


class _SubjectObjective:
    """The denoising loss on pictures of the subject, and on pictures of its class that the base draws.

    All randomness comes from the step's number, so that a resumed training is the same.

    Args:
        pipe: the pipeline, with fresh factors on its networks.
        pictures: (n, 3, H, W) in 0..1, of the subject.
        text: the subject's words.
        class_text: words of its class.
        config: the settings.
        preparation: keeps what is drawn before the first step.
    """

    def __init__(
        self,
        pipe: Any,
        pictures: Tensor,
        text: str,
        class_text: str,
        config: ExpertTrainingConfig,
        preparation: Preparation,
    ) -> None:
        self._pipe, self._text, self._class_text, self._config = pipe, text, class_text, config
        self._denoiser = denoiser_of(pipe)
        # One by one: there may be many.
        self._subject = torch.cat([self._denoiser.encode(picture[None]).cpu() for picture in pictures])
        self._prior = torch.zeros(0)
        self._preparation = preparation

    def prepare(self) -> None:
        """Draw pictures of the class; fresh factors change nothing, so these are the base's."""
        if self._config.prior_weight:
            self._prior = self._draw_prior()

    def losses(self, iteration: int) -> Losses:
        """One loss and an update."""
        config = self._config
        draws = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        pools = [(self._subject, self._text, 1.0)]
        if config.prior_weight:
            pools.append((self._prior, self._class_text, config.prior_weight))
        loss = sum((self._loss(pool, text, draws) * weight for pool, text, weight in pools), torch.zeros(()))
        yield LossTerms(loss, {})

    def state_dict(self) -> dict[str, Any]:
        """Latents of the drawn pictures."""
        return {"prior": self._prior}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._prior = state["prior"]

    def _loss(self, pool: Tensor, text: str, draws: torch.Generator) -> Tensor:
        """Denoising loss on a batch from a pool of latents (n, c, h, w), on the CPU."""
        count = self._config.batch_size
        latents = pool[torch.randint(len(pool), (count,), generator=draws)]
        batch = NoisyBatch.draw(self._denoiser, latents, draws)
        words = self._denoiser.encode_texts([text])[[0] * count]
        prediction = self._denoiser.predict(batch.noisy, batch.times, words)
        return denoising_loss(prediction, batch.target).cpu()

    def _draw_prior(self) -> Tensor:
        """Latents of pictures of the class."""
        draws = torch.Generator().manual_seed(self._config.seed)
        starts = range(0, self._config.prior_pictures, _DRAWN_AT_ONCE)

        def restore(state: Tensor) -> None:
            draws.set_state(state)

        def make(index: int) -> Tensor:
            texts = [self._class_text] * min(_DRAWN_AT_ONCE, self._config.prior_pictures - starts[index])
            drawn: Tensor = self._pipe(texts, generator=draws, output_type="latent", **_PRIOR_DRAWING).images
            return drawn.float().cpu()

        return torch.cat(self._preparation.pieces(len(starts), make, draws.get_state, restore))


def _factors(network: Any) -> dict[str, Tensor]:
    """The LoRA's factors in a network, on the CPU, by PEFT's keys."""
    state = get_peft_model_state_dict(network, adapter_name=_ADAPTER)
    return {key: value.detach().cpu() for key, value in state.items()}

"""Training one concept from its pictures: what SVDiff, Textual Inversion and Custom Diffusion share."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.methods.job import ConceptRecipe, Job
from mole_diffusion.methods.prepared import describe_base, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from mole_diffusion.pictures.training import Concept
    from mole_diffusion.training.objective import Losses

#: Pictures of its class that the base draws to be kept as they are (prior preservation).
PRIOR_PICTURES = 16
#: Version of the training: results of another one are not taken from the cache.
_VERSION = 2


@dataclass(frozen=True)
class Captioned:
    """Latents (n, channels, h, w) and as many captions."""

    latents: Tensor
    captions: Sequence[str]

    def pick(self, count: int, draws: torch.Generator) -> tuple[Tensor, list[str]]:
        """`count` of them at random, with repetition."""
        chosen = torch.randint(len(self.captions), (count,), generator=draws)
        return self.latents[chosen], [self.captions[i] for i in chosen.tolist()]


class ConceptTrainer:
    """Trains something of a pipeline on the pictures of one concept at a time, and keeps the results.

    Args:
        method: name of the method.
        job: the preparation; UNet passes are counted into it.
        recipe: how to train.
    """

    def __init__(self, method: str, job: Job, recipe: ConceptRecipe) -> None:
        from mole_diffusion.pictures.denoisers import denoiser_of
        from mole_diffusion.pictures.training.workbench import Workbench

        self.method, self.job, self.recipe = method, job, recipe
        pictures = job.config.pictures.as_drawn_by(job.pipe)
        # What decides the pictures that the base draws.
        self._drawing = {"guidance": pictures.guidance, "sampling_steps": pictures.sampling_steps}
        denoiser = denoiser_of(job.pipe, pictures.size)
        self.bench = Workbench(denoiser, job.pipe.composing, pictures, recipe.seed)
        #: Loss of every step of the last training.
        self.losses: list[float] = []
        self._base = describe_base(job.pipe)

    def results(
        self, train: Callable[[ConceptTrainer, Concept], dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """What a method trains for each concept, by name; from the cache where it was trained before.

        Args:
            train: trains one concept, with the networks frozen and the experts off; returns tensors.
        """
        found = {}
        for name, concept in self.job.concepts.items():
            path = self._cached(concept)
            facts = path.with_suffix(".json")
            if path.is_file() and facts.is_file():
                record = json.loads(facts.read_text(encoding="utf-8"))
                passes = record["unet_passes"]
                self.job.earlier_seconds += record["seconds"]
            else:
                before, start = self.bench.counter.state_dict(), time.monotonic()
                tensors = train(self, concept)
                after = self.bench.counter.state_dict()
                passes = {key: after[key] - before[key] for key in self.job.passes}
                write_safetensors(path, {k: v.contiguous() for k, v in tensors.items()}, {"format": "pt"})
                seconds = round(time.monotonic() - start, 3)
                record = {"concept": name, "method": self.method, "unet_passes": passes, "seconds": seconds}
                write_json(facts, {**record, "losses": [round(loss, 5) for loss in self.losses]})
            for key in self.job.passes:
                self.job.passes[key] += passes[key]
            found[name] = load_file(path)
        return found

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Networks without gradient and without experts, pictures encoded at full precision."""
        from mole_diffusion.training.state import frozen

        with (
            frozen(self.bench.networks),
            # Not recomputed: the backward pass runs when what is trained is no longer in the networks.
            self.bench.denoiser.training(checkpointing=False, decodes=False),
            self.job.pipe.composing(mixture="none"),
        ):
            yield

    def pictures(self, concept: Concept) -> Captioned:
        """The concept's pictures with captions in its trigger words.

        Raises:
            ConfigError: the concept has no pictures.
        """
        pairs = self.job.captioned(concept)
        if not pairs:
            raise ConfigError(
                f"concept {concept.name!r} has no reference pictures; {self.method!r} is trained on them"
            )
        return Captioned(self._encode([picture for picture, _ in pairs]), [text for _, text in pairs])

    def prior(self, concept: Concept) -> Captioned | None:
        """Pictures of the concept's class as the base draws them; None where the recipe wants none."""
        if not self.recipe.prior:
            return None
        captions = [text for _, text in self.job.captioned(concept)]
        classes = [text.replace(concept.text, concept.class_text) for text in captions]
        classes = [classes[i % len(classes)] for i in range(PRIOR_PICTURES)]
        draws = torch.Generator().manual_seed(self.recipe.seed + 1)
        drawn = [
            self.bench.draw(classes[i : i + 8], draws, mixture="none") for i in range(0, len(classes), 8)
        ]
        return Captioned(self.bench.encode_pictures(torch.cat(drawn)).cpu(), classes)

    def fit(
        self,
        parameters: Sequence[Tensor],
        engaged: Callable[[], AbstractContextManager[None]],
        pictures: Captioned,
        prior: Captioned | None,
    ) -> None:
        """Minimise the denoising loss; it is in `losses` step by step.

        Args:
            parameters: what is trained.
            engaged: context in which the networks compute with the parameters; entered in every step.
            pictures: of the concept.
            prior: of its class.
        """
        from mole_diffusion.training.loop import TrainingLoop
        from mole_diffusion.training.objective import Parameters
        from mole_diffusion.training.settings import LoopSettings

        recipe = self.recipe
        learner = Parameters(
            {str(i): parameter for i, parameter in enumerate(parameters)},
            lambda tensors: torch.optim.Adam(tensors, lr=recipe.rate),
        )
        settings = LoopSettings(iterations=recipe.steps, seed=recipe.seed, gradient_clip=0, progress=False)
        objective = _ConceptObjective(self, engaged, pictures, prior)
        with torch.enable_grad():
            history = TrainingLoop(objective, learner, settings).run().history
        self.losses = [row["loss"] for row in history]

    def loss(self, pictures: Captioned, prior: Captioned | None, draws: torch.Generator) -> Tensor:
        """Mean squared error on pictures of the concept, plus that on pictures of its class."""
        from mole_diffusion.pictures.training.denoising import NoisyBatch, denoising_loss

        count = self.recipe.batch
        latents, captions = pictures.pick(count, draws)
        if prior is not None:
            others, other_captions = prior.pick(self.recipe.prior, draws)
            latents, captions = torch.cat([latents, others]), captions + other_captions
        batch = NoisyBatch.draw(self.bench.denoiser, latents, draws, self._times)
        prediction = self.bench.predict(batch, captions)
        loss = denoising_loss(prediction[:count], batch.target[:count])
        return loss if prior is None else loss + denoising_loss(prediction[count:], batch.target[count:])

    def _times(self, count: int, draws: torch.Generator) -> Tensor:
        """Times of the concept's pictures and of the others, (count,), each spread evenly over the schedule:
        the loss depends on them more than on all else.
        """
        parts = [self.recipe.batch, count - self.recipe.batch]
        shares = [
            (torch.randperm(n, generator=draws) + torch.rand(n, generator=draws)) / max(1, n) for n in parts
        ]
        return self.bench.denoiser.times_at(torch.cat(shares))

    def _encode(self, pictures: Sequence[Image]) -> Tensor:
        from mole_diffusion.pictures.training.workbench import picture_tensor

        size = self.bench.denoiser.picture_size
        pixels = torch.stack([picture_tensor(picture, size) for picture in pictures])
        return torch.cat([self.bench.encode_pictures(part).cpu() for part in torch.split(pixels, 8)])

    def _cached(self, concept: Concept) -> Path:
        facts = {
            "version": _VERSION,
            "method": self.method,
            "recipe": asdict(self.recipe),
            "base": self._base,
            "concept": [concept.name, concept.text, concept.class_text],
            "pictures": self.job.digest(concept),
            "size": self.bench.denoiser.picture_size,
            "prior": self._drawing if self.recipe.prior else None,
            "autocast": self.bench.settings.autocast,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder(self.job.options.cache) / self.method / f"{concept.name}-{digest}.safetensors"


class _ConceptObjective:
    """The denoising loss of a concept; keeps nothing, as its trainings are short.

    Args:
        trainer: whose recipe and workbench it uses.
        engaged: context in which the networks compute with what is trained.
        pictures: of the concept.
        prior: of its class.
    """

    def __init__(
        self,
        trainer: ConceptTrainer,
        engaged: Callable[[], AbstractContextManager[None]],
        pictures: Captioned,
        prior: Captioned | None,
    ) -> None:
        self._trainer, self._engaged = trainer, engaged
        self._pictures, self._prior = pictures, prior
        self._draws = torch.Generator().manual_seed(trainer.recipe.seed + 2)

    def prepare(self) -> None:
        """Nothing: the pictures are encoded."""

    def losses(self, iteration: int) -> Losses:
        """One loss and an update."""
        from mole_diffusion.training.objective import LossTerms

        with self._trainer.bench.autocast(), self._engaged():
            loss = self._trainer.loss(self._pictures, self._prior, self._draws)
        yield LossTerms(loss, {})

    def state_dict(self) -> dict[str, Any]:
        """The random generator."""
        return {"draws": self._draws.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self._draws.set_state(state["draws"])


def cache_folder(given: str | Path | None) -> Path:
    """Where trained concepts are kept: as given, else the user's cache folder."""
    if given is not None:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "mole_diffusion" / "concepts"

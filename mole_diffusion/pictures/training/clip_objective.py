"""Guidance by CLIP: the paper's objective, and the formula and walk of its released code for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.training.clip_guidance import ClipGuide, random_crops, random_views
from mole_diffusion.pictures.training.losses import crop_similarities, global_loss, local_loss, released_loss
from mole_diffusion.pictures.training.objectives import LossTerms
from mole_diffusion.pictures.training.sources import ConceptPictures
from mole_diffusion.pictures.training.workbench import Workbench

#: Shortest and longest walk of the released code, in steps of a 50-step schedule, and walked steps per
#: update.
WALK_STEPS = (20, 50)
WALK_UPDATE = 2


class ClipObjective:
    """CLIP guidance on pictures the gates draw.

    Args:
        bench: The shared workbench.
        pictures: Pictures of the concepts, the references of the local term.
        guide: The guiding CLIP.
    """

    def __init__(self, bench: Workbench, pictures: ConceptPictures, guide: ClipGuide) -> None:
        self._bench = bench
        self._pictures = pictures
        self._guide = guide
        self._references: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Features of the reference pictures; the pictures must be prepared."""
        with torch.no_grad():
            for name in self._bench.concepts:
                pictures = self._pictures.of(name).to(self._guide.device)
                self._references[name] = self._guide.pictures(pictures)

    def losses(self, iteration: int) -> Iterator[LossTerms]:
        """One loss after a rollout, or one for every step of a walk, with an update every two."""
        if self._bench.config.rollout == "walk":
            yield from self._walk()
        else:
            yield self._rollout()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the features follow from the pictures."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compute the features again."""
        self.prepare()

    def _batch(self) -> list[int]:
        bench = self._bench
        return [bench.draws.choices.randrange(len(bench.prompts)) for _ in range(bench.config.batch_size)]

    def _rollout(self) -> LossTerms:
        """Sample to a random step (10-90 % of the schedule) and judge the predicted clean picture."""
        bench, config = self._bench, self._bench.config
        prompts = self._batch()
        steps = config.sampling_steps
        first, last = round(0.1 * steps), max(round(0.1 * steps), round(0.9 * steps) - 1)
        target = bench.draws.choices.randint(first, last)
        with bench.autocast():
            text, empty = bench.encode_texts([bench.prompts[i].text for i in prompts])
            latents = bench.sampler.rollout(
                steps, target, config.truncated_steps, text, empty, bench.latent_shape, bench.draws.tensors
            )
            pictures = bench.decode(latents)
        return self.judge(pictures, prompts)

    def _walk(self) -> Iterator[LossTerms]:
        """The released code's walk from a renoised reference: every step with gradient, decoded, detached."""
        bench = self._bench
        prompts = self._batch()
        names = [bench.draws.choices.choice(bench.prompts[i].order) for i in prompts]
        sources = [self._pictures.of(name) for name in names]
        chosen = torch.stack([p[bench.draws.choices.randrange(len(p))] for p in sources])
        shortest, longest = WALK_STEPS
        length = bench.draws.choices.randint(shortest, longest)
        noise = bench.sampler.start(longest, len(prompts), bench.latent_shape, bench.draws.tensors)
        timesteps = bench.sampler.scheduler.timesteps[longest - length :]
        latents = bench.encode_pictures(chosen).to(noise.device)
        latents = bench.sampler.scheduler.add_noise(latents, noise, timesteps[:1]).to(noise.dtype)
        for position, timestep in enumerate(timesteps, start=1):
            with bench.autocast():
                text, empty = bench.encode_texts([bench.prompts[i].text for i in prompts])
                following, clean = bench.sampler.step(latents, timestep, text, empty)
                pictures = bench.decode(clean)
            terms = self.judge(pictures, prompts)
            latents = following.detach()
            update = position % WALK_UPDATE == 0 or position == len(timesteps)
            yield LossTerms(terms.loss / WALK_UPDATE, terms.parts, update)

    def judge(self, pictures: Tensor, prompts: list[int]) -> LossTerms:
        """The CLIP loss of pictures (batch, 3, H, W) in 0..1 drawn for the prompts of these indices."""
        if self._bench.config.objective == "released":
            return self._released(pictures, prompts)
        config, draws = self._bench.config, self._bench.draws.tensors
        whole = self._guide.texts([self._bench.prompts[i].class_text for i in prompts])
        batch = len(prompts)
        views = self._guide.windows(pictures, random_views(batch, config.views, draws))
        picture_loss = global_loss(views, whole)
        parts = {"global": float(picture_loss.detach())}
        crops = self._guide.windows(pictures, random_crops(batch, config.crops, draws))
        local, contrast = self._local(crops, prompts)
        parts |= {"local": float(local.detach()), "contrast": float(contrast.detach())}
        return LossTerms(config.global_weight * picture_loss + config.local_weight * local, parts)

    def _local(self, crops: Tensor, prompts: list[int]) -> tuple[Tensor, Tensor]:
        """The local term, picture by picture: their prompts may name different concepts."""
        terms = []
        for features, prompt in zip(crops, prompts, strict=True):
            names = self._bench.prompts[prompt].order
            texts = self._guide.texts([self._bench.concepts[name].class_text for name in names])
            similarities = crop_similarities(
                features[None], texts, [self._references[name] for name in names]
            )
            terms.append(torch.stack(local_loss(similarities, self._bench.config.contrast_weight)))
        local, contrast = torch.stack(terms).mean(dim=0)
        return local, contrast

    def _released(self, pictures: Tensor, prompts: list[int]) -> LossTerms:
        features = self._guide.pictures(pictures)
        terms = []
        for feature, index in zip(features, prompts, strict=True):
            prompt = self._bench.prompts[index]
            whole = self._guide.texts([prompt.class_text])
            names = self._guide.texts([self._bench.concepts[name].class_text for name in prompt.order])
            references = [self._references[name] for name in prompt.order]
            terms.append(released_loss(feature[None], whole, references, names))
        loss = torch.stack(terms).mean()
        return LossTerms(loss, {"released": float(loss.detach())})


class BothObjectives:
    """Collages from the start, CLIP guidance on top of them from the share ``clip_from`` of the iterations
    on.

    Args:
        bench: The shared workbench.
        first: The collage objective.
        second: The CLIP objective.
    """

    def __init__(self, bench: Workbench, first: Any, second: ClipObjective) -> None:
        self._bench = bench
        self._first = first
        self._second = second

    def prepare(self) -> None:
        """Prepare both."""
        self._first.prepare()
        self._second.prepare()

    def losses(self, iteration: int) -> Iterator[LossTerms]:
        """Both, for one update; in the first iterations the collage objective alone."""
        config = self._bench.config
        (collages,) = self._first.losses(iteration)
        alone = iteration < config.clip_from * config.iterations
        yield LossTerms(collages.loss, collages.parts, update=alone)
        if not alone:
            (guided,) = self._second.losses(iteration)
            yield LossTerms(config.clip_weight * guided.loss, guided.parts)

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"collage": self._first.state_dict(), "clip": self._second.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of both."""
        self._first.load_state_dict(state["collage"])
        self._second.load_state_dict(state["clip"])

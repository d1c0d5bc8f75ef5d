"""Guidance by CLIP: the paper's objective, and the formula and walk of its released code for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.training.clip_guidance import ClipGuide, random_crops, random_views
from mole_diffusion.pictures.training.losses import crop_similarities, global_loss, local_loss, released_loss
from mole_diffusion.pictures.training.sources import ConceptPictures
from mole_diffusion.pictures.training.tasks import Clip, ClipWalk
from mole_diffusion.pictures.training.workbench import Workbench
from mole_diffusion.training.objective import Losses, LossTerms, Objective

#: Shortest and longest walk of the released code, in steps of a 50-step schedule, and walked steps per
#: update.
WALK_STEPS = (20, 50)
WALK_UPDATE = 2


class _Guided:
    """What both objectives share: the features of the references, and how pictures are judged.

    Args:
        bench: The shared workbench.
        pictures: Pictures of the concepts, the references of the local term.
        settings: Batch, views, crops and weights.
        guide: The guiding CLIP.
    """

    def __init__(
        self, bench: Workbench, pictures: ConceptPictures, settings: Clip | ClipWalk, guide: ClipGuide
    ) -> None:
        self._bench = bench
        self._pictures = pictures
        self._settings = settings
        self._guide = guide
        self._references: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Features of the reference pictures; the pictures must be prepared."""
        with torch.no_grad():
            for name in self._subjects():
                pictures = self._pictures.of(name).to(self._guide.device)
                self._references[name] = self._guide.pictures(pictures)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the features follow from the pictures."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compute the features again."""
        self.prepare()

    def _subjects(self) -> list[str]:
        """What has a place in any prompt."""
        return list(dict.fromkeys(name for prompt in self._pictures.prompts for name in prompt.subjects))

    def _batch(self) -> list[int]:
        choose, count = self._bench.draws.choices, len(self._pictures.prompts)
        return [choose.randrange(count) for _ in range(self._settings.batch)]

    def _texts(self, prompts: list[int]) -> list[str]:
        return [self._pictures.prompts[i].text for i in prompts]

    def judge(self, pictures: Tensor, prompts: list[int]) -> LossTerms:
        """The CLIP loss of pictures (batch, 3, H, W) in 0..1 drawn for the prompts of these indices."""
        if self._settings.formula == "released":
            return self._released(pictures, prompts)
        settings, draws = self._settings, self._bench.draws.tensors
        whole = self._guide.texts([self._pictures.prompts[i].class_text for i in prompts])
        batch = len(prompts)
        views = self._guide.windows(pictures, random_views(batch, settings.views, draws))
        picture_loss = global_loss(views, whole)
        parts = {"global": float(picture_loss.detach())}
        crops = self._guide.windows(pictures, random_crops(batch, settings.crops, draws))
        local, contrast = self._local(crops, prompts)
        parts |= {"local": float(local.detach()), "contrast": float(contrast.detach())}
        return LossTerms(settings.global_weight * picture_loss + settings.local_weight * local, parts)

    def _local(self, crops: Tensor, prompts: list[int]) -> tuple[Tensor, Tensor]:
        """The local term, picture by picture: their prompts may name different concepts."""
        terms = []
        for features, prompt in zip(crops, prompts, strict=True):
            names = self._pictures.prompts[prompt].subjects
            texts = self._guide.texts([self._pictures.concepts[name].class_text for name in names])
            references = [self._references[name] for name in names]
            similarities = crop_similarities(features[None], texts, references, self._settings.local)
            terms.append(torch.stack(local_loss(similarities, self._settings.contrast_weight)))
        local, contrast = torch.stack(terms).mean(dim=0)
        return local, contrast

    def _released(self, pictures: Tensor, prompts: list[int]) -> LossTerms:
        features = self._guide.pictures(pictures)
        terms = []
        for feature, index in zip(features, prompts, strict=True):
            prompt = self._pictures.prompts[index]
            whole = self._guide.texts([prompt.class_text])
            names = self._guide.texts([self._pictures.concepts[name].class_text for name in prompt.subjects])
            references = [self._references[name] for name in prompt.subjects]
            terms.append(released_loss(feature[None], whole, references, names))
        loss = torch.stack(terms).mean()
        return LossTerms(loss, {"released": float(loss.detach())})


class ClipObjective(_Guided):
    """CLIP guidance on pictures the gates draw. Arguments: see `_Guided`."""

    def __init__(self, bench: Workbench, pictures: ConceptPictures, settings: Clip, guide: ClipGuide) -> None:
        super().__init__(bench, pictures, settings, guide)
        self._truncated = settings.truncated_steps

    def losses(self, iteration: int) -> Losses:
        """Sample to a random step (10-90 % of the schedule) and judge the predicted clean picture."""
        bench = self._bench
        prompts = self._batch()
        steps = bench.settings.sampling_steps
        first, last = round(0.1 * steps), max(round(0.1 * steps), round(0.9 * steps) - 1)
        target = bench.draws.choices.randint(first, last)
        with bench.autocast():
            text, empty = bench.encode_texts(self._texts(prompts))
            latents = bench.sampler.rollout(steps, target, self._truncated, text, empty, bench.draws.tensors)
            pictures = bench.decode(latents)
        yield self.judge(pictures, prompts)


class ClipWalkObjective(_Guided):
    """CLIP guidance along the walk of the authors' code. Arguments: see `_Guided`."""

    def losses(self, iteration: int) -> Losses:
        """Walk from a renoised reference: every step with gradient, then detached; an update every two."""
        bench = self._bench
        prompts = self._batch()
        names = [bench.draws.choices.choice(self._pictures.prompts[i].subjects) for i in prompts]
        sources = [self._pictures.of(name) for name in names]
        chosen = torch.stack([p[bench.draws.choices.randrange(len(p))] for p in sources])
        shortest, longest = WALK_STEPS
        length = bench.draws.choices.randint(shortest, longest)
        times = bench.denoiser.schedule(longest)[longest - length :]
        noise = bench.sampler.noise(len(prompts), bench.draws.tensors)
        latents = bench.encode_pictures(chosen).to(noise.device)
        latents = bench.denoiser.noisy(latents, noise, times[:1]).to(noise.dtype)
        for position, time in enumerate(times, start=1):
            with bench.autocast():
                text, empty = bench.encode_texts(self._texts(prompts))
                following, clean = bench.sampler.step(latents, time, text, empty)
                pictures = bench.decode(clean)
            terms = self.judge(pictures, prompts)
            latents = following.detach()
            update = position % WALK_UPDATE == 0 or position == len(times)
            yield LossTerms(terms.loss / WALK_UPDATE, terms.parts, update)


class BothObjectives:
    """One objective from the start, another on top of it later.

    Args:
        first: The collage objective; one loss an iteration.
        second: The CLIP objective; one loss an iteration.
        first_iteration: From which the second counts, from 0.
        weight: Weight of the second.
    """

    def __init__(self, first: Objective, second: Objective, first_iteration: float, weight: float) -> None:
        self._first, self._second = first, second
        self._first_iteration, self._weight = first_iteration, weight

    def prepare(self) -> None:
        """Prepare both."""
        self._first.prepare()
        self._second.prepare()

    def losses(self, iteration: int) -> Losses:
        """Both, for one update; in the first iterations the first alone."""
        (first,) = self._first.losses(iteration)
        alone = iteration < self._first_iteration
        yield LossTerms(first.loss, first.parts, update=alone)
        if not alone:
            (second,) = self._second.losses(iteration)
            yield LossTerms(self._weight * second.loss, second.parts)

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"collage": self._first.state_dict(), "clip": self._second.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of both."""
        self._first.load_state_dict(state["collage"])
        self._second.load_state_dict(state["clip"])

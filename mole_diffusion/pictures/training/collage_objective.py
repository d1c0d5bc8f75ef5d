"""The collage objective: denoise cut-and-mixed pictures of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.training import collage
from mole_diffusion.pictures.training.concepts import read_prompt
from mole_diffusion.pictures.training.denoising import NoisyBatch, Times, denoising_loss
from mole_diffusion.pictures.training.sources import ConceptPictures
from mole_diffusion.pictures.training.tasks import Collage
from mole_diffusion.pictures.training.teaching import Teacher
from mole_diffusion.pictures.training.workbench import Workbench
from mole_diffusion.training.objective import Losses, LossTerms


class CollageObjective:
    """Denoising loss on cut-and-mixed pictures of the experts, captioned with the joint prompt.

    No base draws any number of objects, and gates cannot learn a picture the base has no way to. A prompt
    with more than `settings.objects` concepts is learned in parts of so many, drawn at random.

    One pass with gradient per iteration; no sampling, decoding or CLIP. Collages wait as latents in a
    pool, part of which is made anew every few iterations.

    Args:
        bench: The shared workbench.
        pictures: Pictures of the concepts.
        settings: How collages are made.
        iterations: Of the training; a short one has no use for a whole pool.
    """

    def __init__(
        self, bench: Workbench, pictures: ConceptPictures, settings: Collage, iterations: int
    ) -> None:
        self._bench = bench
        self._settings = settings
        self._pictures = pictures
        self._teacher = Teacher(bench, pictures.concepts)
        self._size = min(settings.pool_size, settings.batch * iterations)
        self._latents = torch.zeros(0)
        self._covers = torch.zeros(0)
        self._captions: list[str] = []
        self._next = 0

    def prepare(self) -> None:
        """Make the first pool. The pictures must be prepared."""
        channels, height, width = self._bench.denoiser.latent_shape
        self._latents = torch.zeros(0, channels, height, width)
        # As many subjects as any collage may have.
        self._covers = torch.zeros(0, len(self._pictures.concepts), height, width)
        self._captions, self._next = [], 0
        self._fill()

    def losses(self, iteration: int) -> Losses:
        """The denoising loss of a batch from the pool."""
        bench, settings = self._bench, self._settings
        self._fill()  # the checkpoint may be of a shorter training
        if iteration and iteration % settings.redraw_every == 0:
            entries = [(self._next + i) % self._size for i in range(settings.batch)]
            self._next = (self._next + settings.batch) % self._size
            self._renew(entries)
        chosen = torch.randperm(self._size, generator=bench.draws.tensors)[: settings.batch]
        taught = settings.target == "experts"
        times = self._teacher.times if taught else bench.denoiser.random_times
        batch = NoisyBatch.draw(
            bench.denoiser, self._latents[chosen], bench.draws.tensors, self._drawing(times)
        )
        covers = self._covers[chosen].to(bench.device)
        inside = covers.sum(dim=1, keepdim=True)
        captions = [self._captions[i] for i in chosen.tolist()]
        # Before the other: the balance is that of the last forward.
        target = self._teacher.target(batch, captions, covers) if taught else batch.target
        prior = self._base_prediction(batch, captions)
        # Around the backward pass too, in which networks may be asked again.
        with self._composing():
            with bench.autocast():
                prediction = self._predict(batch, self._some_empty(captions))
            weights = settings.outside_weight + (1 - settings.outside_weight) * inside
            loss = denoising_loss(prediction, target, weights)
            parts = {"collage": float(loss.detach())}
            if prior is not None:
                distance = denoising_loss(prediction, prior, 1 - inside)
                parts["prior"] = float(distance.detach())
                loss = loss + settings.prior_weight * distance
            yield LossTerms(loss, parts)

    def _drawing(self, times: Times) -> Times:
        """How times are drawn for a batch."""
        return times

    def _composing(self) -> AbstractContextManager[Any]:
        """How experts count in what is trained: as the trainer has chosen."""
        return nullcontext()

    def _predict(self, batch: NoisyBatch, captions: Sequence[str]) -> Tensor:
        """What the network says, with gradient."""
        return self._bench.predict(batch, captions)

    def state_dict(self) -> dict[str, Any]:
        """The pool."""
        return {
            "latents": self._latents,
            "covers": self._covers,
            "captions": list(self._captions),
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The pool of a checkpoint."""
        self._latents, self._covers = state["latents"], state["covers"]
        self._captions, self._next = list(state["captions"]), int(state["next"])

    def make_collage(self, prompt: int) -> tuple[collage.Collage, str]:
        """Mix a new collage for the prompt of this index, at random; with its caption."""
        bench, settings = self._bench, self._settings
        choose = bench.draws.choices
        whole = self._pictures.prompts[prompt]
        order = self._part(whole.subjects)
        caption = whole.only([shown for name in order for shown in whole.together(name)])
        indices = [choose.randrange(len(self._pictures.of(name, prompt))) for name in order]
        sources = [self._pictures.of(name, prompt)[i] for name, i in zip(order, indices, strict=True)]
        if choose.choice(settings.layouts) == "strips":
            return collage.mix_strips(sources, settings.seam), caption
        drawn = self._pictures.of("", prompt) if settings.background == "base" else torch.stack(sources)
        background = collage.edge_background(drawn[choose.randrange(len(drawn))])
        cutouts = [self._pictures.cutout(name, prompt, i) for name, i in zip(order, indices, strict=True)]
        boxes = collage.jitter_boxes(self._boxes(len(order)), settings.box_jitter, choose)
        return collage.mix_scene(background, cutouts, boxes, settings.seam), caption

    def _part(self, order: Sequence[str]) -> Sequence[str]:
        """The concepts of a collage, in the order of the prompt."""
        settings = self._settings
        if len(order) <= max(settings.objects, len(settings.boxes or ())):
            return order
        chosen = self._bench.draws.choices.sample(order, settings.objects)
        return [name for name in order if name in chosen]

    def _boxes(self, count: int) -> tuple[collage.Box, ...]:
        boxes = self._settings.boxes
        return boxes if boxes is not None and len(boxes) == count else collage.scene_boxes(count)

    def _fill(self) -> None:
        """Add what is missing in the pool."""
        while (first := len(self._captions)) < self._size:
            entries = range(first, min(first + self._settings.batch, self._size))
            self._latents, self._covers = (
                torch.cat([pool, pool.new_zeros(len(entries), *pool.shape[1:])])
                for pool in (self._latents, self._covers)
            )
            self._captions += [""] * len(entries)
            self._renew(list(entries))

    def _renew(self, entries: list[int]) -> None:
        prompts = [self._bench.draws.choices.randrange(len(self._pictures.prompts)) for _ in entries]
        collages, captions = zip(*(self.make_collage(prompt) for prompt in prompts), strict=True)
        latents = self._bench.encode_pictures(torch.stack([made.pixels for made in collages]))
        size = self._latents.shape[-2:]
        self._latents[entries] = latents.cpu()
        self._covers[entries] = 0
        for entry, caption, made in zip(entries, captions, collages, strict=True):
            covers = torch.nn.functional.interpolate(made.covers[None], size=size, mode="area")[0]
            self._covers[entry, : len(covers)] = covers
            self._captions[entry] = caption

    def _some_empty(self, captions: list[str]) -> list[str]:
        share, choose = self._settings.empty_prompts, self._bench.draws.choices
        return ["" if choose.random() < share else caption for caption in captions]

    def _base_prediction(self, batch: NoisyBatch, captions: list[str]) -> Tensor | None:
        """What the base alone predicts for the captions in class words; None where nothing asks for it."""
        if self._settings.prior_weight == 0:
            return None
        captions = [read_prompt(caption, self._pictures.concepts).class_text for caption in captions]
        with torch.no_grad(), self._bench.composing(mixture="none"), self._bench.autocast():
            return self._bench.predict(batch, captions)

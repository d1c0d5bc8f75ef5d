"""What the experts alone say of a collage: a target in place of the pictures themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.training.concepts import Concept, TrainingPrompt, read_prompt
from mole_diffusion.pictures.training.denoising import NoisyBatch
from mole_diffusion.pictures.training.workbench import Workbench


class Teacher:
    """Asks each expert alone what it predicts where its subject stands, and the base what it does elsewhere.

    A network that was distilled to few steps does not say what the loss on pictures asks for, and gates that
    are trained on that loss learn to undo the distillation. What it says with one expert is what it should
    say there with all of them.

    Args:
        bench: The shared workbench.
        concepts: The concept of each expert.
    """

    def __init__(self, bench: Workbench, concepts: Mapping[str, Concept]) -> None:
        self._bench, self._concepts = bench, concepts

    def times(self, count: int, draws: torch.Generator) -> Tensor:
        """Times (count,) of the steps that are drawn with: networks of few steps know no others."""
        bench = self._bench
        known = bench.denoiser.schedule(bench.settings.sampling_steps).cpu()
        return known[torch.randint(len(known), (count,), generator=draws)]

    @torch.no_grad()
    def target(self, batch: NoisyBatch, captions: Sequence[str], covers: Tensor) -> Tensor:
        """What a network should say of a batch.

        Args:
            batch: noisy collages; their own target does not count.
            captions: of the collages.
            covers: (batch, subjects, h, w), the share of each place that is a subject's, by the order of the
                subjects in the caption; 0 behind the last.

        Returns:
            (batch, c, h, w).
        """
        read = [read_prompt(caption, self._concepts) for caption in captions]
        target = torch.zeros_like(batch.target)
        for rows, place, mixture in self._asked(read):
            texts = [captions[row] for row in rows]
            share = 1 - covers[rows].sum(dim=1) if place is None else covers[rows, place]
            if place is None and mixture == {"mixture": "none"}:
                texts = [read[row].class_text for row in rows]
            if float(share.max()) > 0:
                said = self._ask(batch, rows, texts, mixture)
                target[rows] += share[:, None].to(said) * said
        return target

    def _ask(
        self, batch: NoisyBatch, rows: list[int], texts: Sequence[str], mixture: Mapping[str, Any]
    ) -> Tensor:
        some = batch[rows]
        with self._bench.composing(**mixture), self._bench.autocast():
            return self._bench.predict(some, texts).to(batch.target)

    def _asked(
        self, read: Sequence[TrainingPrompt]
    ) -> Iterator[tuple[list[int], int | None, dict[str, Any]]]:
        """Rows of the batch, the place of a subject (None for all else), and who is asked there."""
        groups: dict[tuple[int | None, tuple[str, ...]], list[int]] = {}
        for row, prompt in enumerate(read):
            for number, subject in enumerate(prompt.subjects):
                groups.setdefault((number, prompt.together(subject)), []).append(row)
            groups.setdefault((None, prompt.styles), []).append(row)
        for (place, names), rows in groups.items():
            yield rows, place, _counting(names, share=place is None)


def _counting(names: Sequence[str], *, share: bool) -> dict[str, Any]:
    """Arguments of `composing` for some experts together; `share`: their weights sum to 1."""
    if not names:
        return {"mixture": "none"}
    if len(names) == 1:
        return {"active_experts": list(names)}
    return {"mixture": dict.fromkeys(names, 1.0 / len(names) if share else 1.0)}

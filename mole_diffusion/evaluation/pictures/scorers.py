"""The networks that score pictures: open_clip models, a DINO through timm, and the starter's judge."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.pictures.metrics import (
    CONFUSED,
    OMITTED,
    PRESENT,
    STYLED,
    best_crop_alignment,
    crop_boxes,
    image_alignment,
    text_alignment,
    verdict,
)
from mole_diffusion.evaluation.pictures.protocol import Clip, Metrics
from mole_diffusion.evaluation.pictures.sets import CAPTIONS
from mole_diffusion.pictures.training.concepts import Concept
from mole_diffusion.starter.location import evaluation_part

#: Pictures per forward of a scoring network.
_BATCH = 64

Scores = dict[str, Any]


class Scorer(Protocol):
    """Measures pictures of one prompt.

    Attributes:
        measures: names of what it measures.
    """

    measures: tuple[str, ...]

    @property
    def hashes(self) -> frozenset[str]:
        """The network's numbers; see `tower_hashes`."""

    def __call__(
        self, pictures: Sequence[Image], captions: Mapping[str, str], concepts: Mapping[str, Concept]
    ) -> list[Scores]:
        """One dictionary per picture: measure -> number, or measure -> concept -> number.

        Args:
            pictures: of one prompt.
            captions: the prompt in words, by the measure that compares with it ("text", "described").
            concepts: what to look for, by name.
        """


def make_scorers(metrics: Metrics, device: torch.device) -> list[Scorer]:
    """The scorers of a protocol.

    Raises:
        ConfigError: a network that cannot be loaded.
    """
    scorers: list[Scorer] = []
    for index, clip in enumerate(metrics.clip):
        scorers.append(ClipScorer(clip, device, suffix=f"_{index + 1}" if index else "", crops=metrics.crops))
    if metrics.dino is not None:
        scorers.append(DinoScorer(metrics.dino, device, crops=metrics.crops))
    if metrics.judge is not None:
        scorers.append(JudgeScorer())
    return scorers


class _Features(ABC):
    """Features of pictures, of their windows, and (remembered) of the references of concepts."""

    def __init__(self, model: Any, device: torch.device, preprocess: Any) -> None:
        self.model, self.device = model, device
        self._preprocess = preprocess
        self._references: dict[str, tuple[Concept, Tensor]] = {}

    @abstractmethod
    def _encode(self, batch: Tensor) -> Tensor:
        """(N, d) of preprocessed pictures."""

    @cached_property
    def hashes(self) -> frozenset[str]:
        """See `tower_hashes`."""
        return tower_hashes(self.model)

    def of(self, pictures: Sequence[Image]) -> Tensor:
        """(len(pictures), d)."""
        stacked = torch.stack([self._preprocess(picture.convert("RGB")) for picture in pictures])
        with torch.no_grad():
            parts = [
                self._encode(part.to(self.device)).float().cpu() for part in torch.split(stacked, _BATCH)
            ]
        return torch.cat(parts)

    def of_windows(self, pictures: Sequence[Image], whole: Tensor) -> Tensor:
        """(len(pictures), W, d): the whole picture, whose features are there already, and its crops."""
        boxes = crop_boxes(*pictures[0].size)
        crops = self.of([picture.crop(box) for picture in pictures for box in boxes])
        return torch.cat([whole[:, None], crops.view(len(pictures), len(boxes), -1)], dim=1)

    def of_references(self, concept: Concept) -> Tensor:
        """(R, d)."""
        known = self._references.get(concept.name)
        if known is None or known[0] is not concept:
            known = self._references[concept.name] = concept, self.of(concept.references)
        return known[1]

    def alignments(
        self, pictures: Sequence[Image], concepts: Mapping[str, Concept], names: Sequence[str]
    ) -> tuple[Tensor, list[Scores]]:
        """Features of the pictures, and their alignment with the concepts that have references.

        Args:
            names: of the measures: of the whole picture, and of the best crop where that is wanted.
        """
        whole = self.of(pictures)
        shown = {
            name: self.of_references(concept) for name, concept in concepts.items() if concept.references
        }
        if not shown:
            return whole, [{} for _ in pictures]
        tables = {names[0]: {name: image_alignment(whole, known) for name, known in shown.items()}}
        if len(names) > 1:
            windows = self.of_windows(pictures, whole)
            tables[names[1]] = {name: best_crop_alignment(windows, known) for name, known in shown.items()}
        return whole, [
            {
                measure: {name: float(values[index]) for name, values in table.items()}
                for measure, table in tables.items()
            }
            for index in range(len(pictures))
        ]


class ClipScorer(_Features):
    """Text alignment, and image alignment of whole pictures and best crops, by one open_clip model.

    Args:
        clip: name such as "ViT-B-16" with its weights as a pair, "hf-hub:...", "local-dir:...", or "starter".
        device: where it runs.
        suffix: of the measures' names, for a second CLIP.
        crops: whether to look at crops.

    Raises:
        ConfigError: open_clip has no such model.
    """

    def __init__(self, clip: Clip, device: torch.device, *, suffix: str = "", crops: bool = True) -> None:
        self.clip = clip
        model, preprocess, self._tokenise = load_clip(clip, device)
        super().__init__(model, device, preprocess)
        self._suffix = suffix
        self.measures = tuple(f"{name}{suffix}" for name in (*CAPTIONS, "image", "crop")[: 4 if crops else 3])
        self._texts: dict[str, Tensor] = {}

    def _encode(self, batch: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(batch)
        return features

    def of_text(self, text: str) -> Tensor:
        """(1, d)."""
        if text not in self._texts:
            with torch.no_grad():
                features = self.model.encode_text(self._tokenise([text]).to(self.device))
            self._texts[text] = features.float().cpu()
        return self._texts[text]

    def __call__(
        self, pictures: Sequence[Image], captions: Mapping[str, str], concepts: Mapping[str, Concept]
    ) -> list[Scores]:
        """See `Scorer`: "text", "described", "image" and "crop"."""
        whole, scores = self.alignments(pictures, concepts, self.measures[len(CAPTIONS) :])
        for measure, text in captions.items():
            alignment = text_alignment(whole, self.of_text(text).expand_as(whole)).tolist()
            for row, value in zip(scores, alignment, strict=True):
                row[f"{measure}{self._suffix}"] = value
        return scores


class DinoScorer(_Features):
    """Image alignment by a self-supervised network (DINO, in DreamBooth's evaluation), through timm.

    Raises:
        ConfigError: timm has no such model, or its weights cannot be had.
    """

    def __init__(self, name: str, device: torch.device, *, crops: bool = True) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        try:
            model = timm.create_model(name, pretrained=True, num_classes=0).to(device).eval()
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"dino is {name!r}, which timm cannot load: {error}") from error
        super().__init__(model, device, create_transform(**resolve_model_data_config(model)))
        self.measures: tuple[str, ...] = ("dino", "dino_crop") if crops else ("dino",)

    def _encode(self, batch: Tensor) -> Tensor:
        features: Tensor = self.model(batch)
        return features

    def __call__(
        self, pictures: Sequence[Image], captions: Mapping[str, str], concepts: Mapping[str, Concept]
    ) -> list[Scores]:
        """See `Scorer`: "dino" and "dino_crop"."""
        return self.alignments(pictures, concepts, self.measures)[1]


class JudgeScorer:
    """Presence, omission and confusion of subjects by the starter's judge.

    Measures per subject: "present", "confused", "omitted" (exactly one is 1); per style "styled"; and for the
    whole picture "others": classes the judge sees that nobody asked for.
    """

    def __init__(self) -> None:
        from mole_diffusion.starter.judge import Judge

        self._judge = Judge(evaluation_part("judge"))
        self.measures: tuple[str, ...] = (PRESENT, CONFUSED, OMITTED, STYLED, "others")

    @cached_property
    def hashes(self) -> frozenset[str]:
        """See `tower_hashes`."""
        return tower_hashes(self._judge.network)

    def __call__(
        self, pictures: Sequence[Image], captions: Mapping[str, str], concepts: Mapping[str, Concept]
    ) -> list[Scores]:
        """See `Scorer`; concepts that the judge does not know have no entry."""
        styles = [name for name in concepts if name in self._judge.styles]
        known = [name for name in concepts if f"subject:{name}" in self._judge.labels]
        rows = []
        for labels in self._judge(pictures):
            found = {name: verdict(labels, name, f"subject:{name}") for name in known}
            row: Scores = {
                outcome: {name: int(said == outcome) for name, said in found.items()}
                for outcome in (PRESENT, CONFUSED, OMITTED)
            }
            if styles:
                row[STYLED] = {name: int(f"style:{name}" in labels) for name in styles}
            classes = {label for label in labels if not label.startswith(("subject:", "style:"))}
            rows.append({**row, "others": len(classes - {*concepts})})
        return rows


def load_clip(clip: Clip, device: torch.device) -> tuple[Any, Any, Any]:
    """Model, preprocessing and tokenizer of open_clip.

    Raises:
        ConfigError: there is no such model.
    """
    import open_clip

    name, weights = (clip, None) if isinstance(clip, str) else clip
    if name == "starter":
        name = f"local-dir:{evaluation_part('clip_eval')}"
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=weights, device=device)
        tokenise = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"clip is {clip!r}, which open_clip cannot load: {error}") from error
    return model.eval(), preprocess, tokenise


def tower_hashes(model: nn.Module) -> frozenset[str]:
    """A hash of the picture tower and one of the rest (text), by their numbers alone.

    Names and the order of the weights do not count, and single or half precision neither: a renamed copy of
    a network has the hashes of the original.
    """
    towers: dict[bool, list[str]] = {True: [], False: []}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            numbers = tensor.detach().cpu().half().contiguous().numpy().tobytes()
            towers[name.startswith("visual.")].append(hashlib.sha256(numbers).hexdigest())
    return frozenset(
        hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
        for digests in towers.values()
        if digests
    )

"""`mixture="auto"`: experts find their words and their places by the prompt, without trained gates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mole_diffusion.core.auto import Auto, AutoSettings
from mole_diffusion.core.calling import Calling
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.phrases import names_phrase
from mole_diffusion.core.words import places_of
from mole_diffusion.pictures.choosing import Request, register
from mole_diffusion.pictures.components import tokenizers_of

logger = logging.getLogger(__name__)

AUTO = "auto"


def usual_mixture(ensemble: Ensemble) -> str:
    """What a call without `mixture` is drawn with; see `WithExperts.usual_mixture`."""
    mixtures = ensemble.mixtures.values()
    trained = any(one.is_trained for one in mixtures)
    able = all(one.finds_places for one in mixtures if one.in_picture)
    return AUTO if able and not trained and len(ensemble.experts) > 1 else "gates"


def usual_for(ensemble: Ensemble, given: Mapping[str, Any]) -> str:
    """What a call with these arguments is drawn with, where they name no mixture."""
    usual = usual_mixture(ensemble)
    if usual == AUTO and given.get("prompt") is None:
        logger.warning(
            "the gates are not trained, and embeddings in place of a prompt do not say whose words they"
            " are: every expert counts the same everywhere"
        )
        return "gates"
    return usual


@dataclass(frozen=True)
class AutoMixture:
    """Gates without training, as what `pipe(prompt, mixture=...)` means.

    Attributes:
        settings: how image tokens are shared out.
        phrases: expert name -> the phrase that calls it in prompts, for files that do not say one.
        styles: names of experts that change the whole picture, for files that do not say so.
    """

    settings: AutoSettings = field(default_factory=AutoSettings)
    phrases: Mapping[str, str] = field(default_factory=dict)
    styles: Sequence[str] = ()

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Raises:
            NoExpertsError, UnknownExpertError, AllExpertsMaskedError, RegionMaskError: as for any mixture.
        """
        pipe.need_experts("mixture='auto'")
        for name in (*self.phrases, *self.styles):
            if name not in pipe.experts:
                raise UnknownExpertError(name, list(pipe.experts))
        active = pipe.experts if request.active_experts is None else request.active_experts
        counting = {name: expert for name, expert in pipe.experts.items() if name in active}
        reader = PromptReader(
            Calling(self.phrases, self.styles), self.settings, counting, tokenizers_of(pipe)
        )
        choice = Choice(
            request.active_experts,
            request.expert_scales,
            request.region_masks,
            request.latent_size,
            auto=reader,
        )
        with pipe.ensemble.choosing(choice):
            yield


class PromptReader(Auto):
    """What the prompts of a call say of the experts.

    Args:
        calling: how prompts call experts.
        settings: how image tokens are shared out.
        experts: those that count.
        tokenizers: by part.
    """

    def __init__(
        self,
        calling: Calling,
        settings: AutoSettings,
        experts: Mapping[str, Expert],
        tokenizers: Mapping[str, Any],
    ) -> None:
        self._calling, self._experts, self._tokenizers = calling, experts, tokenizers
        calls = {name: calling.of(expert) for name, expert in experts.items()}
        super().__init__(
            {
                part: {name: [_tokens(tokenizer, one) for one in own] for name, own in calls.items()}
                for part, tokenizer in tokenizers.items()
            },
            settings=settings,
        )

    def read(self, prompts: Sequence[str]) -> None:
        """Find out which experts count, and which of them everywhere.

        An expert that the prompt does not name is left out, unless nobody says how to name it.
        """
        calls = {name: self._calling.of(expert) for name, expert in self._experts.items()}
        named = [
            name
            for name, own in calls.items()
            if any(names_phrase(text, phrase) for text in prompts for phrase in own)
        ]
        self.everywhere = self._calling.everywhere(named, self._experts)
        if not named and not self.everywhere:
            logger.warning(
                "the prompt names none of the experts, which count for nothing: write %s",
                ", ".join(repr(own[0]) for own in calls.values()),
            )

    def note(
        self, pipe: Any, texts: Sequence[str], embeddings: Tensor, prompts: Sequence[bool | None]
    ) -> None:
        """Note what the pipeline's text encoders made of texts.

        Args:
            pipe: the pipeline.
            texts: prompts or negative prompts.
            embeddings: (B, L, d), several in a row for each text.
            prompts: which of the texts are prompts, see `KnownText`.
        """
        part, tokenizer = next(iter(self._tokenizers.items()))
        if hasattr(pipe, "maybe_convert_prompt"):
            texts = pipe.maybe_convert_prompt(list(texts), tokenizer)
        ids = tokenizer(
            list(texts),
            padding="max_length",
            max_length=embeddings.shape[1],
            truncation=True,
            return_tensors="pt",
        ).input_ids
        order = list(pipe.experts)
        found = places_of(ids, {name: self.phrases[part].get(name, ()) for name in order})
        times = len(embeddings) // len(texts)
        self.remember(
            embeddings,
            found.repeat_interleave(times, dim=0),
            [kind for kind in prompts for _ in range(times)],
        )


def read_prompts(pipe: Any, given: Mapping[str, Any]) -> PromptReader | None:
    """Lets `mixture="auto"` read the texts that a pipeline is about to encode; None where it does not count.

    Args:
        pipe: the pipeline.
        given: arguments of its `encode_prompt`.
    """
    reader = pipe.ensemble.choice.auto
    if not isinstance(reader, PromptReader):
        return None
    texts = [one for name in ("prompt", "prompt_2") for one in _texts(given.get(name))]
    if texts:
        reader.read(texts)
    return reader


def note_prompts(pipe: Any, reader: PromptReader, given: Mapping[str, Any], encoded: Any) -> None:
    """Note what a pipeline's text encoders made of texts.

    Args:
        pipe, given: as in `read_prompts`.
        reader: what that returned.
        encoded: what the pipeline's `encode_prompt` returned.
    """
    texts = {name: _texts(given.get(name)) for name in ("prompt", "negative_prompt")}
    if not texts["negative_prompt"] and given.get("negative_prompt_embeds") is None:
        texts["negative_prompt"] = [""]
    for (name, own), embeddings in zip(texts.items(), encoded, strict=False):
        if own and isinstance(embeddings, Tensor) and embeddings.dim() == 3:
            # One that is both cannot be told apart where the denoiser reads it.
            both = [text for text in own if all(text in others for others in texts.values())]
            reader.note(pipe, own, embeddings, [None if one in both else name == "prompt" for one in own])


def _texts(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _tokens(tokenizer: Any, phrase: str) -> list[int]:
    ids: list[int] = tokenizer(phrase, add_special_tokens=False).input_ids
    return ids


register(AUTO, AutoMixture())

"""`mixture="auto"`: experts find their words and their places by the prompt, without trained gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.core.words import places_of
from mole_diffusion.pictures.choosing import Request, register
from mole_diffusion.pictures.components import tokenizers_of
from mole_diffusion.pictures.prompt_words import Runs, TextLayout, WordPlaces, layout_of, watched_tokens

logger = logging.getLogger(__name__)

AUTO = "auto"
# Arguments of calls and of `encode_prompt`; each is what the first is, where it is not given.
_PROMPTS = ("prompt", "prompt_2", "prompt_3")
_NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


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
        shared: what refines the weights; None for what the pipeline has, see `load_shared_gates`.
    """

    settings: AutoSettings = field(default_factory=AutoSettings)
    phrases: Mapping[str, str] = field(default_factory=dict)
    styles: Sequence[str] = ()
    shared: SharedGates | None = None

    @contextmanager
    def engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        """Let the pipeline's networks compute so inside the `with` block.

        Raises:
            NoExpertsError, UnknownExpertError, AllExpertsMaskedError, RegionMaskError: as for any mixture.
            GateMismatchError: the shared gates are for another base.
        """
        pipe.need_experts("mixture='auto'")
        shared = self.shared or pipe.ensemble.shared
        if shared is not None:
            shared.check(pipe.mixtures)
        for name in (*self.phrases, *self.styles):
            if name not in pipe.experts:
                raise UnknownExpertError(name, list(pipe.experts))
        active = pipe.experts if request.active_experts is None else request.active_experts
        counting = {name: expert for name, expert in pipe.experts.items() if name in active}
        reader = PromptReader(
            Calling(self.phrases, self.styles), self.settings, counting, tokenizers_of(pipe), shared
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
        shared: what refines the weights, if anything does.

    Attributes:
        calls: expert name -> phrases, of those that count.
        prompts, negatives: texts of the call that encodes its prompts; None where there is none.
    """

    def __init__(
        self,
        calling: Calling,
        settings: AutoSettings,
        experts: Mapping[str, Expert],
        tokenizers: Mapping[str, Any],
        shared: SharedGates | None = None,
    ) -> None:
        self._calling, self._experts, self._tokenizers = calling, experts, tokenizers
        self.calls = {name: calling.of(expert) for name, expert in experts.items()}
        self.prompts: set[str] | None = None
        self.negatives: set[str] | None = None
        super().__init__(
            {
                part: {name: [_tokens(tokenizer, one) for one in own] for name, own in self.calls.items()}
                for part, tokenizer in tokenizers.items()
            },
            settings=settings,
            rows_apart=True,
            shared=shared,
        )

    def expect(self, given: Mapping[str, Any]) -> None:
        """Know the arguments of the call that is about to encode its prompts."""
        self.prompts, self.negatives = (
            {one for name in names for one in _texts(given.get(name))} for names in (_PROMPTS, _NEGATIVES)
        )

    def kind(
        self, texts: Mapping[str, list[str]], names: Sequence[str], row: int, rows: int, *, apart: bool
    ) -> bool | None:
        """What a text is that a transformer reads, see `KnownText.prompt`.

        Args:
            texts: arguments of `encode_prompt`.
            names: of those that it was made of.
            row: which text it is.
            rows: of so many.
            apart: whether negative prompts are encoded as prompts are.
        """
        if self.prompts is None and apart:
            return None
        own = texts[names[0]] or [""]
        text = own[min(row * len(own) // rows, len(own) - 1)]
        prompts, negatives = (set(texts["prompt"]), set(texts["negative_prompt"]) or {""})
        if self.prompts is not None and self.negatives is not None:
            prompts, negatives = self.prompts, self.negatives or {""}
        wanted, unwanted = text in prompts, text in negatives
        return None if wanted == unwanted else wanted

    def read(self, prompts: Sequence[str], *, by_row: bool = False) -> None:
        """Find out which experts count, and which of them everywhere.

        An expert that the prompt does not name is left out, unless nobody says how to name it.

        Args:
            prompts: all that are about to be encoded.
            by_row: whether each is of a picture of its own.
        """
        each = [set(self._calling.named_in(text, self._experts)) for text in prompts]
        differ = by_row and any(own != each[0] for own in each)
        self.by_row = frozenset[str]().union(*each) if differ else None
        named = [name for name in self.calls if any(name in own for own in each)]
        self.count_everywhere(self._calling.everywhere(named, self._experts), named)
        if not named and not self.everywhere:
            logger.warning(
                "the prompt names none of the experts, which count for nothing: write %s",
                ", ".join(repr(own[0]) for own in self.calls.values()),
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


class PromptKinds(PromptReader):
    """Which texts of a call are prompts, where gates mix the experts.

    Args:
        pipe: a pipeline with experts.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(Calling(), AutoSettings(), pipe.experts, tokenizers_of(pipe))

    def read(self, prompts: Sequence[str], *, by_row: bool = False) -> None:
        """Nothing: gates say who counts."""


def expect_prompts(pipe: Any, given: Mapping[str, Any]) -> None:
    """Let whatever reads the prompts know a call's arguments."""
    reader = pipe.ensemble.choice.texts
    if isinstance(reader, PromptReader):
        reader.expect(given)


@contextmanager
def reading_prompts(pipe: Any, given: Mapping[str, Any]) -> Iterator[Callable[[Any], None]]:
    """Let whatever reads the prompts read the texts that a pipeline encodes inside the `with` block.

    Args:
        pipe: the pipeline.
        given: arguments of its `encode_prompt`.
    Yields:
        To be called with what that returned.
    """
    reader = pipe.ensemble.choice.texts
    if not isinstance(reader, PromptReader):
        yield lambda encoded: None
        return
    layout = layout_of(pipe)
    # Pipelines write into lists of prompts.
    texts = {name: _texts(given.get(name)) for name in (*_PROMPTS, *_NEGATIVES)}
    prompts = [one for name in _PROMPTS for one in texts[name]]
    apart = layout is not None and layout.negative is None
    if apart and reader.prompts is not None:
        prompts = [one for one in prompts if one in reader.prompts]
    if prompts:
        reader.read(prompts, by_row=prompts == texts[_PROMPTS[0]])
    if layout is None:
        yield lambda encoded: _note_prompts(pipe, reader, texts, given, encoded)
        return
    with watched_tokens(pipe, layout) as runs:
        yield lambda encoded: _note_tokens(pipe, reader, layout, runs, texts, encoded)


def _note_prompts(
    pipe: Any,
    reader: PromptReader,
    given_texts: Mapping[str, list[str]],
    given: Mapping[str, Any],
    encoded: Any,
) -> None:
    """Note what the text encoders of a pipeline with a UNet made of texts."""
    texts = {name: given_texts[name] for name in ("prompt", "negative_prompt")}
    if not texts["negative_prompt"] and given.get("negative_prompt_embeds") is None:
        texts["negative_prompt"] = [""]
    for (name, own), embeddings in zip(texts.items(), encoded, strict=False):
        if own and isinstance(embeddings, Tensor) and embeddings.dim() == 3:
            # One that is both cannot be told apart where the denoiser reads it.
            both = [text for text in own if all(text in others for others in texts.values())]
            reader.note(pipe, own, embeddings, [None if one in both else name == "prompt" for one in own])


def _note_tokens(
    pipe: Any,
    reader: PromptReader,
    layout: TextLayout,
    runs: Runs,
    texts: Mapping[str, list[str]],
    encoded: Any,
) -> None:
    """The same of a pipeline with a transformer."""
    finder = WordPlaces(pipe, layout, {name: reader.calls.get(name, ()) for name in pipe.experts})
    groups: list[tuple[tuple[str, ...], int]] = [(_PROMPTS, 0)]
    if layout.negative is not None:
        groups.append((_NEGATIVES, layout.negative))
    for number, (names, index) in enumerate(groups):
        embeddings = encoded[index] if index < len(encoded) else None
        own = [one for name in names for one in texts[name]]
        if names is _NEGATIVES:
            own = own or [""]
        if embeddings is None or not len(embeddings) or not own:
            continue
        places = finder.of(runs, number, own, [len(one) for one in embeddings])
        count, apart = len(embeddings), layout.negative is None
        kinds = [reader.kind(texts, names, row, count, apart=apart) for row in range(count)]
        reader.remember(embeddings, places, kinds)


def _texts(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _tokens(tokenizer: Any, phrase: str) -> list[int]:
    ids: list[int] = tokenizer(phrase, add_special_tokens=False).input_ids
    return ids


register(AUTO, AutoMixture())

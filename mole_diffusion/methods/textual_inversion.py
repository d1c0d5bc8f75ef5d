"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): a concept is the embedding of a new word.

The word stands for the concept's phrase ("zorin boot"), begins as the mean embedding of its class words,
and is all that is trained. diffusers loads the words of several concepts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks.clip import TEXT_ENCODER, TEXT_ENCODER_2
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.phrases import without_article
from mole_diffusion.methods.concept_training import ConceptTrainer
from mole_diffusion.methods.job import ConceptRecipe, Job
from mole_diffusion.methods.prepared import Prepared
from mole_diffusion.methods.replaced import Wording, embedding_of, new_words, replaced_weights, worded
from mole_diffusion.pictures.choosing import Request
from mole_diffusion.pictures.components import networks_of

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept

WORDS_FILE = "words.safetensors"
#: Key of a concept's word among what is trained for it.
WORD = "word"
#: Concept -> key -> what was trained for it.
Trained = Mapping[str, Mapping[str, Tensor]]
#: The paper: 5000 steps of batch 4 at 5e-3 (5e-4 times batch and GPUs), without prior preservation.
RECIPE = ConceptRecipe(steps=120, rate=3e-2, prior=0)


def word_of(name: str) -> str:
    """The new word of a concept."""
    return f"<{name}>"


def one_text_encoder(pipe: Any, method: str) -> None:
    """Raise ConfigError for all but Stable Diffusion 1 and 2: a word has an embedding in one encoder."""
    networks = networks_of(pipe)
    if UNET not in networks or TEXT_ENCODER not in networks or TEXT_ENCODER_2 in networks:
        raise ConfigError(f"{method!r} is for Stable Diffusion 1 and 2, whose text encoder is one")


def train(method: str, job: Job) -> None:
    """Train the word of every concept of a job; writes them into one file.

    Raises:
        ConfigError: a concept has no pictures, or the pipeline has two text encoders.
    """
    wording = {without_article(c.text): word_of(name) for name, c in job.concepts.items()}
    train_words(method, job, RECIPE, _train_one, WORDS_FILE, wording)


def train_words(
    method: str,
    job: Job,
    recipe: ConceptRecipe,
    train_one: Callable[[ConceptTrainer, Concept], dict[str, Tensor]],
    file: str,
    wording: Mapping[str, str],
    beside: Callable[[ConceptTrainer, Trained], Mapping[str, Tensor]] = lambda trainer, found: {},
) -> None:
    """Train a word, and what goes with it, for every concept of a job; writes them into one file.

    Args:
        method: its name.
        job: what is prepared.
        recipe: steps and rate, where the job says nothing else.
        train_one: trains one concept; returns its word as "word" (1, d), and more.
        file: name of the file.
        wording: what replaces the concepts' phrases in a prompt.
        beside: makes what the file holds beside the words, of what was trained.

    Raises:
        ConfigError: a concept has no pictures, or the pipeline has two text encoders.
    """
    one_text_encoder(job.pipe, method)
    trainer = ConceptTrainer(method, job, job.recipe(recipe))
    found = trainer.results(train_one)
    words = {word_of(name): tensors[WORD] for name, tensors in found.items()}
    write_safetensors(job.folder / file, {**beside(trainer, found), **words}, {"format": "pt"})
    job.details.update(steps=trainer.recipe.steps, rate=trainer.recipe.rate, wording=dict(wording))


def _train_one(trainer: ConceptTrainer, concept: Concept) -> dict[str, Tensor]:
    pipe = trainer.job.pipe
    wording = Wording({without_article(concept.text): word_of(concept.name)})
    with trainer.frozen():
        word = NewWord(pipe, word_of(concept.name), embedding_of(pipe, without_article(concept.class_text)))
        with word.known(wording):
            trainer.fit([word.vector], word.engaged, trainer.pictures(concept), None)
    return {WORD: word.vector.detach().cpu()[None]}


class NewWord:
    """A word whose embedding is being trained.

    Args:
        pipe: the pipeline.
        word: how the tokenizer is to call it.
        start: (d,) the embedding to begin with.
    """

    def __init__(self, pipe: Any, word: str, start: Tensor) -> None:
        self._pipe, self._word = pipe, word
        self._layer = pipe.text_encoder.get_input_embeddings()
        self.vector = start.to(self._layer.weight.device).float().requires_grad_()

    @contextmanager
    def known(self, wording: Wording) -> Iterator[None]:
        """Let the pipeline's tokenizer know the word inside the `with` block."""
        with worded(self._pipe, wording):
            self._pipe.tokenizer.add_tokens(self._word)
            yield

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """Let the text encoder compute with the word, with gradient, inside the `with` block."""
        weight = self._layer.weight
        row = self._pipe.tokenizer.convert_tokens_to_ids(self._word)
        vector = self.vector.to(weight.dtype)[None]
        # Rows behind the tokenizer's words belong to nobody.
        with replaced_weights({"": self._layer}, {"": torch.cat([weight[:row], vector])}):
            yield


class PreparedWords(Prepared):
    """The base with the new words, which take the place of the concepts' phrases in a prompt."""

    needs_experts = False

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        request.refuse_options(self.label)
        one_text_encoder(pipe, self.method)
        words: Mapping[str, Tensor] = load_file(self.folder / WORDS_FILE)
        with ExitStack() as stack:
            stack.enter_context(pipe.composing(mixture="none"))
            stack.enter_context(new_words(pipe, words, Wording(self.details["wording"])))
            yield

"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): keys and values of cross-attention; a new word.

The word stands before the class ("<boot> boot") in place of the trigger. Concepts are trained one by one with
diffusers' `CustomDiffusionAttnProcessor` and merged by the paper's constrained optimisation: the keys and
values of the concepts' own texts are kept, those of other texts change as little as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mole_diffusion.core.phrases import without_article
from mole_diffusion.methods.concept_training import ConceptTrainer
from mole_diffusion.methods.job import ConceptRecipe, Job
from mole_diffusion.methods.prepared import Prepared
from mole_diffusion.methods.replaced import Wording, attention, embedding_of, new_words
from mole_diffusion.methods.textual_inversion import (
    WORD,
    NewWord,
    Trained,
    one_text_encoder,
    train_words,
    word_of,
)
from mole_diffusion.pictures.choosing import Request
from mole_diffusion.pictures.denoisers import denoiser_of

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept

FILE = "custom_diffusion.safetensors"
#: The paper: 250 steps of batch 8 at 8e-5, with pictures of the class.
RECIPE = ConceptRecipe(steps=300, rate=3e-3)
#: Without it, weights grow without bound where no other text has a component, and longer prompts have some.
RIDGE = 0.1
#: Words of the texts whose keys and values the merge keeps, when there are no captions to take them from.
_PLACES = ("on the beach", "in the snow", "on the grass", "on the floor", "at night", "")


def wording_of(concept: Concept) -> tuple[str, str]:
    """A concept's phrase and what replaces it: "zorin boot" -> "<boot> boot"."""
    known = without_article(concept.class_text).split()
    word = word_of(concept.name)
    words = [w if w in known else word for w in without_article(concept.text).split()]
    once = [w for i, w in enumerate(words) if w != word or word not in words[:i]]
    return without_article(concept.text), " ".join(once if word in once else [word, *once])


def train(method: str, job: Job) -> None:
    """Train every concept of a job and merge them; writes one file, in diffusers' format but for the words.

    Raises:
        ConfigError: a concept has no pictures, or the pipeline has two text encoders.
    """

    def merged(trainer: ConceptTrainer, found: Trained) -> dict[str, Tensor]:
        with trainer.frozen(), torch.no_grad():
            return merge(job.pipe, job.concepts, found, _other_texts(job))

    wording = dict(map(wording_of, job.concepts.values()))
    train_words(method, job, RECIPE, _train_one, FILE, wording, merged)


def _train_one(trainer: ConceptTrainer, concept: Concept) -> dict[str, Tensor]:
    pipe = trainer.job.pipe
    phrase, words = wording_of(concept)
    unet = trainer.bench.denoiser.network
    processors = trained_processors(unet)
    parameters = [parameter for one in processors.values() for parameter in one.parameters()]
    with trainer.frozen():
        start = embedding_of(pipe, phrase.split()[0])
        word = NewWord(pipe, word_of(concept.name), start)
        prior = trainer.prior(concept)
        with attention(unet, processors), word.known(Wording({phrase: words})):
            trainer.fit([word.vector, *parameters], word.engaged, trainer.pictures(concept), prior)
    trained = {
        f"{name}.{key}": value.detach().cpu()
        for name, one in processors.items()
        for key, value in one.state_dict().items()
    }
    return {**trained, WORD: word.vector.detach().cpu()[None]}


def trained_processors(unet: Any) -> dict[str, Any]:
    """Name -> diffusers' processor of every cross-attention, with keys and values as the base has them."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    found = {}
    for name in unet.attn_processors:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        if not layer.is_cross_attention:
            continue
        keys, values = _weight(layer.to_k), _weight(layer.to_v)
        one = CustomDiffusionAttnProcessor(
            train_kv=True, train_q_out=False, hidden_size=keys.shape[0], cross_attention_dim=keys.shape[1]
        ).to(keys.device, torch.float32)
        with torch.no_grad():
            one.to_k_custom_diffusion.weight.copy_(keys)
            one.to_v_custom_diffusion.weight.copy_(values)
        found[name] = one
    return found


def merge(
    pipe: Any,
    concepts: Mapping[str, Concept],
    trained: Trained,
    other_texts: Sequence[str],
) -> dict[str, Tensor]:
    """The keys and values of all concepts in one: section 3.2 of the paper.

    Args:
        pipe: the pipeline, without experts.
        concepts: by name.
        trained: for each concept its word and, by key of diffusers' format, its weights.
        other_texts: texts whose keys and values are to change as little as possible.
    """
    words = {word_of(name): tensors[WORD] for name, tensors in trained.items()}
    others = torch.cat([_tokens(pipe, text) for text in dict.fromkeys(other_texts)])
    wording = Wording(dict(map(wording_of, concepts.values())))
    with new_words(pipe, words, wording):
        own = {
            name: torch.cat([_own_tokens(pipe, wording(text), word_of(name)) for text in _texts(c)])
            for name, c in concepts.items()
        }
    targets = torch.cat(list(own.values()))
    merged = {}
    for name, one in trained_processors(denoiser_of(pipe).network).items():
        for key, base in one.state_dict().items():
            wanted = torch.cat([own[c] @ trained[c][f"{name}.{key}"].double().T for c in own])
            merged[f"{name}.{key}"] = constrained(base.double().cpu(), others, targets, wanted).float()
    return merged


def constrained(
    base: Tensor, others: Tensor, targets: Tensor, wanted: Tensor, ridge: float = RIDGE
) -> Tensor:
    """The weight nearest to the base on some inputs that gives wanted outputs on others.

    argmin_W |others W^T - others W0^T| subject to targets W^T = wanted, by Lagrange multipliers:
    W = W0 + (wanted - targets W0^T)^T (D targets^T)^-1 D with D = targets (others^T others)^-1.

    Args:
        base: (out, in) W0.
        others: (n, in).
        targets: (m, in), m at most in.
        wanted: (m, out).
        ridge: how much directions count in which the other texts have nothing, as a share of their mean.

    Returns:
        (out, in). Inputs that repeat each other are fulfilled in the sense of least squares.
    """
    gram = others.T @ others
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    d = torch.linalg.solve(gram, targets.T).T
    missing = wanted - targets @ base.T
    multipliers = torch.linalg.pinv(d @ targets.T, rtol=1e-4, hermitian=True) @ missing
    nearest: Tensor = base + multipliers.T @ d
    return nearest


def _texts(concept: Concept) -> tuple[str, str]:
    """The texts whose keys and values are the concept's own."""
    return concept.text, f"photo of {concept.text}"


def _own_tokens(pipe: Any, text: str, word: str) -> Tensor:
    """Features of the tokens from a concept's word on: those before it are the same for every concept."""
    ids = pipe.tokenizer(text, truncation=True).input_ids
    return _tokens(pipe, text)[ids.index(pipe.tokenizer.convert_tokens_to_ids(word)) - 1 :]


@torch.no_grad()
def _tokens(pipe: Any, text: str) -> Tensor:
    """Text features (tokens, d) of a text behind its start token, up to its end token; float64."""
    features = denoiser_of(pipe).encode_texts([text]).tensors["encoder_hidden_states"]
    count = len(pipe.tokenizer(text, truncation=True).input_ids)
    found: Tensor = features[0, 1:count].double().cpu()
    return found


def _other_texts(job: Job) -> list[str]:
    """Texts in class words, of the prompts and of the concepts in a few places."""
    classes = [concept.class_text for concept in job.concepts.values()]
    return [f"{text} {place}".strip() for text in [*classes, "a photo", "a picture"] for place in _PLACES]


def _weight(layer: Any) -> Tensor:
    weight: Tensor = getattr(layer, "base_layer", layer).weight
    return weight


class PreparedCustomDiffusion(Prepared):
    """The base with the merged keys and values and the new words."""

    needs_experts = False

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        request.refuse_options(self.label)
        one_text_encoder(pipe, self.method)
        tensors = load_file(self.folder / FILE)
        words = {key: tensors.pop(key) for key in list(tensors) if key.startswith("<")}
        denoiser = denoiser_of(pipe)
        processors = trained_processors(denoiser.network)
        for name, one in processors.items():
            one.load_state_dict({key: tensors[f"{name}.{key}"] for key in one.state_dict()})
            one.to(denoiser.device, denoiser.dtype)
        with ExitStack() as stack:
            stack.enter_context(pipe.composing(mixture="none"))
            stack.enter_context(attention(denoiser.network, processors))
            stack.enter_context(new_words(pipe, words, Wording(self.details["wording"])))
            yield

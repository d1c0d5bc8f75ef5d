"""Other weights, words and attention in the networks of a pipeline for a while; undone without a trace."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.modules import base_layer, unwrapped


@contextmanager
def replaced_weights(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers compute with other weights inside the `with` block.

    The parameters themselves stay untouched and come back as the same objects; the replacements may carry a
    gradient.

    Args:
        layers: by name.
        weights: a tensor of the shape of the layer's weight, for some of the names.
    """
    before = {name: layers[name]._parameters["weight"] for name in weights}
    try:
        for name, weight in weights.items():
            layers[name]._parameters["weight"] = weight  # type: ignore[assignment]
        yield
    finally:
        for name, parameter in before.items():
            layers[name]._parameters["weight"] = parameter


def weight_layers(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The layers of a network of some kinds, by name; inside PEFT's wrappers, without PEFT's own.

    Raises:
        ConfigError: a layer has no plain weights in memory (quantised, offloaded).
    """
    network = unwrapped(network)
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inner = base_layer(module)
        if not isinstance(inner, kinds) or any(word.startswith("lora_") for word in name.split(".")):
            continue
        weight = inner._parameters.get("weight")
        if weight is None or weight.is_meta or not weight.is_floating_point():
            raise ConfigError(f"{name!r} has no plain weights in memory (quantised or offloaded)")
        found.setdefault(name.replace(".base_layer", ""), inner)
    return found


class Wording:
    """What stands for the concepts in a prompt: phrases and what replaces them.

    Args:
        phrases: phrase -> replacement, e.g. "zorin boot" -> "<boot>".
    """

    def __init__(self, phrases: Mapping[str, str]) -> None:
        self._phrases = {phrase.lower(): words for phrase, words in phrases.items()}
        longest_first = sorted(self._phrases, key=len, reverse=True)
        choices = "|".join(re.escape(phrase) for phrase in longest_first)
        self._pattern = re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """The text with every phrase replaced."""
        return self._pattern.sub(lambda match: self._phrases[match.group(0).lower()], text)


@contextmanager
def worded(pipe: Any, wording: Callable[[str], str]) -> Iterator[None]:
    """Let the pipeline read every prompt in other words, by a copy of its tokenizer, inside the block.

    Words that experts bring along are not known there: new ones take their numbers.
    """
    tokenizer, encode = pipe.tokenizer, pipe.encode_prompt

    def encode_worded(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(prompt, str):
            return encode(wording(prompt), *args, **kwargs)
        return encode(None if prompt is None else [wording(text) for text in prompt], *args, **kwargs)

    before = vars(pipe).get("encode_prompt")
    with pipe.ensemble.without_companions():
        try:
            pipe.tokenizer = copy.deepcopy(tokenizer)
            pipe.encode_prompt = encode_worded  # hides the method of the class
            yield
        finally:
            pipe.tokenizer = tokenizer
            vars(pipe).pop("encode_prompt", None)
            if before is not None:
                pipe.encode_prompt = before


@contextmanager
def new_words(pipe: Any, embeddings: Mapping[str, Tensor], wording: Callable[[str], str]) -> Iterator[None]:
    """Words that a text encoder learned, loaded by diffusers' `load_textual_inversion`, inside the block.

    Args:
        pipe: the pipeline.
        embeddings: word -> (vectors, d).
        wording: puts these words into a prompt.
    """
    encoder = pipe.text_encoder
    module = encoder.get_input_embeddings()
    parameter, rows, vocabulary = module.weight, module.num_embeddings, encoder.config.vocab_size
    attributes = dict(vars(encoder))
    with worded(pipe, wording):
        try:
            # The loader writes into the parameter: that of another one, with the rows it wants. Enlarging it
            # would take its time and draw random numbers.
            known = parameter.detach()[: len(pipe.tokenizer)]
            added = sum(vectors.shape[0] for vectors in embeddings.values())
            weight = torch.cat([known, known.new_zeros(added, known.shape[1])])
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module.num_embeddings = len(weight)
            pipe.load_textual_inversion(
                [{word: vectors} for word, vectors in embeddings.items()], token=list(embeddings)
            )
            yield
        finally:
            encoder.set_input_embeddings(module)
            module._parameters["weight"], module.num_embeddings = parameter, rows
            encoder.config.vocab_size = vocabulary
            for name in set(vars(encoder)) - set(attributes):
                delattr(encoder, name)


@contextmanager
def attention(unet: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Other attention processors for some of the attention layers of a diffusers UNet inside the block."""
    before = dict(unet.attn_processors)
    try:
        unet.set_attn_processor({**before, **processors})
        yield
    finally:
        unet.set_attn_processor(before)


@torch.no_grad()
def embedding_of(pipe: Any, text: str) -> Tensor:
    """Mean input embedding (d,) of the tokens of a text."""
    ids: Sequence[int] = pipe.tokenizer(text, add_special_tokens=False).input_ids
    weight: Tensor = pipe.text_encoder.get_input_embeddings().weight
    return weight[list(ids)].float().mean(dim=0).cpu()

"""Experts of a diffusers pipeline: what is checked and said when they come and go."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mole_diffusion.core.bases import base_of_networks
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.holding import check_new, unused, without
from mole_diffusion.core.modules import unwrapped
from mole_diffusion.pictures.components import facts_of, flatten_tokens, networks_of, tokenizers_of
from mole_diffusion.pictures.triggers import TriggerWords, vectors_of
from mole_diffusion.sources import find_expert_file

logger = logging.getLogger(__name__)

#: What diffusers' loaders and other programs call our arguments.
_OTHER_NAMES = {"adapter_name": "name", "adapter_weight": "scale", "weight": "scale", "strength": "scale"}
#: How other programs give LoRAs and their strength in a prompt.
_LORA_TAG = re.compile(r"<lora:[^<>]*>")


def ensemble_of(pipe: Any, known: Ensemble | None) -> Ensemble:
    """The ensemble of a pipeline as it is now: users exchange schedulers and networks.

    Args:
        pipe: a pipeline of diffusers.
        known: what it had so far.
    """
    networks, found = networks_of(pipe), known
    if found is None or not found.experts:
        found = Ensemble.carrying(networks) or found or Ensemble(networks, facts=facts_of(pipe))
    found.networks = {part: unwrapped(network) for part, network in networks.items()}
    found.facts, found.flatten_tokens = facts_of(pipe), dict(flatten_tokens(pipe))
    return found


def read_expert(
    source: str | Path,
    name: str | None,
    scale: float,
    *,
    weight_name: str | None,
    rank: int | None,
    hub_options: Mapping[str, Any],
    networks: Mapping[str, nn.Module],
) -> Expert:
    """Read the expert behind what a user names; see `WithExperts.load_expert`.

    Raises:
        TypeError: a hub option that the hub does not know.
        ExpertLoadError: nothing there, or not a LoRA.
    """
    _check_hub_options(hub_options)
    path, own_name = find_expert_file(source, weight_name, **hub_options)
    base = base_of_networks(networks)
    return load_expert(path, name=name or own_name, scale=scale, rank=rank, base=base)


def _check_hub_options(options: Mapping[str, Any]) -> None:
    """Refuse keywords that nobody would read."""
    if not options:
        return
    from huggingface_hub import snapshot_download

    ours = ("name", "scale", "weight_name", "rank", "check_base")
    chosen = ("repo_id", "allow_patterns", "ignore_patterns")
    known = [name for name in inspect.signature(snapshot_download).parameters if name not in chosen]
    for option in options:
        if option in known:
            continue
        nearest = _OTHER_NAMES.get(option) or next(
            iter(difflib.get_close_matches(option, [*ours, *known], n=1, cutoff=0.5)), None
        )
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise TypeError(f"load_expert() got an unexpected keyword argument {option!r}{hint}")


def add_expert(pipe: Any, ensemble: Ensemble, expert: Expert, *, check_base: bool) -> None:
    """One more expert; see `WithExperts.load_expert`.

    Raises:
        ExpertLoadError, InjectionError: it cannot be had; everything is as before.
    """
    check_new(ensemble, [expert], "pipeline")
    unchecked = () if check_base else (expert.name,)
    ensemble.set_experts(
        [*ensemble.experts.values(), expert], companions=trigger_words(pipe), unchecked=unchecked
    )
    sentences = unused(expert, ensemble.mixtures, "pipeline")
    sentences += _unread(expert, tokenizers_of(pipe))
    if sentences:
        logger.warning("expert %r is used in part: %s", expert.name, "; ".join(sentences))


def remove_expert(pipe: Any, ensemble: Ensemble, name: str) -> None:
    """Take one expert away.

    Raises:
        UnknownExpertError: no expert has this name.
    """
    ensemble.set_experts(without(ensemble, name), companions=trigger_words(pipe))


def trigger_words(pipe: Any) -> Callable[[Sequence[Expert]], Iterable[TriggerWords]]:
    """Makes the trigger words of experts known to a pipeline's tokenizers and text encoders."""

    def make(experts: Sequence[Expert]) -> Iterator[TriggerWords]:
        networks = networks_of(pipe)
        for part, tokenizer in tokenizers_of(pipe).items():
            if words := vectors_of(experts, part):
                yield TriggerWords(tokenizer, networks[part], words)

    return make


def warn_of_lora_tags(texts: Iterable[Any]) -> None:
    """Say that nobody reads `<lora:NAME:WEIGHT>` here.

    Args:
        texts: arguments of `encode_prompt`: texts, lists of texts, and anything else.
    """
    flat = [text for one in texts for text in (one if isinstance(one, (list, tuple)) else [one])]
    tags = dict.fromkeys(tag for text in flat if isinstance(text, str) for tag in _LORA_TAG.findall(text))
    if tags:
        logger.warning(
            "%s in a prompt is only text here: load the expert with load_expert(FILE, scale=...) or"
            " --expert NAME=SCALE, and change its strength by expert_scales={NAME: SCALE}",
            ", ".join(tags),
        )


def _unread(expert: Expert, tokenizers: Mapping[str, Any]) -> list[str]:
    """The trigger words of an expert that no tokenizer here can learn, as sentences."""
    return [
        f"{part}: not part of this pipeline, the embedding of {word!r} is unused"
        for word, found in expert.embeddings.items()
        for part in found
        if part not in tokenizers
    ]

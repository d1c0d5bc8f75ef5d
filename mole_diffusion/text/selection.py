"""Few of many experts, chosen by gates that know all: for a text before anything is mixed, or for a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks.t5 import READER
from mole_diffusion.text.composed import Reading
from mole_diffusion.text.examples import pairs_of
from mole_diffusion.text.training import CrossEntropy, TextTrainingConfig


def preselected(
    model: Reading,
    texts: Sequence[str],
    count: int,
    *,
    active: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[tuple[str, ...]]:
    """The experts that the encoder's gates give the most weight to, for each text.

    One pass of the encoder decides for the whole answer, so that the decoder, which runs once per token,
    mixes no more than so many; a text's choice does not depend on its neighbours.

    Args:
        model: with trained gates.
        texts: what it is to read.
        count: how many experts are left to each.
        active, scales: see `Seq2SeqExperts.active`.

    Returns:
        Names for each text, in the order of the model's experts.

    Raises:
        ConfigError: `count` is below 1, or no expert changes the encoder.
    """
    if count < 1:
        raise ConfigError(f"top_k is {count}; it has to be at least 1")
    names = [name for name in model.experts if active is None or name in active]
    if count >= len(names):
        return [tuple(names)] * len(texts)
    batch = model.read(texts)
    with torch.no_grad(), model.active(active, expert_scales=scales), model.recording():
        model.model.get_encoder()(**batch)
    records = [one for one in model.gate_weights().records if one.network == READER]
    if not records:
        raise ConfigError("top_k goes by the encoder's gates, and no expert changes the encoder")
    weights = torch.stack([one.weights for one in records]).mean(0)
    experts = records[0].experts
    found = []
    for row in weights.topk(count, dim=-1).indices.tolist():
        kept = {experts[index] for index in row}
        found.append(tuple(name for name in names if name in kept))
    return found


def weightiest(model: Reading, examples: Any, count: int) -> tuple[str, ...]:
    """The experts that the gates give the most weight to over examples, texts and answers alike.

    Args:
        model: with trained gates.
        examples: see `examples.pairs_of`; a hundred will do.
        count: how many.

    Returns:
        Names, in the order of the model's experts.

    Raises:
        ConfigError: `count` is below 1, or the examples are none.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; it has to be at least 1")
    pairs, config = pairs_of(examples), TextTrainingConfig()
    objective = CrossEntropy(model.model, model.tokenizer, pairs, config)
    with model.active(), model.recording():
        objective.mean_loss(pairs, config.batch_size)
    weights = {name: weight for (name,), weight in model.gate_weights().mean("expert").items()}
    kept = sorted(weights, key=lambda name: -weights[name])[:count]
    return tuple(name for name in model.experts if name in kept)


def grouped(choices: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], list[int]]:
    """Choice -> the texts that made it."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        found.setdefault(choice, []).append(index)
    return found

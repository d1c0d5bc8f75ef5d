"""Few of many experts for a text, chosen by the gates that read it: before anything is mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.networks.t5 import READER
from mole_diffusion.text.composed import Composed


def preselected(
    model: Composed,
    batch: Mapping[str, Tensor],
    count: int,
    *,
    active: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[tuple[str, ...]]:
    """The experts that the encoder's gates give the most weight to, for each text.

    One pass of the encoder decides for the whole answer, so that the decoder, which runs once per token,
    mixes no more than so many; a text's choice does not depend on its neighbours.

    Args:
        model: with gates.
        batch: `input_ids` (B, L) and `attention_mask` of the texts.
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
        return [tuple(names)] * len(batch["input_ids"])
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.active(active, expert_scales=scales), model.recording():
        model.model.get_encoder()(**read)
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


def grouped(choices: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], list[int]]:
    """Choice -> the texts that made it."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        found.setdefault(choice, []).append(index)
    return found

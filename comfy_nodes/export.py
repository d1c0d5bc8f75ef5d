"""Export LoRA: frozen gates as one plain file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.export import compress, lora_tensors, static_factors, write_lora

from .binding import Applied


def export_lora(applied: Applied, path: Path, rank: int | None) -> str:
    """Write the mixture with gates frozen at the means of the last run.

    Args:
        applied: what Apply MoLE did.
        path: file to write.
        rank: largest rank to keep; None keeps everything.
    Returns:
        One line on what was written.
    Raises:
        ConfigError: nothing has run yet, or an expert cannot be held by a plain LoRA.
    """
    names = applied.experts.names
    weights = {
        part: {gate: dict(zip(names, means, strict=True)) for gate, means in gates.items()}
        for part, gates in applied.means().items()
    }
    mixtures = {part: mixture for part, mixture in applied.mixtures.items() if weights.get(part)}
    if "unet" not in mixtures:
        raise ConfigError(
            "The gates have not run since the experts were applied, so there are no weights to freeze: "
            "connect the LATENT of a sampler that uses this MODEL to 'after'."
        )
    factors, error = static_factors(mixtures, weights, applied.experts.active), 0.0
    if rank is not None:
        factors, error = compress(factors, rank)
    sources = [{"name": e.name, "sha256": e.sha256, "scale": e.scale} for e in applied.experts.experts]
    triggers = "|".join(trigger for e in applied.experts.experts for trigger in e.triggers)
    metadata = {"mole.kind": "static mixture", "mole.experts": json.dumps(sources)}
    if triggers:
        metadata["mole.trigger"] = triggers
    write_lora(path, lora_tensors(factors, "kohya", torch.float16), metadata)
    ranks = ", ".join(
        f"{part} rank {max(pair.rank for pair in own.values())}" for part, own in factors.items()
    )
    lost = f"; compression loses {error:.2%}" if rank is not None else ""
    left_out = [part for part in applied.mixtures if part not in mixtures]
    missing = f"; not in it, because no text was encoded: {', '.join(left_out)}" if left_out else ""
    return f"{path.name}: {sum(map(len, factors.values()))} matrices, {ranks}{lost}{missing}"

"""Export LoRA: frozen gates as one plain file."""

from __future__ import annotations

from pathlib import Path

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.export import ensemble_tensors, freeze, lora_header, write_lora

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
    chosen, ensemble = applied.experts, applied.ensemble
    weights = applied.means()
    mixtures = {part: mixture for part, mixture in ensemble.mixtures.items() if weights.get(part)}
    denoiser = next((mixture for mixture in mixtures.values() if mixture.in_picture), None)
    if denoiser is None:
        raise ConfigError(
            "The gates have not run since the experts were applied, so there are no weights to freeze: "
            "connect the LATENT of a sampler that uses this MODEL to 'after'."
        )
    static = freeze(mixtures, weights, active=chosen.active, scales=chosen.scales, rank=rank)
    counting = denoiser.chosen(chosen.active, chosen.scales)
    inside = [expert for expert in chosen.experts if expert.name in counting]
    metadata = lora_header("static mixture", inside, ensemble.facts)
    write_lora(path, ensemble_tensors(ensemble, static, "kohya", torch.float16), metadata)
    ranks = ", ".join(f"{part} rank {found}" for part, found in static.ranks.items())
    notes = [f"; compression loses {static.error:.2%}"] if rank is not None else []
    if left_out := [part for part in ensemble.mixtures if part not in mixtures]:
        notes.append(f"; not in it, because no text was encoded: {', '.join(left_out)}")
    if chosen.regions:
        notes.append(f"; a LoRA knows no regions: {', '.join(chosen.regions)} may act everywhere")
    return f"{path.name}: {static.matrices} matrices, {ranks}{''.join(notes)}"

"""A mixture with its gates frozen, as a PEFT folder or as a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.export import StaticLora, freeze, lora_header, lora_tensors, write_lora
from mole_diffusion.core.files import filling, replacing
from mole_diffusion.core.fixed import fixed_mixture
from mole_diffusion.core.modules import base_layer
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.peft_folder import ADAPTER_FILES
from mole_diffusion.core.records import MeanWeights
from mole_diffusion.core.routing import ROUTES, Route
from mole_diffusion.text.composed import Composed, MixtureWord, Reading

_BATCH = 16


@dataclass(frozen=True)
class TextExport:
    """What was written.

    Attributes:
        path: the folder.
        merged: whether it is a whole model; else a PEFT folder.
        experts: names of the experts inside.
        weights: what was frozen: part -> gate -> expert -> weight.
        rank: of the factors.
        compression_error: |compressed - exact| / |exact|, Frobenius norm over all matrices.
        texts: how many the means are over.
    """

    path: Path
    merged: bool
    experts: tuple[str, ...]
    weights: MeanWeights
    rank: int
    compression_error: float
    texts: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}


def export(
    model: Reading,
    path: Path,
    texts: Sequence[str],
    *,
    merged: bool,
    rank: int | None,
    active: Sequence[str] | None,
    scales: Mapping[str, float] | None,
    mixture: MixtureWord,
) -> TextExport:
    """See `MoLEForSeq2SeqLM.export`."""
    if mixture == "none":
        raise ConfigError("mixture is 'none': the base model without experts is nothing to export")
    rules.whole().check("rank", rank)
    if isinstance(mixture, Route) or mixture in ROUTES:
        raise ConfigError("a route weighs the experts token by token: it has no static mixture to export")
    ensemble = model.ensemble
    chosen, fixed = fixed_mixture(mixture, list(ensemble.experts), active)
    if fixed is not None:
        weights = {
            part: {
                label: {name: fixed.get(name, 0.0) for name in found.expert_names}
                for group in found.groups
                for label in {group.label("tokens"), group.label("context")}
            }
            for part, found in ensemble.mixtures.items()
        }
    else:
        weights = _means(model, texts, active, scales)
    lora = freeze(
        ensemble.mixtures, weights, active=chosen, scales=scales, rank=rank, fixed=fixed is not None
    )
    first = next(iter(ensemble.mixtures.values()))
    names = first.chosen(None if chosen is None else list(chosen), scales)
    if merged:
        with filling(path) as folder:
            with merged_into(model, lora):
                model.model.save_pretrained(folder)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    else:
        header = lora_header(
            "frozen gates", [model.experts[name] for name in names], {}, {"weights": weights}
        )
        write_adapter(path, lora, header, str(getattr(model.model, "name_or_path", "") or ""))
    return TextExport(path, merged, names, weights, max(lora.ranks.values()), lora.error, len(texts))


def _means(
    model: Reading,
    texts: Sequence[str],
    active: Sequence[str] | None,
    scales: Mapping[str, float] | None,
) -> MeanWeights:
    """Mean gate weights over what the model writes to some texts."""
    sources = [texts] if isinstance(texts, str) else list(texts)
    if not sources:
        raise ConfigError("texts are empty; give some that are like those the export will be used for")
    with model.active(active, expert_scales=scales), model.recording():
        for start in range(0, len(sources), _BATCH):
            batch = model.read(sources[start : start + _BATCH])
            tokens = model.model.generate(**batch, max_new_tokens=64, do_sample=False)
            # Once more with all tokens at hand: padding and what comes after the end do not count.
            written = tokens[:, 1:]
            mask = (written != model.model.config.pad_token_id).long()
            with torch.no_grad():
                model.model(
                    **batch, decoder_input_ids=tokens[:, :-1], decoder_attention_mask=mask, use_cache=False
                )
    return model.gate_weights().means()


def write_adapter(path: Path, lora: StaticLora, header: Mapping[str, str], base: str) -> None:
    """Write a PEFT folder.

    Args:
        path: the folder.
        lora: the factors; their ranks are filled up with zeros to the largest.
        header: of the file with the tensors.
        base: name of the base model.
    """
    rank = max(lora.ranks.values())
    tensors = {
        f"base_model.model.{key}": _filled(tensor, rank, down=".lora_A." in key)
        for key, tensor in lora_tensors(lora.factors, "diffusers", torch.float32).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name for own in lora.factors.values() for name in own}),
    }
    weights, settings = ADAPTER_FILES[0], ADAPTER_FILES[2]
    write_lora(path / weights, tensors, header)
    with replacing(path / settings) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _filled(factor: torch.Tensor, rank: int, *, down: bool) -> torch.Tensor:
    missing = rank - factor.shape[0 if down else 1]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if down else (0, missing)).contiguous()


@contextmanager
def merged_into(model: Composed, lora: StaticLora) -> Iterator[None]:
    """The model's weights have the mixture inside; after the `with` block they are as before."""
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad(), model.active(mixture="none"):
            for part, own in lora.factors.items():
                network = model.ensemble.networks[part]
                paths = {site.name: site.path for site in map_network(network, part).sites}
                for name, pair in own.items():
                    weight = base_layer(network.get_submodule(paths[name])).weight
                    assert isinstance(weight, torch.Tensor)
                    saved.append((weight, weight.detach().clone()))
                    down, up = (factor.to(weight.device, torch.float32) for factor in pair.matrices)
                    weight.add_((pair.scaling * up @ down).to(weight.dtype))
            yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)

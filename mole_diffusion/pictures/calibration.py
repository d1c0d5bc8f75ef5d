"""Export of a diffusers pipeline's mixture as one plain LoRA, and how far that is from the gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core import rules
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.export import (
    ExportReport,
    check_target,
    ensemble_tensors,
    freeze,
    lora_header,
    write_lora,
)
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.core.predictions import prediction_of
from mole_diffusion.core.records import GateRecord, GateWeights
from mole_diffusion.pictures.components import guidance_arguments, networks_of
from mole_diffusion.pictures.denoisers import denoiser_of

#: The denoiser runs once with the gates, once as the base and once with the static LoRA.
_PASSES = 3

Progress = Callable[[int, int], Any]


@dataclass
class _Calibration:
    """One prompt's forwards of the denoiser with the gates: inputs, and noise predictions on the CPU."""

    prompt: str
    guided: bool = False
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class _Ticker:
    """Counts the denoiser's forwards for whoever shows progress."""

    total: int
    callback: Progress | None
    done: int = 0

    def tick(self, *_: object) -> None:
        self.done += 1
        if self.callback is not None:
            # Some schedulers, and guidance in turns, run it more often than they have steps.
            self.callback(min(self.done, self.total), self.total)


@torch.no_grad()
def export_lora(
    pipe: Any,
    ensemble: Ensemble,
    path: str | Path,
    format: str,
    *,
    prompts: str | Sequence[str],
    steps: int,
    guidance_scale: float | None,
    size: tuple[int, int] | None,
    seed: int,
    rank: int | None,
    active_experts: Sequence[str] | None,
    dtype: torch.dtype,
    callback: Progress | None,
) -> ExportReport:
    """Freeze an ensemble's gates and write them as one LoRA; see `WithExperts.export_lora`.

    Args:
        pipe: draws the calibration prompts and says how far the result is from the gates.
        ensemble: the pipeline's.
        path, format, prompts, steps, guidance_scale, size, seed, rank, active_experts, dtype, callback: see
            there.
    """
    _need_text_to_image(pipe)
    target = check_target(path, format, rank)
    texts = _check_calibration(prompts, steps)
    options = _options(pipe, guidance_scale, size)
    ticker = _Ticker(len(texts) * steps * _PASSES, callback)
    runs: list[_Calibration] = []
    records: list[GateRecord] = []
    for i, text in enumerate(texts):
        run = _calibrate(pipe, text, steps, options, seed + i, active_experts, ticker)
        runs.append(run)
        records += pipe.gate_weights().records
    names = tuple(name for name in ensemble.experts if active_experts is None or name in active_experts)
    weights = GateWeights(records).means()
    static = freeze(ensemble.mixtures, weights, active=names, rank=rank)
    tensors = ensemble_tensors(ensemble, static, format, dtype)
    made_with = {"calibration": {"prompts": texts, "steps": steps}}
    inside = [ensemble.experts[name] for name in names]
    metadata = lora_header("static mixture", inside, ensemble.facts, made_with)
    expert = Expert.from_state_dict(tensors, name="static", metadata=metadata)
    noise, effect = _distance(pipe, ensemble, runs, expert, ticker)
    write_lora(target, tensors, metadata)
    return ExportReport(
        path=target,
        format=format,
        experts=names,
        weights=weights,
        matrices=static.matrices,
        ranks=static.ranks,
        compression_error=static.error,
        noise_difference=noise,
        effect_difference=effect,
        prompts=tuple(texts),
        steps=steps,
    )


def _options(pipe: Any, guidance_scale: float | None, size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of the calls that calibrate."""
    if guidance_scale is None and UNET in networks_of(pipe):
        guidance_scale = float(pipe.call_defaults.get("guidance_scale", 7.5))
    options: dict[str, Any] = guidance_arguments(pipe, guidance_scale)
    return options if size is None else {**options, "height": size[0], "width": size[1]}


def _calibrate(
    pipe: Any,
    prompt: str,
    steps: int,
    options: Mapping[str, Any],
    seed: int,
    active: Sequence[str] | None,
    ticker: _Ticker,
) -> _Calibration:
    """Draw a prompt with the gates; keeps the denoiser's forwards. The pipeline keeps the gates' weights."""
    run = _Calibration(prompt)

    def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        copies = tuple(_copied(one) for one in args)
        run.inputs.append((copies, dict(kwargs)))
        run.outputs.append(_noise(output))
        ticker.tick()

    handle = denoiser_of(pipe).network.register_forward_hook(take, with_kwargs=True)
    try:
        pipe(
            prompt=prompt,
            num_inference_steps=steps,
            **options,
            generator=torch.Generator().manual_seed(seed),
            active_experts=active,
            mixture="gates",
            output_type="latent",
        )
    finally:
        handle.remove()
    run.guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
    return run


def _distance(
    pipe: Any, ensemble: Ensemble, runs: Sequence[_Calibration], static: Expert, ticker: _Ticker
) -> tuple[float, float]:
    """|static - gated| relative to |gated|, and to |gated - base|, over all forwards."""
    missed = gated = changed = 0.0
    alone = ensemble.build([static], MoLEConfig.uniform())
    for run in runs:
        with pipe.composing(mixture="none"):
            base = _replay(pipe, run, ticker)
        with ensemble.standing_in(alone):
            frozen = _replay(pipe, run, ticker)
        for ours, plain, dynamic in zip(frozen, base, run.outputs, strict=True):
            missed += float((ours - dynamic).square().sum())
            gated += float(dynamic.square().sum())
            changed += float((dynamic - plain).square().sum())
    return _ratio(missed, gated), _ratio(missed, changed)


def _replay(pipe: Any, run: _Calibration, ticker: _Ticker) -> list[Tensor]:
    """The noise predictions for the same latents and steps with the networks as they are now."""
    denoiser, predictions = denoiser_of(pipe), []
    told = denoiser.replay(run.prompt, run.guided)
    for args, given in run.inputs:
        predictions.append(_noise(denoiser.network(*args, **told(given))))
        ticker.tick()
    return predictions


def _need_text_to_image(pipe: Any) -> None:
    if not pipe.draws_from_text:
        raise ConfigError(
            f"export_lora draws from text, and {type(pipe).__name__} draws from a picture; make a"
            " text-to-image pipeline of it with from_pipe: it shares experts and gates"
        )


def _check_calibration(prompts: str | Sequence[str], steps: int) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError(f"prompts is {prompts!r}; gates are frozen over at least one prompt, none empty")
    rules.whole().check("steps", steps)
    return texts


def _copied(value: Any) -> Any:
    """A tensor, or a list of some, that nobody changes in place."""
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value


def _noise(output: Any) -> Tensor:
    """The prediction among what a denoiser returns, float32 on the CPU."""
    return prediction_of(output).detach().float().cpu()


def _ratio(part: float, whole: float) -> float:
    """Ratio of two norms given as squares; 0 where both vanish."""
    if part == 0.0:
        return 0.0
    return float("inf") if whole == 0.0 else (part / whole) ** 0.5

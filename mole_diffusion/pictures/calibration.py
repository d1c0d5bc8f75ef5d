"""Export of a diffusers pipeline's mixture as one plain LoRA, and how far that is from the gates."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.export import (
    ExportReport,
    check_target,
    compress,
    lora_tensors,
    mean_weights,
    static_factors,
    write_lora,
)
from mole_diffusion.core.mixture import Mixture, inject
from mole_diffusion.core.networks.clip import TEXT_ENCODER_2
from mole_diffusion.core.records import GateWeight
from mole_diffusion.pictures.gates import GatesMixin

#: The UNet runs once with the gates, once as the base and once with the static LoRA.
_PASSES = 3

Progress = Callable[[int, int], Any]


@dataclass
class _Calibration:
    """One prompt's forwards of the UNet with the gates: inputs, and noise predictions on the CPU."""

    prompt: str
    guided: bool = False
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class _Ticker:
    """Counts UNet forwards for whoever shows progress."""

    total: int
    callback: Progress | None
    done: int = 0

    def tick(self, *_: object) -> None:
        self.done += 1
        if self.callback is not None:
            # Some schedulers run the UNet more often than they have steps.
            self.callback(min(self.done, self.total), self.total)


class ExportMixin(GatesMixin):
    """Export for a pipeline that has gates."""

    @torch.no_grad()
    def export_lora(
        self,
        path: str | Path,
        format: str = "diffusers",
        *,
        prompts: str | Sequence[str],
        steps: int = 20,
        guidance_scale: float = 7.5,
        seed: int = 0,
        rank: int | None = None,
        active_experts: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        callback: Progress | None = None,
    ) -> ExportReport:
        """Freeze the gates at their mean weights and write exactly that static mixture as one plain LoRA.

        The gates' strength and the experts' scales are inside: load the file with weight 1, in diffusers, in
        this library or in any program that knows the format. Means are taken over all steps and tokens of the
        calibration prompts, per gate and expert. With `composition="output"` the gates mix block outputs,
        which no LoRA can: the report says how far the result is from that.

        Args:
            path: file to write, ending in .safetensors; replaced whole or not at all.
            format: names of the tensors: "diffusers" (PEFT) or "kohya" (web UIs, ComfyUI).
            prompts: calibration prompts, like those the LoRA will be used for.
            steps: denoising steps per prompt.
            guidance_scale: classifier-free guidance while calibrating.
            seed: of the first prompt's noise; the following ones count up.
            rank: largest rank to keep (by SVD, with the error in the report); None keeps everything.
            active_experts: which experts go into the file; None is all.
            dtype: type of the factors in the file.
            callback: called with (UNet forwards done, in total).

        Returns:
            What was written and how far it is from the gates.

        Raises:
            NoExpertsError: no experts are loaded.
            UnknownExpertError, AllExpertsMaskedError: see `active_experts` of `__call__`.
            ConfigError: no prompt, an unknown format, a number out of range, or a pipeline that draws from
                pictures (`StableDiffusionMoLEPipeline.from_pipe(pipe)` shares its experts and gates).
        """
        self._need_experts("export_lora")
        self._need_text_to_image()
        target = check_target(path, format, rank)
        texts = _check_calibration(prompts, steps)
        names = tuple(name for name in self.experts if active_experts is None or name in active_experts)
        ticker = _Ticker(len(texts) * steps * _PASSES, callback)
        runs: list[_Calibration] = []
        rows: list[GateWeight] = []
        for i, text in enumerate(texts):
            run, weights = self._calibrate(text, steps, guidance_scale, seed + i, active_experts, ticker)
            runs.append(run)
            rows += weights
        frozen = mean_weights(rows)
        factors, error = static_factors(self.mixtures, frozen, names), 0.0
        if rank is not None:
            factors, error = compress(factors, rank)
        tensors = lora_tensors(factors, format, dtype, xl=hasattr(self, TEXT_ENCODER_2))
        metadata = self._export_metadata(names, texts, steps)
        static = Expert.from_state_dict(tensors, name="static", metadata=metadata)
        noise, effect = self._distance(runs, static, ticker)
        write_lora(target, tensors, metadata)
        return ExportReport(
            path=target,
            format=format,
            experts=names,
            weights=frozen,
            matrices=sum(map(len, factors.values())),
            ranks={part: max(pair.rank for pair in own.values()) for part, own in factors.items()},
            compression_error=error,
            noise_difference=noise,
            effect_difference=effect,
            prompts=tuple(texts),
            steps=steps,
        )

    def _calibrate(
        self,
        prompt: str,
        steps: int,
        guidance: float,
        seed: int,
        active: Sequence[str] | None,
        ticker: _Ticker,
    ) -> tuple[_Calibration, Sequence[GateWeight]]:
        """Draw a prompt with the gates; keeps the UNet's forwards and the gates' weights."""
        run = _Calibration(prompt)

        def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            run.inputs.append((copies, dict(kwargs)))
            run.outputs.append(_noise(output))
            ticker.tick()

        pipe: Any = self
        handle = pipe.unet.register_forward_hook(take, with_kwargs=True)
        try:
            pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                active_experts=active,
                output_type="latent",
            )
        finally:
            handle.remove()
        run.guided = pipe.do_classifier_free_guidance
        return run, self.gate_weights()

    def _distance(self, runs: Sequence[_Calibration], static: Expert, ticker: _Ticker) -> tuple[float, float]:
        """|static - gated| relative to |gated|, and to |gated - base|, over all forwards."""
        missed = gated = changed = 0.0
        for run in runs:
            with self.composing(mixture="none"):
                base = self._replay(run, ticker)
            with self._in_place_of_the_mixture(static):
                frozen = self._replay(run, ticker)
            for ours, plain, dynamic in zip(frozen, base, run.outputs, strict=True):
                missed += float((ours - dynamic).square().sum())
                gated += float(dynamic.square().sum())
                changed += float((dynamic - plain).square().sum())
        return _ratio(missed, gated), _ratio(missed, changed)

    def _replay(self, run: _Calibration, ticker: _Ticker) -> list[Tensor]:
        """The noise predictions for the same latents and steps with the networks as they are now."""
        pipe: Any = self
        encoded = pipe.encode_prompt(
            run.prompt,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=run.guided,
        )
        # Prompt and negative; for SDXL the same of the pooled text.
        text, *pooled = [
            torch.cat([negative, prompt]) if run.guided else prompt
            for prompt, negative in zip(encoded[::2], encoded[1::2], strict=True)
        ]
        predictions = []
        for args, given in run.inputs:
            kwargs = {**given, "encoder_hidden_states": text}
            if pooled:
                kwargs["added_cond_kwargs"] = {**given["added_cond_kwargs"], "text_embeds": pooled[0]}
            predictions.append(_noise(pipe.unet(*args, **kwargs)))
            ticker.tick()
        return predictions

    def _need_text_to_image(self) -> None:
        pipe: Any = self
        if "image" in inspect.signature(pipe.diffusers_class.__call__).parameters:
            raise ConfigError(
                f"export_lora draws from text, and {type(self).__name__} draws from a picture; make a"
                " text-to-image pipeline of it with from_pipe: it shares experts and gates"
            )

    @contextmanager
    def _in_place_of_the_mixture(self, expert: Expert) -> Iterator[None]:
        """The networks with one expert alone, without gates, inside the `with` block."""
        mixtures = self.mixtures
        alone: list[Mixture] = []
        for mixture in mixtures.values():
            mixture.eject()
        try:
            for part, mixture in mixtures.items():
                if expert.factors.get(part):
                    alone.append(inject(mixture.network, [expert], MoLEConfig.uniform(), part=part))
            yield
        finally:
            for mixture in alone:
                mixture.eject()
            for mixture in mixtures.values():
                mixture.attach()

    def _export_metadata(self, names: Sequence[str], prompts: Sequence[str], steps: int) -> Mapping[str, str]:
        """What the file says about itself; the triggers make it a ready expert for this library."""
        experts = [self.experts[name] for name in names]
        triggers = [trigger for expert in experts for trigger in expert.triggers]
        sources = [{"name": e.name, "sha256": e.sha256, "scale": e.scale} for e in experts]
        return {
            **self._base_facts(),
            **({"mole.trigger": "|".join(triggers)} if triggers else {}),
            "mole.kind": "static mixture",
            "mole.experts": json.dumps(sources),
            "mole.calibration": json.dumps({"prompts": list(prompts), "steps": steps}),
        }


def _check_calibration(prompts: str | Sequence[str], steps: int) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError(f"prompts is {prompts!r}; gates are frozen over at least one prompt, none empty")
    if steps < 1:
        raise ConfigError(f"steps is {steps!r}; allowed are whole numbers from 1")
    return texts


def _noise(output: Any) -> Tensor:
    """The prediction among what a UNet returns, float32 on the CPU."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found.detach().float().cpu()


def _ratio(part: float, whole: float) -> float:
    """Ratio of two norms given as squares; 0 where both vanish."""
    if part == 0.0:
        return 0.0
    return float("inf") if whole == 0.0 else (part / whole) ** 0.5

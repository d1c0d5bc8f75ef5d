"""Drawing: a pipeline with a set of experts, each method prepared once, pictures by seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.pictures.protocol import ALONE, MASKED, SINGLE, Protocol, Variant
from mole_diffusion.evaluation.pictures.sets import Scene
from mole_diffusion.methods import METHODS, PrepareOptions, prepare
from mole_diffusion.pictures.components import call_arguments, guidance_arguments, size_arguments
from mole_diffusion.pictures.drawing import draw
from mole_diffusion.pictures.opening import open_base
from mole_diffusion.pictures.style_balance import InBalance

#: Folder of the preparations, and what `baselines.prepare` writes last.
PREPARED, RECORD = "prepared", "prepared.json"


def needs_preparation(method: Variant) -> bool:
    """Whether something is trained, searched or merged before it can draw."""
    return method.kind == MASKED or (not method.single and METHODS[method.kind].needs_preparation)


def check_methods(protocol: Protocol) -> None:
    """Raise ConfigError if a method is a variant of nothing that exists, or has unknown options."""
    known = [*METHODS, *SINGLE]
    for method in protocol.methods:
        if method.kind not in known:
            raise ConfigError(
                f"method {method.name!r}: base {method.kind!r} does not exist; allowed are {known}"
            )
        prepare_options(method)


def prepare_options(method: Variant) -> PrepareOptions:
    """The options of a method's preparation.

    Raises:
        ConfigError: one that does not exist, or a value out of range.
    """
    # Pictures are no plain values: they come with the experts.
    known = [field.name for field in fields(PrepareOptions) if field.name != "pictures"]
    if unknown := [name for name in method.options if name not in known]:
        raise ConfigError(f"method {method.name!r}: unknown options {unknown}; allowed are {known}")
    return PrepareOptions(**method.options)


@dataclass(frozen=True)
class Drawn:
    """Pictures of one call, seconds per picture and (on a GPU) the peak memory in MiB."""

    pictures: list[Image]
    seconds: float
    peak_mib: float | None


class Stage:
    """One set of experts, ready to be drawn by one method after the other.

    Args:
        protocol: what is drawn.
        scene: the set.
        device: where.
        folder: of the evaluation; preparations go into `prepared/SET/METHOD`.
    """

    def __init__(self, protocol: Protocol, scene: Scene, device: torch.device, folder: Path) -> None:
        self.protocol, self.scene, self.device, self.folder = protocol, scene, device, folder
        self.pipe = self._open()
        self._plain: Any = None
        self._plain_expert: str | None = None
        self._ready: tuple[str, Any] | None = None

    def prepared_folder(self, method: Variant) -> Path:
        """Where the preparation of a method lies."""
        return self.folder / PREPARED / self.scene.name / method.name

    def is_prepared(self, method: Variant) -> bool:
        """Whether its preparation is finished."""
        return (self.prepared_folder(self.protocol.prepared_as(method)) / RECORD).is_file()

    def prepare(self, method: Variant) -> Any:
        """What `pipe(mixture=...)` takes for this method; prepared now, or found in its folder."""
        if not needs_preparation(method):
            return method.mixture()
        method = self.protocol.prepared_as(method)
        if self._ready is None or self._ready[0] != method.name:
            config = self.protocol.mole_config(method)
            if config != self.pipe.mole_config:
                self.pipe.configure(config)
            prepared = prepare(
                method.kind,
                self.pipe,
                prompts=list(self.scene.training_prompts),
                concepts=self.scene.training_concepts(method.references),
                config=self.protocol.training_config(method),
                folder=self.prepared_folder(method),
                options=prepare_options(method),
            )
            self._ready = method.name, prepared
        return self._ready[1]

    def draw(
        self,
        method: Variant,
        prompt: int,
        seeds: Sequence[int],
        alone: str | None = None,
        active: Sequence[str] | None = None,
    ) -> Drawn:
        """Pictures of a prompt, one per seed.

        Args:
            method: who draws.
            prompt: index of the prompt.
            seeds: each picture has a generator of its own, so that a batch changes nothing.
            alone: the only expert, with methods that draw one at a time.
            active: the experts that are not masked; None is all.
        """
        pipe, options = self._artist(method, alone)
        options = {**options, **self._how(pipe, method)}
        if active is not None:
            options["active_experts"] = list(active)
        text = self.scene.prompts[prompt] if alone is None else self.scene.alone_prompt(prompt, alone)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.monotonic()
        with self._autocast():
            pictures = draw(
                pipe,
                [text] * len(seeds),
                seeds,
                **options,
            )
        seconds = (time.monotonic() - start) / len(seeds)
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None
        return Drawn(pictures, seconds, peak)

    def _how(self, pipe: Any, method: Variant) -> dict[str, Any]:
        """Steps, guidance and size of a call, by the names that the pipeline has.

        Raises:
            ConfigError: the pipeline knows no `guidance_rescale`, and the protocol asks for it.
        """
        protocol = self.protocol
        scale = protocol.guidance if method.guidance is None else method.guidance
        found = {"num_inference_steps": protocol.steps, **guidance_arguments(pipe, scale)}
        if "guidance_rescale" in call_arguments(pipe):
            found["guidance_rescale"] = protocol.guidance_rescale
        elif protocol.guidance_rescale:
            raise ConfigError(
                f"guidance_rescale is {protocol.guidance_rescale:g}, and {type(pipe).__name__} knows none; "
                "allowed is 0"
            )
        if protocol.size is not None:
            found |= size_arguments(pipe, protocol.size, protocol.size)
        return found

    def _artist(self, method: Variant, alone: str | None) -> tuple[Any, dict[str, Any]]:
        """The pipeline that draws, and what it is called with beside prompt and sampler."""
        if alone is None:
            mixture = self.prepare(method)
            if method.balance is not None:
                mixture = InBalance(mixture, method.balance)
            return self.pipe, {"mixture": mixture}
        if method.kind == ALONE:
            return self.pipe, {"mixture": {alone: 1.0}}
        if method.kind == MASKED:
            return self.pipe, {"mixture": self.prepare(method), "active_experts": [alone]}
        if self._plain is None:
            self._plain = self._open(experts=False)
        if self._plain_expert != alone:
            self._plain.unload_lora_weights()
            self._plain.load_lora_weights(self.scene.files[alone])
            self._plain_expert = alone
        return self._plain, {}

    def _autocast(self) -> Any:
        if self.protocol.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _open(self, experts: bool = True) -> Any:
        pipe = open_base(self.protocol.model, str(self.device))
        for name, file in self.scene.files.items() if experts else ():
            pipe.load_expert(file, name=name)
        pipe.unload_shared_gates()  # the starter's: protocols say which methods have some
        if self.protocol.sampler is not None:
            pipe.scheduler = _sampler(self.protocol.sampler).from_config(pipe.scheduler.config)
        return pipe


def _sampler(name: str) -> Any:
    import diffusers

    sampler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if sampler is None:
        raise ConfigError(f"sampler is {name!r}; allowed are the scheduler classes of diffusers")
    return sampler

"""Which parameters train, and training state on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mole_diffusion.core.errors import TrainingError
from mole_diffusion.core.files import replacing
from mole_diffusion.core.networks.unet import UNET
from mole_diffusion.pictures.training.config import TrainingConfig

if TYPE_CHECKING:
    from mole_diffusion.core.mixture import Mixture

STATE_FILE = "state.pt"
GATES_FILE = "gates.safetensors"
HISTORY_FILE = "history.jsonl"
FORMAT_VERSION = 1


def trained(mixtures: Mapping[str, Mixture], config: TrainingConfig) -> dict[str, Mixture]:
    """The mixtures whose gates train: the UNet's, and the text encoders' where wanted or all there is."""
    if config.text_encoder_gates or UNET not in mixtures:
        return dict(mixtures)
    return {UNET: mixtures[UNET]}


def parameter_groups(mixtures: Mapping[str, Mixture], config: TrainingConfig) -> list[dict[str, Any]]:
    """Groups for the optimiser, each with its learning rate: projections and scalars (strength, temperature).

    Args:
        mixtures: those that train, see `trained`.
        config: the settings.

    Raises:
        TrainingError: if no gate has anything to train, or one is not float32.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for part, mixture in mixtures.items():
        for name, parameter in mixture.gates.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype != torch.float32:
                raise TrainingError(
                    f"gate {part}.{name} is {parameter.dtype}; gates are trained in torch.float32"
                )
            projection_lr = config.flatten_lr if mixture.config.pooling == "flatten" else config.gate_lr
            rate = config.scalar_lr if parameter.numel() == 1 else projection_lr
            groups.setdefault(rate, []).append(parameter)
    if not groups:
        raise TrainingError(f"no gate of {list(mixtures)} has a parameter to train")
    return [{"params": parameters, "lr": rate, "full_lr": rate} for rate, parameters in groups.items()]


def learning_rate_factor(config: TrainingConfig, iteration: int) -> float:
    """Share of the full learning rate in this iteration (from 0)."""
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))


@contextmanager
def only_gates_train(modules: Iterable[nn.Module], gates: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze all modules but the gates and put them into evaluation mode; undone afterwards.

    Raises:
        TrainingError: if a gate is a parameter of a frozen module.
    """
    modules, gates = list(modules), list(gates)
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    modes = [(module, module.training) for module in modules]
    for module in modules:
        module.requires_grad_(False).eval()
    try:
        trained = {id(gate) for gate in gates}
        if not all(gate.requires_grad for gate in gates) or any(id(p) in trained for p, _ in flags):
            raise TrainingError("a gate is part of a frozen network: gates must live outside the networks")
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.train(mode)


@contextmanager
def resting(mixtures: Mapping[str, Mixture], training: Mapping[str, Mixture]) -> Iterator[None]:
    """Ask no gradient of gates that do not train; undone afterwards."""
    parameters = [
        p for part, mixture in mixtures.items() if part not in training for p in mixture.parameters()
    ]
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def gradient_checkpointing(modules: Iterable[Any], wanted: bool) -> Iterator[None]:
    """Switch on the gradient checkpointing of diffusers models, and off again where it was off."""
    changed = [module for module in modules if wanted and not module.is_gradient_checkpointing]
    for module in changed:
        module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module in changed:
            module.disable_gradient_checkpointing()


@contextmanager
def full_precision(decoders: Iterable[Any]) -> Iterator[None]:
    """Let autoencoders that overflow in float16 (SDXL's) compute in float32; undone without a loss."""
    widened = [
        decoder
        for decoder in {id(decoder): decoder for decoder in decoders}.values()
        if decoder.dtype == torch.float16 and decoder.config.get("force_upcast")
    ]
    for decoder in widened:
        decoder.to(torch.float32)
    try:
        yield
    finally:
        for decoder in widened:
            decoder.to(torch.float16)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training state; a reader sees the old one or the new one, never half of it."""
    with replacing(folder / STATE_FILE) as temporary:
        torch.save({"format_version": FORMAT_VERSION, **state}, temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The training state of a folder, or None. Loads tensors and plain values only, never code.

    Raises:
        TrainingError: if the state was written by a newer version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state.get("format_version") != FORMAT_VERSION:
        raise TrainingError(
            f"{path} has format version {state.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    return state


def differences(facts: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a training and a saved one do not have in common, a line each."""
    names = dict.fromkeys([*facts, *saved])
    return [
        f"{name}: {facts.get(name)!r} now, {saved.get(name)!r} in the checkpoint"
        for name in names
        if facts.get(name) != saved.get(name)
    ]

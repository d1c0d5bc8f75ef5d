"""PEFT's merges: several experts become one LoRA by `LoraModel.add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.experts import load_expert
from mole_diffusion.core.export import lora_header, write_lora
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.core.keys import factor_keys
from mole_diffusion.core.matrices import MatrixSlot
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.core.mixture_set import MixtureSet
from mole_diffusion.core.modules import kernel_size
from mole_diffusion.methods.prepared import Prepared, standing
from mole_diffusion.pictures.choosing import Request

if TYPE_CHECKING:
    from mole_diffusion.methods.job import Job

LORA_FILE = "merged.safetensors"
#: Share of the values that is kept, as in PEFT's guide to merging.
DENSITIES = {"ties": 0.2, "dare_linear": 0.7}
_MERGED = "merged"


def merge(method: str, job: Job) -> None:
    """Merge the experts of a pipeline into one LoRA file, which any program can load.

    Args:
        method: "svd", "ties" or "dare_linear".
        job: weights and density are read from its options; an expert's own scale multiplies its weight.

    Raises:
        ConfigError: PEFT cannot merge these experts.
    """
    experts = job.pipe.experts
    asked = job.options.weights or dict.fromkeys(experts, 1.0)
    if missing := [name for name in experts if name not in asked]:
        raise ConfigError(f"weights names {list(asked)}; the experts {missing} have none")
    weights = {name: float(asked[name]) * expert.scale for name, expert in experts.items()}
    density = None
    if method in DENSITIES:
        density = DENSITIES[method] if job.options.density is None else job.options.density
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)  # dare drops at random
        for part, mixture in job.pipe.mixtures.items():
            tensors |= _merge_part(method, part, mixture, weights, density)
    metadata = lora_header(f"merge {method}", experts.values(), job.pipe.ensemble.facts)
    write_lora(job.folder / LORA_FILE, tensors, metadata)
    job.details.update(weights=weights, density=density)


def _merge_part(
    method: str, part: str, mixture: Mixture, weights: Mapping[str, float], density: float | None
) -> dict[str, Tensor]:
    """The merged LoRA of one network, by key of a LoRA file as diffusers writes it.

    PEFT merges adapters of a model. This one has the matrices of the network and no weights worth a name:
    merges do not look at them, and the pipeline's networks stay untouched.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    slots = {_key(slot.name): slot for group in mixture.groups for slot in group.slots}
    owned: dict[str, dict[str, LoraFactors]] = {}
    for index, name in enumerate(mixture.expert_names):
        own = {key: slot.factors[index] for key, slot in slots.items() if index in slot.factors}
        if own:
            owned[name] = own
            _check_biases(name, own)
    configs = {name: _config(LoraConfig, own) for name, own in owned.items()}
    names = list(owned)
    model = LoraModel(nn.ModuleDict({key: _shell(slot) for key, slot in slots.items()}), configs, names[0])
    for name in names[1:]:
        model.inject_adapter(model.model, name)
    for name, own in owned.items():
        for key, factors in own.items():
            layer = model.model[key]
            _fill(layer.lora_A[name].weight, factors.down)
            _fill(layer.lora_B[name].weight, factors.up)
    try:
        model.add_weighted_adapter(
            names,
            [weights[name] for name in names],
            _MERGED,
            combination_type=method,
            density=density,
            svd_full_matrices=False,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        ranks = {name: sorted({f.rank for f in own.values()}) for name, own in owned.items()}
        raise ConfigError(
            f"PEFT cannot merge these experts by {method!r} ({part}, ranks {ranks}): {error}. Experts of "
            "different ranks can be merged by 'svd', or loaded with load_expert(..., rank=...) of one rank."
        ) from error
    merged: dict[str, Tensor] = {}
    for key, slot in slots.items():
        layer = model.model[key]
        keys = factor_keys(part, slot.name, "diffusers")
        for role, factor in (("down", layer.lora_A), ("up", layer.lora_B)):
            merged[keys[role]] = factor[_MERGED].weight.detach().clone().contiguous()
    return merged


def _key(matrix: str) -> str:
    """A matrix name as a key of a ModuleDict, which may not contain dots."""
    return matrix.replace(".", "__")


def check_biases(mixture: Mixture) -> None:
    """Raise ConfigError if an expert changes biases, which no merge here can."""
    slots = [slot for group in mixture.groups for slot in group.slots]
    for index, name in enumerate(mixture.expert_names):
        _check_biases(name, {slot.name: slot.factors[index] for slot in slots if index in slot.factors})


def _check_biases(name: str, own: Mapping[str, LoraFactors]) -> None:
    with_bias = [key for key, factors in own.items() if factors.bias is not None]
    if with_bias:
        raise ConfigError(
            f"expert {name!r} changes the bias of {len(with_bias)} matrices, which a merge cannot"
        )


def _config(cls: Any, own: Mapping[str, LoraFactors]) -> Any:
    """The adapter of one expert, with its own rank and alpha for every matrix."""
    first = next(iter(own.values()))
    return cls(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=list(own),
        rank_pattern={key: f.rank for key, f in own.items() if f.rank != first.rank},
        alpha_pattern={key: f.alpha for key, f in own.items() if f.alpha != first.alpha},
        init_lora_weights=False,
    )


def _shell(slot: MatrixSlot) -> nn.Module:
    """A layer of the matrix' shape; nobody reads its weight, which takes no memory until somebody does."""
    out, fan_in = slot.shape
    kernel = kernel_size(slot.module)
    if kernel is None:
        return nn.Linear(fan_in, out, bias=False, device="meta").to_empty(device="cpu")
    return nn.Conv2d(fan_in, out, kernel, bias=False, device="meta").to_empty(device="cpu")


def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.data = values.detach().float().reshape(parameter.shape).clone()


class PreparedMerge(Prepared):
    """The merged LoRA as the only expert, at weight 1."""

    _merged: MixtureSet | None = None

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        request.refuse_options(self.label)

        def build() -> MixtureSet:
            expert = load_expert(self.folder / LORA_FILE, name=_MERGED)
            built: MixtureSet = pipe.ensemble.build([expert], MoLEConfig())
            return built

        self._merged = standing(pipe, self._merged, build)
        with pipe.ensemble.standing_in(self._merged), pipe.composing(mixture={_MERGED: 1.0}):
            yield

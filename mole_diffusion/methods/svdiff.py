"""SVDiff (Han et al. 2023, arXiv 2303.11305): a concept is a shift of the singular values of every weight.

`W = U diag(relu(s + shift)) V^T`, with the shifts of several concepts added. Linear and convolution weights
of UNet and text encoders are trained; the paper also moves norms and biases, at a thousandth of the rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.methods.concept_training import ConceptTrainer
from mole_diffusion.methods.job import ConceptRecipe, Job
from mole_diffusion.methods.prepared import Prepared
from mole_diffusion.methods.replaced import replaced_weights, weight_layers
from mole_diffusion.pictures.choosing import Request
from mole_diffusion.pictures.components import networks_of

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept

SHIFTS_FILE = "shifts.safetensors"
#: The paper: a learning rate of 1e-3 for the shifts, 500 steps and more; prior preservation of weight 1.
#: The rate is for the starter, which learns little with less; large bases want the paper's.
RECIPE = ConceptRecipe(steps=400, rate=5e-2, batch=4, prior=2)
_KINDS = (nn.Linear, nn.Conv2d)


@dataclass
class Spectrum:
    """Singular value decomposition of one weight.

    Attributes:
        weight: the weight itself.
        u, s, vh: (out, k), (k,), (k, in * kernel), float32.
    """

    weight: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Spectrum:
        """Decompose a weight (out, in) or (out, in, kh, kw)."""
        u, s, vh = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
        return cls(weight.detach(), u, s, vh)

    def shifted(self, shift: Tensor) -> Tensor:
        """The weight with its singular values shifted by (k,), none below 0; with gradient.

        Bitwise the weight itself where the shift is 0.
        """
        change = torch.relu(self.s + shift.to(self.s.device)) - self.s
        delta = (self.u * change) @ self.vh
        return self.weight + delta.view(self.weight.shape).to(self.weight.dtype)


class Spectra:
    """Decompositions of all weights of a pipeline's networks, made once."""

    def __init__(self, pipe: Any) -> None:
        self.layers = _layers(pipe)
        self.spectra = {name: Spectrum.of(_weight(layer)) for name, layer in self.layers.items()}

    @contextmanager
    def shifted(self, shifts: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with shifted weights, with gradient, inside the `with` block."""
        weights = {name: self.spectra[name].shifted(shift) for name, shift in shifts.items()}
        with replaced_weights(self.layers, weights):
            yield


def train(method: str, job: Job) -> None:
    """Train the shifts of every concept of a job; writes them into one file.

    Raises:
        ConfigError: a concept has no pictures, or the networks are quantised or offloaded.
    """
    trainer = ConceptTrainer(method, job, job.recipe(RECIPE))
    spectra: list[Spectra] = []

    def train_one(trainer: ConceptTrainer, concept: Concept) -> dict[str, Tensor]:
        with trainer.frozen():
            if not spectra:
                spectra.append(Spectra(job.pipe))
            return _train_one(trainer, concept, spectra[0])

    found = trainer.results(train_one)
    tensors = {f"{concept}/{key}": value for concept, own in found.items() for key, value in own.items()}
    write_safetensors(job.folder / SHIFTS_FILE, tensors, {"format": "pt"})
    job.details.update(steps=trainer.recipe.steps, rate=trainer.recipe.rate)


def _train_one(trainer: ConceptTrainer, concept: Concept, spectra: Spectra) -> dict[str, Tensor]:
    shifts = {name: torch.zeros_like(one.s).requires_grad_() for name, one in spectra.spectra.items()}
    pictures, prior = trainer.pictures(concept), trainer.prior(concept)
    trainer.fit(list(shifts.values()), lambda: spectra.shifted(shifts), pictures, prior)
    return {name: shift.detach().cpu() for name, shift in shifts.items()}


class PreparedShifts(Prepared):
    """The sum of the concepts' shifts, in place of any LoRA."""

    needs_experts = False
    _weights: tuple[dict[str, nn.Module], dict[str, Tensor]] | None = None

    @contextmanager
    def _engaged(self, pipe: Any, request: Request) -> Iterator[None]:
        request.refuse_options(self.label)
        layers, weights = self._composed(pipe)
        with ExitStack() as stack:
            stack.enter_context(pipe.composing(mixture="none"))
            stack.enter_context(replaced_weights(layers, weights))
            yield

    def _composed(self, pipe: Any) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
        """The layers of a pipeline and their weights with all shifts; kept while the weights are the same."""
        if self._weights is not None:
            layers, weights = self._weights
            same = _layers(pipe)
            if same.keys() == layers.keys() and all(
                same[name] is layers[name]
                and weights[name].device == _weight(layers[name]).device
                and weights[name].dtype == _weight(layers[name]).dtype
                for name in weights
            ):
                return self._weights
        layers = _layers(pipe)
        sums: dict[str, Tensor] = {}
        for key, shift in load_file(self.folder / SHIFTS_FILE).items():
            name = key.split("/", 1)[1]
            sums[name] = sums[name] + shift if name in sums else shift
        # A weight of the same numbers elsewhere in memory is not the same to every CPU.
        sums = {name: total for name, total in sums.items() if total.any()}
        with torch.no_grad():
            weights = {
                name: Spectrum.of(_weight(layers[name])).shifted(shift) for name, shift in sums.items()
            }
        self._weights = layers, weights
        return self._weights


def _layers(pipe: Any) -> dict[str, nn.Module]:
    """ "PART/NAME" -> layer, of all networks."""
    return {
        f"{part}/{name}": layer
        for part, network in networks_of(pipe).items()
        for name, layer in weight_layers(network, _KINDS).items()
    }


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight

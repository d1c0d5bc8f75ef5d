"""What models, experts and gates take in memory: arithmetic on published configurations, nothing is measured.

    python bench/memory.py            # writes bench/results/memory-models.md and memory-cards.md
    python bench/memory.py --check    # fails where they say something else

Networks are built without storage (PyTorch's meta device) from `bench/models.json`, which says where each
configuration is from; experts and gates are attached to them, and their numbers are counted.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert, ExpertReport
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.core.mixture import inject
from mole_diffusion.core.modules import matrix_shape
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.base import ATTENTION, EMBEDDING, Site

HERE = Path(__file__).resolve().parent
RANK, EXPERTS = 16, 3
#: Bits of a matrix's weight; GGUF's blocks are 34 bytes for 32 weights and 144 for 256.
BITS = {"bf16": 16.0, "Q8_0": 8.5, "fp8": 8.0, "Q4_K": 4.5}
CARDS = (8, 12, 24)
#: Bytes that are kept for PyTorch, activations of a picture of 1024 pixels and the autoencoder: a guess.
RESERVE = 1.5e9
#: Tokens of the picture of 1024 pixels that training is counted for.
TOKENS = 64 * 64
#: A gate's number in training: itself, its gradient and Adam's two moments, in float32.
TRAINED = 4 * 4


@dataclass(frozen=True)
class Network:
    """A network's numbers: all of them, and those in matrices, which quantised files have in few bits."""

    numbers: int
    in_matrices: int

    def size(self, form: str) -> float:
        """Bytes with matrices in a form of `BITS`, all else in bfloat16."""
        return self.in_matrices * BITS[form] / 8 + (self.numbers - self.in_matrices) * 2


@dataclass(frozen=True)
class Model:
    """What is counted of a model.

    Attributes:
        network: the one that predicts.
        texts: by name.
        expert: numbers of one of rank 16 on attention and feed-forward of all blocks.
        gates: numbers of three experts' gates, in their default form.
        kept: bytes of what recomputing training keeps of one picture: the input of each block; None for a
            UNet, whose blocks are of several sizes.
    """

    network: Network
    texts: Mapping[str, Network]
    expert: int
    gates: int
    kept: int | None

    @property
    def largest_text(self) -> Network:
        """The largest text encoder: with offloading one network is on the card at a time."""
        return max(self.texts.values(), key=lambda one: one.numbers)

    def drawing(self, form: str) -> float:
        """Bytes on the card while the network with a form of weights draws with three experts."""
        return self.network.size(form) + 2 * EXPERTS * self.expert + 4 * self.gates + RESERVE

    def training(self, form: str) -> float:
        """The same while gates are trained, one picture at a time, with gradient checkpointing."""
        whole = self.network.size(form) + 2 * EXPERTS * self.expert + TRAINED * self.gates
        return whole + (self.kept or 0) + RESERVE


def built(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """A network without storage.

    Args:
        kind: "library.Class".
        config: arguments of a class of diffusers; of the configuration of one of transformers.
    """
    library, _, name = kind.partition(".")
    cls = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        network: nn.Module = cls(cls.config_class(**config)) if library == "transformers" else cls(**config)
    return network


def counted(network: nn.Module) -> Network:
    """A network's numbers, those of tables that are kept with the weights (SD 3's places) among them."""
    matrices = (one.weight.numel() for one in network.modules() if isinstance(one, nn.Linear))
    kept = network.state_dict().keys()
    tables = (one.numel() for name, one in network.named_buffers() if name in kept)
    return Network(sum(one.numel() for one in network.parameters()) + sum(tables), sum(matrices))


def chosen_sites(network: nn.Module) -> list[Site]:
    """Matrices of attention and feed-forward of all blocks, which most LoRAs change."""
    return [
        site
        for site in map_network(network).sites
        if site.kind == ATTENTION and site.stream != EMBEDDING and site.block != site.name
    ]


def expert_on(network: nn.Module, name: str) -> Expert:
    """A LoRA of rank 16, without storage, for the usual matrices."""
    layout = map_network(network)
    factors = {}
    with torch.device("meta"):
        for site in chosen_sites(network):
            out, fan_in = matrix_shape(network.get_submodule(site.path))
            factors[site.name] = LoraFactors(torch.empty(RANK, fan_in), torch.empty(out, RANK), float(RANK))
    return Expert(name, 1.0, name, {}, {layout.part: factors}, ExpertReport((), {}, ()))


def model_of(known: Mapping[str, Any], texts: Mapping[str, Network]) -> Model:
    """Count a model of `models.json`."""
    network = built(known["class"], known["config"])
    experts = [expert_on(network, str(number)) for number in range(EXPERTS)]
    own = counted(network)
    (factors,) = experts[0].factors.values()
    expert = sum(sum(one.numel() for one in pair.matrices) for pair in factors.values())
    mixture = inject(network, experts, MoLEConfig())
    gates = sum(one.numel() for one in mixture.parameters())
    kept = None
    if "words" in known:
        inputs: dict[str, int] = {}
        for site in chosen_sites(network):
            inputs.setdefault(site.block, matrix_shape(network.get_submodule(site.path))[1])
        kept = sum(inputs.values()) * (TOKENS + known["words"]) * 2
    return Model(own, {name: texts[name] for name in known["texts"]}, expert, gates, kept)


def all_models() -> dict[str, Model]:
    """Every model of `models.json`, by its name."""
    known = json.loads((HERE / "models.json").read_text(encoding="utf-8"))
    texts = {
        name: counted(built(one["class"], one["config"])) for name, one in known["text encoders"].items()
    }
    return {name: model_of(one, texts) for name, one in known["models"].items()}


def models_table(models: Mapping[str, Model]) -> str:
    """Sizes of networks in every form, of experts and gates."""
    lines = [
        "| model | network, 10^9 numbers | bf16 | fp8 | Q8_0 | Q4_K | text encoders, 10^9 numbers | bf16 |"
        " an expert of rank 16 | gates of three experts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in models.items():
        texts = ", ".join(f"{text} {found.numbers / 1e9:.2f}" for text, found in one.texts.items())
        sizes = [f"{one.network.size(form) / 1e9:.1f} GB" for form in ("bf16", "fp8", "Q8_0", "Q4_K")]
        lines.append(
            f"| {name} | {one.network.numbers / 1e9:.2f} | {' | '.join(sizes)} | {texts} | "
            f"{sum(found.size('bf16') for found in one.texts.values()) / 1e9:.1f} GB | "
            f"{2 * one.expert / 1e6:.0f} MB | {4 * one.gates / 1e6:.1f} MB |"
        )
    lines += ["", "Counted on the networks themselves, not measured. Made by `python bench/memory.py`."]
    return "\n".join(lines) + "\n"


def cards_table(models: Mapping[str, Model]) -> str:
    """The best form that fits each card, for drawing and for training."""
    heads = [f"{what}, {card} GB" for what in ("drawing", "training") for card in CARDS]
    lines = [f"| model | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, one in models.items():
        cells = [_best(one, card, training=False) for card in CARDS]
        cells += [_best(one, card, training=True) for card in CARDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Counted, not measured. Made by `python bench/memory.py`."]
    return "\n".join(lines) + "\n"


def _best(model: Model, card: int, *, training: bool) -> str:
    """The network's form, and that of the largest text encoder where bfloat16 is too large for the card."""
    if training and model.kept is None:
        return "not counted"
    room = card * 2**30
    needed = model.training if training else model.drawing
    network = next((form for form in BITS if needed(form) <= room), None)
    text = next((form for form in BITS if model.largest_text.size(form) + RESERVE <= room), None)
    if network is None:
        return "layer by layer" if not training else "no"
    if text == "bf16":
        return network
    return f"{network}; texts {text or 'layer by layer'}"


def main() -> None:
    """Write the tables, or check them."""
    models = all_models()
    tables = {"memory-models.md": models_table(models), "memory-cards.md": cards_table(models)}
    for name, text in tables.items():
        path = HERE / "results" / name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{name} is out of date: python bench/memory.py")


if __name__ == "__main__":
    main()

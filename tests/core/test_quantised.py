"""Bases with quantised weights, where their libraries are installed: hooks hold none of them.

Neither library is among the project's own: `pip install torchao gguf`. bitsandbytes has no tests here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny.networks import make_experts, randomise, run, states, with_peft
from tiny.transformers import KINDS, flux_inputs
from torch import Tensor, nn

from mole_diffusion import MoLEConfig, inject

NAMES = ("boot", "cat")
#: Of the largest value that comes out; quantised products sum up in another order.
TOLERANCE = 1e-4


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"quantised bases of {library} need it installed"
    )


def int8(network: nn.Module) -> nn.Module:
    """torchao's: a scale for each row of a weight."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig())
    return network


def written_back(network: nn.Module, plain: nn.Module, value_of: Callable[[Any], Tensor]) -> nn.Module:
    """A plain network with the weights that a quantised one computes with."""
    quantised = {
        name: module.weight for name, module in network.named_modules() if isinstance(module, nn.Linear)
    }
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(value_of(quantised[name]))
    return plain


def check_invariants(network: nn.Module, plain: nn.Module, run: Callable[[nn.Module], Tensor] = run) -> None:
    """One expert is that LoRA on the weights as they are, and eject gives the base back; twice in a row."""
    base = run(network)
    experts, loras = make_experts(2, plain), states(2, plain)
    names = [expert.name for expert in experts]
    expected = run(with_peft(plain, {names[1]: loras[names[1]]}, {names[1]: 1.0}))
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
    for _ in range(2):
        mixture = inject(network, experts, MoLEConfig(strength=1.0, learn_strength=False))
        randomise(mixture)
        assert (run(network) - base).abs().max() > 0.01 * base.abs().max()
        mixture.activate([names[1]])
        found = run(network)
        mixture.eject()
        assert torch.equal(run(network), base)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@needs("torchao")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_int8_weights(kind: type) -> None:
    network, plain = int8(KINDS[kind].make()), KINDS[kind].make()
    quantised = [one for one in network.parameters() if type(one.data) is not Tensor]
    assert len(quantised) > 10
    check_invariants(network, written_back(network, plain, lambda weight: weight.dequantize()))


@needs("gguf")
def test_gguf_through_the_loader_of_diffusers(tmp_path: Path) -> None:
    """FLUX.1 in blocks of eight bits; rows that are no whole blocks stay as they are."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    plain = KINDS[FluxTransformer2DModel].make()
    write_gguf(plain.state_dict(), tmp_path / "flux.gguf")
    plain.save_config(tmp_path / "config")
    network = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    ).eval()
    assert sum(isinstance(one, GGUFParameter) for one in network.parameters()) > 10

    def value_of(weight: Tensor) -> Tensor:
        return dequantize_gguf_tensor(weight) if isinstance(weight, GGUFParameter) else weight

    @torch.no_grad()
    def answer(network: nn.Module) -> Tensor:
        found: Tensor = network(**flux_inputs()).sample
        return found

    check_invariants(network, written_back(network, plain, value_of), answer)


def write_gguf(weights: dict[str, Tensor], path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "flux")
    for name, value in weights.items():
        array = value.float().numpy()
        if value.dim() == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

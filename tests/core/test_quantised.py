"""Bases with quantised weights, where their libraries are installed: hooks hold none of them.

None of the libraries is among the project's own: `pip install torchao gguf bitsandbytes`.
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
#: What reads more axes than pictures, tokens and features: bitsandbytes' own product of 8 bits fails there.
MANY_AXES = ("patch_embed.proj", "text_fusion.projector")
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


def bitsandbytes(network: nn.Module, kind: str) -> nn.Module:
    """All linear layers as bitsandbytes has them: "nf4" in blocks of 4 bits, or "int8" with int8 inputs."""
    import bitsandbytes as library

    for name, module in list(network.named_modules()):
        if type(module) is not nn.Linear or (kind == "int8" and name in MANY_AXES):
            continue
        size, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "nf4":
            made = library.nn.Linear4bit(*size, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            # Its packing for AVX-512 is for matrices larger than these.
            made.support_avx512bf16_for_cpu = False
        else:
            made = library.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        made.load_state_dict(module.state_dict())
        made.requires_grad_(False)
        network.set_submodule(name, made.to("cpu"))
    return network.eval()


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


def check_invariants(
    network: nn.Module,
    plain: nn.Module,
    run: Callable[[nn.Module], Tensor] = run,
    oracle: nn.Module | None = None,
) -> None:
    """One expert is that LoRA on the weights as they are, and eject gives the base back; twice in a row.

    Args:
        network: a quantised one.
        plain: the same with plain weights; PEFT's layers are put around these, unless there is an `oracle`.
    """
    base = run(network)
    experts, loras = make_experts(2, plain), states(2, plain)
    names = [expert.name for expert in experts]
    expected = run(
        with_peft(plain if oracle is None else oracle, {names[1]: loras[names[1]]}, {names[1]: 1.0})
    )
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


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_4_bits_of_bitsandbytes(kind: type) -> None:
    from bitsandbytes.functional import dequantize_4bit

    network, plain = bitsandbytes(KINDS[kind].make(), "nf4"), KINDS[kind].make()
    assert sum(one.dtype == torch.uint8 for one in network.parameters()) > 10

    def value_of(weight: Any) -> Tensor:
        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found

    check_invariants(network, written_back(network, plain, value_of))


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_8_bits_of_bitsandbytes(kind: type) -> None:
    """Inputs are rounded too, so that no plain network says the same: PEFT on the quantised one does."""
    network, plain = bitsandbytes(KINDS[kind].make(), "int8"), KINDS[kind].make()
    assert sum(one.dtype == torch.int8 for one in network.parameters()) > 10
    check_invariants(network, plain, oracle=bitsandbytes(KINDS[kind].make(), "int8"))


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

"""FLUX.1 and Chroma in the core: order of matrices, names in files, padding, pictures that are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from tiny.transformers import chroma_inputs, flux_inputs, fused, make_chroma, make_flux, places
from torch import Tensor, nn

from mole_diffusion import ConfigError, Expert, InjectionError, MoLEConfig, RegionMaskError, inject
from mole_diffusion.core.bases import base_of_expert, base_of_networks
from mole_diffusion.core.checkpoint import load_gates, save_gates
from mole_diffusion.core.dora import Dora
from mole_diffusion.core.keys import parse_key
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.families import FLUX1

from .test_invariants import assert_close, differs

kinds = pytest.mark.parametrize("make", [make_flux, make_chroma])


@kinds
def test_matrices_run_in_the_order_of_the_table(make: Any) -> None:
    network = make()
    for host in (network, *([fused(network)] if make is make_flux else [])):
        layout = map_network(host)
        ran: list[str] = []
        for path in {site.path for site in layout.sites}:
            host.get_submodule(path).register_forward_hook(lambda *_, path=path, ran=ran: ran.append(path))
        run(host)
        assert ran == list(dict.fromkeys(site.path for site in layout.sites))
        assert layout.part == "transformer"
    missing = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    missing -= {site.name for site in map_network(network).sites}
    assert all(name.startswith("distilled_guidance_layer.") for name in missing)
    assert bool(missing) == (make is make_chroma)


def test_the_base_is_told_by_names() -> None:
    flux = make_flux()
    base = base_of_networks({"transformer": flux})
    assert base is not None
    assert base.family == FLUX1
    for expert in make_experts(2, flux):
        assert base_of_expert(expert).family == FLUX1
    # Other families have double blocks of these names.
    double = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 32)}
    double["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(32, 1)
    expert = Expert.from_state_dict(double, name="dog")
    assert base_of_expert(expert).family is None
    inject(flux, [expert], MoLEConfig()).eject()
    inject(make_chroma(), make_experts(1, flux), MoLEConfig())


def test_a_text_is_padded_where_the_network_is_told() -> None:
    """What stands in the padding of Chroma's texts moves no gate, and is drawn by nobody."""
    network = make_chroma()
    for pooling in ("mean", "token"):
        mixture = inject(network, make_experts(3, network), MoLEConfig(pooling=pooling))
        randomise(mixture)
        told = chroma_inputs(text=12, lengths=(12, 5))
        with torch.no_grad():
            both = network(**told).sample
            gates = mixture.live_weights()
            spoiled = told["encoder_hidden_states"].clone()
            spoiled[1, 5:] += 3.0
            assert_close(network(**{**told, "encoder_hidden_states": spoiled}).sample, both)
            for label, weights in mixture.live_weights().items():
                torch.testing.assert_close(gates[label], weights, rtol=1e-3, atol=1e-5)
            spoiled[1, :5] += 3.0
            assert differs(network(**{**told, "encoder_hidden_states": spoiled}).sample[1:], both[1:])
        mixture.eject()


def with_reference(told: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a picture of 2 x 3 tokens that is shown."""
    shown = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(9))
    return {
        **told,
        "hidden_states": torch.cat([told["hidden_states"], shown], dim=1),
        "img_ids": torch.cat([told["img_ids"], places(2, 3, picture=1)]),
    }


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_tokens_of_shown_pictures_have_gates_and_no_regions(pooling: str) -> None:
    network = make_flux()
    mixture = inject(network, make_experts(2, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    told = with_reference(flux_inputs(text=7))
    with torch.no_grad():
        free = network(**told).sample
        means = mixture.live_weights()
        full = torch.ones(8, 8)
        mixture.activate(region_masks={"dog": full, "cat": full})
        assert_close(network(**told).sample, free)
        left = torch.zeros(8, 8)
        left[:, :4] = 1
        mixture.activate(region_masks={"dog": left, "cat": 1 - left})
        assert differs(network(**told).sample, free)
        image = mixture._context.values["single_transformer_blocks.1"]
        assert image.joint is not None
        for weights, _ in image.joint[1].values():
            owners = torch.tensor([0, 0, 1, 1, 1])
            drawn = weights[:, 7:23].view(2, 4, 4, 5)
            assert torch.all(drawn[:, :, :2][..., owners == 1] == 0)
            assert torch.all(drawn[:, :, 2:][..., owners == 0] == 0)
            assert torch.all(weights[:, 23:] > 0)
        # In means the shown picture does not count.
        mixture.activate()
        other = with_reference(flux_inputs(text=7))
        network(**other)
        value = mixture._context.values["transformer_blocks.0"]
        if pooling == "token":
            expected = value.weights[:, :16].mean(1)
            torch.testing.assert_close(mixture.live_weights()["transformer_blocks.0"], expected)
            torch.testing.assert_close(means["transformer_blocks.0"], expected)


def test_a_grid_that_cannot_be_told_refuses_regions() -> None:
    network = make_flux()
    mixture = inject(network, make_experts(2, network), MoLEConfig())
    mixture.activate(region_masks={"dog": torch.ones(8, 8)})
    told = flux_inputs(text=7)
    scattered = {**told, "img_ids": told["img_ids"].flip(0)}
    with pytest.raises(RegionMaskError, match="need the latent's size"), torch.no_grad():
        network(**scattered)
    mixture.activate(region_masks={"dog": torch.ones(10, 8)})
    with pytest.raises(RegionMaskError, match="does not have the proportions of the latent, 8 x 8"):
        run(network)


def test_halves_in_the_other_order() -> None:
    """`final_layer.adaLN_modulation.1` of Black Forest Labs is `norm_out.linear` with its halves swapped."""
    place = parse_key("lora_unet_final_layer_adaLN_modulation_1.lora_down.weight").places
    assert [(one.matrix, one.swapped) for one in place] == [("norm_out.linear", True)]
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
    names = ("final_layer.adaLN_modulation.1", "norm_out.linear")
    swapped = torch.cat([up[32:], up[:32]])
    native, canonical = (
        Expert.from_state_dict({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": rows}, name="dog")
        for name, rows in zip(names, (swapped, up), strict=True)
    )
    for expert in (native, canonical):
        (factors,) = expert.factors["transformer"].values()
        torch.testing.assert_close(factors.delta(), up @ down, rtol=0, atol=0)


def test_gates_of_one_form_of_a_network_fit_the_other(tmp_path: Path) -> None:
    network = make_flux()
    experts = make_experts(3, network)
    mixture = inject(network, experts, MoLEConfig())
    randomise(mixture)
    save_gates(tmp_path / "gates.safetensors", {"transformer": mixture})
    expected = run(network)
    mixture.eject()
    other = fused(network)
    loaded = inject(other, experts, MoLEConfig())
    assert differs(run(other), expected)
    load_gates(tmp_path / "gates.safetensors", {"transformer": loaded})
    assert_close(run(other), expected)
    # Fused while the hooks are on it, and parted again.
    mixture.attach()
    for change in (network.fuse_qkv_projections, network.unfuse_qkv_projections):
        change()
        assert_close(run(network), expected)


def test_what_cannot_be_is_said() -> None:
    network = make_flux()
    experts = make_experts(2, network)
    with pytest.raises(ConfigError, match=r"'transformer_blocks\.0' returns context and tokens apart"):
        inject(network, experts, MoLEConfig(composition="output", granularity="layer"))
    with pytest.raises(ConfigError, match="needs the latent's size"):
        inject(network, experts, MoLEConfig(pooling="flatten"))
    mixture = inject(network, experts, MoLEConfig())
    with pytest.raises(InjectionError, match="holds text and image together"):
        network.single_transformer_blocks[0](
            torch.zeros(1, 4, 32), torch.zeros(1, 7, 32), torch.zeros(1, 32), None
        )
    mixture.eject()
    parsed = parse_key("transformer.distilled_guidance_layer.in_proj.lora_A.weight")
    assert parsed.reason is not None
    assert "makes the modulation of all blocks at once" in parsed.reason


def test_a_dora_of_a_fused_matrix_is_that_of_its_rows() -> None:
    """Magnitudes are per output row, and go with it; PEFT is not asked: it knows no fused form."""
    network = make_flux()
    qkv = torch.cat([network.transformer_blocks[0].attn.get_submodule(f"to_{x}").weight for x in "qkv"])
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, 32), (96, 2)))
    values = torch.rand(96, generator=generator) + 0.5
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.dora_scale": values[:, None],
    }
    expert = Expert.from_state_dict(file, name="dog")
    merged = qkv.detach() + up @ down
    expected = merged * (values / merged.norm(dim=1))[:, None] - qkv.detach()
    for k, x in enumerate("qkv"):
        factors = expert.factors["transformer"][f"transformer_blocks.0.attn.to_{x}"]
        weight = network.transformer_blocks[0].attn.get_submodule(f"to_{x}").weight
        found = Dora(factors, x, "dog").plain(weight, None).delta()
        torch.testing.assert_close(found, expected[32 * k : 32 * (k + 1)], rtol=1e-4, atol=1e-6)

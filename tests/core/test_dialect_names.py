"""Names alone, on the full-size module lists of SD 1.5, 2.1 and XL (no weights are made)."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from tiny.families import KOHYA_XL, dotted, flat, ldm_names, make_text, make_unet, matrices
from tiny.networks import LDMUNet
from torch import nn

from mole_diffusion.core.keys import parse_key
from mole_diffusion.core.networks import map_network
from mole_diffusion.core.networks.unet.names import layers_of

SUFFIXES = (
    *(".lora_down.weight", ".dora_scale", ".lora.up.weight"),
    *(".lora_B.default.weight", ".lora_A.weight", ".hada_w1_a"),
)
LAYERS = {"sd15": (2, 2, 2, 2), "sd21": (2, 2, 2, 2), "sdxl": (2, 2, 2)}


@pytest.mark.parametrize("family", LAYERS)
def test_every_matrix_of_a_unet_has_a_place_and_a_name(family: str) -> None:
    with torch.device("meta"):
        unet = make_unet(family, full=True)
    layout = map_network(unet)
    names = set(matrices(unet))
    assert {site.name for site in layout.sites} == {site.path for site in layout.sites} == names
    assert len(layout.sites) == len(names)
    assert layers_of(layout.sites) == LAYERS[family]
    ldm = ldm_names(unet)
    # Does the walk of `ldm_names` give LDM's names? diffusers converts whole checkpoints and knows.
    known = {f"model.diffusion_model.{name}.weight": canonical for canonical, name in ldm.items()}
    known |= {f"model.diffusion_model.{name}.bias": "" for name in ldm.values()}
    converted = convert_ldm_unet_checkpoint(known, dict(unet.config))
    assert {f"{name}.weight": name for name in names} == {
        key: name for key, name in converted.items() if name
    }
    for name in names:
        modules = (
            flat(KOHYA_XL)("unet", name),
            flat(KOHYA_XL, ldm)("unet", name),
            dotted({"unet": "unet."})("unet", name),
            dotted({"unet": "base_model.model."})("unet", name),
            dotted({"unet": "diffusion_model."}, ldm)("unet", name),
            dotted({"unet": "model.diffusion_model."}, ldm)("unet", name),
        )
        for module, suffix in zip(modules, SUFFIXES, strict=True):
            parsed = parse_key(f"{module}{suffix}")
            assert (parsed.network, parsed.matrix, parsed.reason) == ("unet", name, None)


@pytest.mark.parametrize(
    ("second", "width", "layers"), [(False, 768, 12), (False, 1024, 23), (True, 1280, 32)]
)
def test_every_matrix_of_a_text_encoder_has_a_place_and_a_name(second: bool, width: int, layers: int) -> None:
    part = "text_encoder_2" if second else "text_encoder"
    with torch.device("meta"):
        network = make_text(second, width=width, layers=layers)
    names = set(matrices(network))
    assert {site.name for site in map_network(network, part).sites} == names
    prefix = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}[part]
    for name in names:
        modules = [flat({part: one})(part, name) for one in prefix]
        modules += [f"{part}.{name}", f"{part}.text_model.{name}", f"base_model.model.{part}.{name}"]
        for module in modules:
            parsed = parse_key(f"{module}.lora_A.weight")
            assert (parsed.network, parsed.matrix, parsed.reason) == (part, name, None)


def test_sites_run_in_the_order_they_say() -> None:
    """Also under LDM's names, where the places are read off the modules."""
    unet = make_unet("sd15")
    for network in (unet, LDMUNet(unet)):
        layout = map_network(network)
        ran: list[str] = []
        handles = [
            network.get_submodule(site.path).register_forward_hook(
                lambda module, args, output, name=site.name, ran=ran: ran.append(name)
            )
            for site in layout.sites
        ]
        with torch.no_grad():
            network(torch.zeros(1, 4, 8, 8), torch.tensor(5), torch.zeros(1, 12, 16))
        for handle in handles:
            handle.remove()
        assert ran == [site.name for site in layout.sites]
        assert isinstance(network, nn.Module)
        assert layers_of(layout.sites) == (2, 2)

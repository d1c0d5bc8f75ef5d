"""Kinds of files that diffusers cannot load or loads only in part, against ComfyUI's own loader.

diffusers 0.42.1 stops at Tucker cores, LoHa, LoKr and full differences ("keys have not been correctly
renamed"), loses alphas that differ from matrix to matrix, and reads magnitudes of columns as those of rows.
ComfyUI loads them all.

Of a DoRA both take a share of the whole change for a strength other than 1, where PEFT puts the strength on
the low-rank product. In one thing they differ: where the magnitudes belong to output rows, this ComfyUI
divides by the norms of the base's rows, W' = m (W + D) / |W|; the paper (arXiv 2402.09353), PEFT, LyCORIS and
we divide by those of the sum, W' = m (W + D) / |W + D|. For input columns ComfyUI has the sum too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from conftest import part
from torch import Tensor

from mole_diffusion.core.experts import Expert
from mole_diffusion.core.modules import kernel_size, matrix_shape
from mole_diffusion.core.networks import map_network
from tools import draw

PROMPT = "a boot on the beach"
CHOSEN = ("to_q", "to_out.0", "ff.net.2", "conv1", "time_emb_proj", "downsamplers.0.conv")
TEXT = ("q_proj", "fc1")
Make = Callable[[int, int, tuple[int, int] | None], dict[str, Tensor]]
RANDOM = torch.Generator()


@pytest.fixture(autouse=True)
def _unloaded() -> Iterator[None]:
    comfy.model_management.unload_all_models()
    RANDOM.manual_seed(3)
    yield
    comfy.model_management.unload_all_models()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM) * 0.1


def lora(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    rank = int(torch.randint(1, 4, (), generator=RANDOM))
    ones = () if kernel is None else (1, 1)
    return {
        "lora_down.weight": noise(rank, fan_in, *(kernel or ())),
        "lora_up.weight": noise(out, rank, *ones),
        "alpha": torch.tensor(float(torch.rand((), generator=RANDOM)) + 0.5),
    }


def tucker(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    if kernel is None:
        return lora(out, fan_in, None)
    return {
        "lora_down.weight": noise(3, fan_in, 1, 1),
        "lora_mid.weight": noise(3, 3, *kernel) * 5,
        "lora_up.weight": noise(out, 3, 1, 1),
        "alpha": torch.tensor(2.0),
    }


def loha(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    columns = fan_in * (kernel[0] * kernel[1] if kernel else 1)
    pairs = {f"hada_{w}_a": noise(out, 2) * 5 for w in ("w1", "w2")}
    return pairs | {f"hada_{w}_b": noise(2, columns) * 3 for w in ("w1", "w2")} | {"alpha": torch.tensor(1.0)}


def lokr(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    rows = next(f for f in (4, 2, 1) if out % f == 0)
    columns = next(f for f in (4, 2, 1) if fan_in % f == 0)
    rest = (fan_in // columns) * (kernel[0] * kernel[1] if kernel else 1)
    second = {"lokr_w2_a": noise(out // rows, 2), "lokr_w2_b": noise(2, rest) * 5}
    if kernel:
        second = {"lokr_w2": noise(out // rows, fan_in // columns, *kernel) * 0.5}
    return {"lokr_w1": noise(rows, columns) * 5, "alpha": torch.tensor(1.5)} | second


def full(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    return {"diff": noise(out, fan_in, *(kernel or ())) * 0.2}


def dora(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    ones = () if kernel is None else (1, 1)
    scale = torch.rand(out, 1, *ones, generator=RANDOM) + 0.5
    return lora(out, fan_in, kernel) | {"dora_scale": scale}


def dora_of_columns(out: int, fan_in: int, kernel: tuple[int, int] | None) -> dict[str, Tensor]:
    ones = () if kernel is None else (1, 1)
    scale = torch.rand(1, fan_in, *ones, generator=RANDOM) + 0.5
    return lora(out, fan_in, kernel) | {"dora_scale": scale}


KINDS: dict[str, Make] = {
    "LoRA, alphas differ": lora,
    "Tucker core": tucker,
    "LoHa": loha,
    "LoKr": lokr,
    "full difference": full,
    "DoRA of columns": dora_of_columns,
}


def file_of(make: Make, network: torch.nn.Module, name: str, prefix: str, ends: tuple[str, ...]) -> Any:
    """A file in kohya's names for the matrices of a network whose names end like this."""
    state = {}
    for site in map_network(network, name).sites:
        if site.name.endswith(ends):
            module = network.get_submodule(site.path)
            own = make(*matrix_shape(module), kernel_size(module))
            state |= {f"{prefix}{site.name.replace('.', '_')}.{role}": value for role, value in own.items()}
    return state


def both_networks(make: Make, model: Any, clip: Any) -> Any:
    state = file_of(make, model.model.diffusion_model, "unet", "lora_unet_", CHOSEN)
    return state | file_of(make, clip.cond_stage_model, "text_encoder", "lora_te_text_model_", TEXT)


def pictures(starter: tuple[Any, Any, Any], theirs: Any, ours: Any, strength: float) -> tuple[Tensor, Tensor]:
    """A latent drawn with a file by ComfyUI's loader, and one with a file by ours."""
    model, clip, _ = starter
    patched = comfy.sd.load_lora_for_models(model, clip, theirs, strength, strength)
    expected = draw(*patched, PROMPT, steps=1, size=64)
    expert = Expert.from_state_dict(ours, name="dog", scale=strength)
    assert set(expert.report.loaded) == set(ours)
    chosen = part("experts").ExpertSet().with_expert(expert)
    found = draw(*part("apply").apply_experts(model, clip, chosen, None), PROMPT, steps=1, size=64)
    assert (expected - draw(model, clip, PROMPT, steps=1, size=64)).abs().max() > 0.02
    return expected, found


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_act_as_in_comfyui(kind: str, strength: float, starter: tuple[Any, Any, Any]) -> None:
    state = both_networks(KINDS[kind], *starter[:2])
    expected, found = pictures(starter, state, state, strength)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_dora_of_rows_differs_by_the_norm_alone(strength: float, starter: tuple[Any, Any, Any]) -> None:
    """Its change as ComfyUI computes it, given to us as a full difference, draws ComfyUI's picture."""
    model, clip, _ = starter
    state = both_networks(dora, model, clip)
    written = {}
    for name, network, prefix in (
        ("unet", model.model.diffusion_model, "lora_unet_"),
        ("text_encoder", clip.cond_stage_model, "lora_te_text_model_"),
    ):
        for site in map_network(network, name).sites:
            stem = f"{prefix}{site.name.replace('.', '_')}"
            if f"{stem}.dora_scale" in state:
                weight: Any = network.get_submodule(site.path).weight
                down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
                scaling = state[f"{stem}.alpha"] / len(down)
                summed = weight.flatten(1) + up.flatten(1) @ down.flatten(1) * scaling
                norms = weight.flatten(1).norm(dim=1, keepdim=True)
                changed = summed * state[f"{stem}.dora_scale"].flatten(1) / norms
                written[f"{stem}.diff"] = (changed - weight.flatten(1)).view(weight.shape)
    expected, found = pictures(starter, state, written, strength)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4 * float(expected.abs().max()))

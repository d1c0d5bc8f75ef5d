"""LoCon, LoHa, LoKr, full differences and DoRA: PEFT's own layers, merged weights and formulas as oracles."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny.families import make_factors, make_parts, run_part
from tiny.networks import LDMUNet, make_unet, run, with_peft
from torch import Tensor, nn

from mole_diffusion import ConfigError, Expert, ExpertLoadError, InjectionError, MoLEConfig, inject
from mole_diffusion.core.networks import map_network

TARGETS = ["attn1.to_q", "ff.net.2", "proj_in", "conv1", "time_emb_proj", "downsamplers.0.conv"]
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


def chosen(unet: nn.Module) -> list[str]:
    return [name for name, _ in unet.named_modules() if name.endswith(tuple(TARGETS))]


def locon_state(unet: nn.Module, seed: int) -> dict[str, Tensor]:
    """PEFT keys, no prefix, for every matrix of the network; strong enough to be seen."""
    state = {}
    generator = torch.Generator().manual_seed(seed)
    for (_, name), pair in make_factors({"unet": unet}, alphas="none").items():
        state[f"{name}.lora_A.weight"] = torch.randn(pair.down.shape, generator=generator) * 0.05
        state[f"{name}.lora_B.weight"] = torch.randn(pair.up.shape, generator=generator) * 0.2
    # with_peft gives all matrices of an adapter one rank.
    return {key: _first_rank(key, value) for key, value in state.items()}


def _first_rank(key: str, value: Tensor) -> Tensor:
    return value[:1].clone() if "lora_A" in key else value[:, :1].clone()


def expert_of(state: Mapping[str, Tensor], name: str = "dog", **options: int) -> Expert:
    return Expert.from_state_dict(
        {f"unet.{key}": value for key, value in state.items()}, name=name, **options
    )


def alone(unet: nn.Module, expert: Expert) -> Tensor:
    mixture = inject(unet, [expert], MoLEConfig())
    output = run(unet)
    mixture.eject()
    return output


def merged(
    unet: nn.Module, deltas: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The oracle without gates: a copy whose weights have the deltas in them."""
    model = copy.deepcopy(unet)
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_parameter(f"{name}.weight")
            weight += delta.reshape(weight.shape)
        for name, bias in (biases or {}).items():
            model.get_parameter(f"{name}.bias").add_(bias)
    return run(model)


CONFIGS = {
    "token": MoLEConfig(strength=1.0),
    "mean": MoLEConfig.uniform(),
    "flatten": MoLEConfig(pooling="flatten", strength=1.0),
    "hidden": MoLEConfig(gate_input="hidden", strength=1.0),
    "layer": MoLEConfig(granularity="layer", strength=1.0),
    "matrix": MoLEConfig(granularity="matrix", strength=1.0),
    "network": MoLEConfig(granularity="network", pooling="mean", strength=1.0),
}


@pytest.mark.parametrize("layout", ["diffusers", "LDM"])
@pytest.mark.parametrize("form", CONFIGS)
def test_fresh_gates_of_convolutions_are_the_mean(form: str, layout: str, unet: UNet2DConditionModel) -> None:
    states = {name: locon_state(unet, seed) for seed, name in enumerate(("dog", "cat"))}
    if layout == "LDM":  # the test's UNet has diffusers' timestep embedding in one module
        kept = {k: v for k, v in states["dog"].items() if not k.startswith("time_embedding")}
        states = {name: {key: state[key] for key in kept} for name, state in states.items()}
    network = unet if layout == "diffusers" else LDMUNet(unet)
    both = run(with_peft(unet, states, dict.fromkeys(states, 0.5)))
    one = run(with_peft(unet, {"cat": states["cat"]}, {"cat": 1.0}))
    experts = [expert_of(state, name) for name, state in states.items()]
    mixture = inject(network, experts, CONFIGS[form], flatten_tokens=(8, 8))
    assert sum(len(group.matrices) for group in mixture.groups) == len(states["dog"]) // 2
    torch.testing.assert_close(run(network), both, rtol=1e-4, atol=1e-5)
    # One active expert alone, under a mask that lets it act everywhere.
    mixture.activate(["cat"], region_masks={"cat": torch.ones(8, 8)})
    torch.testing.assert_close(run(network), one, rtol=1e-4, atol=1e-5)
    mixture.eject()


def test_a_residual_block_has_one_gate(unet: UNet2DConditionModel) -> None:
    experts = [expert_of(locon_state(unet, seed), name) for seed, name in enumerate(("dog", "cat"))]
    mixture = inject(unet, experts, MoLEConfig())
    groups = {group.name: group.matrices for group in mixture.groups}
    block = "up_blocks.0.resnets.0"
    leaves = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
    assert groups[block] == tuple(f"{block}.{leaf}" for leaf in leaves)
    assert groups["down_blocks.0.downsamplers.0"] == ("down_blocks.0.downsamplers.0.conv",)
    # Regions: where only the dog may act, the cat has no say, also in convolutions.
    left = torch.zeros(8, 8)
    left[:, :4] = 1.0
    with torch.no_grad():
        for group in mixture.groups:
            group.gate.projection.normal_()
    mixture.activate(region_masks={"dog": left, "cat": left})
    one = run(unet)
    mixture.activate(region_masks={"dog": left, "cat": 1 - left})
    assert (run(unet) - one).abs().max() > 1e-3
    mixture.eject()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, dense", "LoHa, dense"])
def test_products_equal_peft(kind: str, unet: UNet2DConditionModel) -> None:
    rank = {"LoHa": 2, "LoKr": 2, "LoKr, dense": 64, "LoHa, dense": 6}[kind]
    factory = LoHaConfig if kind.startswith("LoHa") else LoKrConfig
    # PEFT's LoKr scales by alpha / r also where both factors are whole; in files (LyCORIS) that means 1.
    alpha = 3.0 if factory is LoHaConfig else float(rank)
    config = factory(r=rank, alpha=alpha, target_modules=chosen(unet), init_weights=False)
    model = get_peft_model(copy.deepcopy(unet), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    state = get_peft_model_state_dict(model)
    modules = {key.rsplit(".", 1)[0] for key in state}
    alphas = {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    expert = Expert.from_state_dict(state | alphas, name="dog")
    assert set(expert.report.loaded) == {*state, *alphas}
    assert set(expert.factors["unet"]) == set(chosen(unet))
    kinds = {factors.kind for factors in expert.factors["unet"].values()}
    assert kinds == {kind.split(",")[0]}
    query = expert.factors["unet"][ATTENTION]
    assert (query.rank == min(query.delta().shape)) == kind.endswith("dense")
    torch.testing.assert_close(alone(unet, expert), run(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", [LoHaConfig, LoKrConfig])
def test_products_of_an_sdxl(factory: Any) -> None:
    """In the UNet and in both text encoders."""
    for part, network in make_parts("sdxl").items():
        ends = ("attn2.to_k", "ff.net.2", "conv1", "time_emb_proj") if part == "unet" else ("q_proj", "fc2")
        targets = [name for name, _ in network.named_modules() if name.endswith(ends)]
        config = factory(r=2, alpha=2.0, target_modules=targets, init_weights=False)
        model = get_peft_model(copy.deepcopy(network), config).eval()
        found = get_peft_model_state_dict(model)
        state = {f"{part}.{key.removeprefix('base_model.model.')}": one for key, one in found.items()}
        expert = Expert.from_state_dict(state, name="dog")
        assert set(expert.report.loaded) == set(state)
        assert len(expert.factors[part]) == len(targets)
        base, expected = run_part(part, network), run_part(part, model.base_model.model)
        assert (expected - base).abs().max() > 1e-3
        inject(network, [expert], MoLEConfig(), part=part)
        torch.testing.assert_close(run_part(part, network), expected, rtol=1e-4, atol=1e-5)


def test_tucker_cores_equal_their_formula(unet: UNet2DConditionModel) -> None:
    """LyCORIS' rebuild of a convolution's weight from a core, as its `rebuild_tucker` is published."""
    out, fan_in = unet.get_submodule(CONV).weight.shape[:2]
    torch.manual_seed(0)
    core = {f"hada_{name}": torch.randn(2, 2, 3, 3) * 0.5 for name in ("t1", "t2")}
    loha = core | {
        f"hada_{w}_{f}": torch.randn(2, out if f == "a" else fan_in) * 0.5 for w in ("w1", "w2") for f in "ab"
    }
    loha["alpha"] = torch.tensor(1.0)
    lokr = {
        "lokr_w1": torch.randn(4, 4) * 0.3,
        "lokr_w2_a": torch.randn(2, out // 4) * 0.5,
        "lokr_w2_b": torch.randn(2, fan_in // 4) * 0.5,
        "lokr_t2": torch.randn(2, 2, 3, 3) * 0.5,
        "alpha": torch.tensor(1.0),
    }
    locon = {
        "lora_down.weight": torch.randn(2, fan_in, 1, 1),
        "lora_mid.weight": torch.randn(2, 2, 3, 3) * 0.3,
        "lora_up.weight": torch.randn(out, 2, 1, 1) * 0.3,
    }
    rebuilt = [
        torch.einsum("ijkl,jr,ip->prkl", loha[f"hada_t{n}"], loha[f"hada_w{n}_b"], loha[f"hada_w{n}_a"])
        for n in (1, 2)
    ]
    small = torch.einsum("ijkl,jr,ip->prkl", lokr["lokr_t2"], lokr["lokr_w2_b"], lokr["lokr_w2_a"])
    deltas = {
        "LoHa": rebuilt[0] * rebuilt[1] / 2,
        "LoKr": torch.kron(lokr["lokr_w1"][:, :, None, None], small.contiguous()) / 2,
        "LoRA": torch.einsum(
            "ijkl,jr,ip->prkl",
            locon["lora_mid.weight"],
            locon["lora_down.weight"].flatten(1),
            locon["lora_up.weight"].flatten(1).T,
        ),
    }
    for kind, tensors in (("LoHa", loha), ("LoKr", lokr), ("LoRA", locon)):
        expert = expert_of({f"{CONV}.{key}": value for key, value in tensors.items()})
        assert expert.factors["unet"][CONV].kind == kind
        torch.testing.assert_close(
            alone(unet, expert), merged(unet, {CONV: deltas[kind]}), rtol=1e-4, atol=1e-5
        )


def test_full_differences_with_biases(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    names = chosen(unet)
    deltas = {name: torch.randn(unet.get_submodule(name).weight.shape) * 0.1 for name in names}
    biases = {name: torch.randn(len(delta)) for name, delta in deltas.items() if not name.endswith("to_q")}
    state = {f"{name}.diff": delta for name, delta in deltas.items()}
    expert = expert_of(state | {f"{name}.diff_b": bias for name, bias in biases.items()})
    assert not expert.report.ignored
    expected = merged(unet, deltas, biases)
    torch.testing.assert_close(alone(unet, expert), expected, rtol=1e-4, atol=1e-4)
    zero = expert_of({f"{name}.diff": torch.zeros_like(delta) for name, delta in deltas.items()}, "none")
    half = {name: delta / 2 for name, delta in deltas.items()}
    expected = merged(unet, half, {name: bias / 2 for name, bias in biases.items()})
    mixture = inject(unet, [expert, zero], MoLEConfig.uniform())
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)
    mixture.eject()


def test_biases_of_lora_equal_peft(unet: UNet2DConditionModel) -> None:
    names = [name for name in chosen(unet) if not name.endswith("to_q")]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=names, lora_bias=True, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(unet), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes every bias for a shard of a matrix
        state = get_peft_model_state_dict(model)
    alphas = {f"{key[: -len('.lora_A.weight')]}.alpha": torch.tensor(4.0) for key in state if "lora_A" in key}
    expert = Expert.from_state_dict(state | alphas, name="dog")
    assert not expert.report.ignored
    torch.testing.assert_close(alone(unet, expert), run(model), rtol=1e-4, atol=1e-5)


def dora(unet: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """A DoRA for some matrices by PEFT: its file's content, and what it makes of the inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=chosen(unet), use_dora=True, init_lora_weights=False
        )
        model = get_peft_model(copy.deepcopy(unet), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(
                    1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    return get_peft_model_state_dict(model), run(model)


def test_dora_equals_peft(unet: UNet2DConditionModel) -> None:
    state, expected = dora(unet)
    alphas = {f"{key[: -len('.lora_A.weight')]}.alpha": torch.tensor(4.0) for key in state if "lora_A" in key}
    expert = Expert.from_state_dict(state | alphas, name="dog")
    assert set(expert.report.loaded) == {*state, *alphas}
    assert {factors.kind for factors in expert.factors["unet"].values()} == {"DoRA LoRA"}
    torch.testing.assert_close(alone(unet, expert), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ExpertLoadError, match="rank=1 cannot compress DoRA"):
        Expert.from_state_dict(state | alphas, name="dog", rank=1)
    with torch.device("meta"):
        shapes = make_unet()
    with pytest.raises(InjectionError, match=r"'dog' is a DoRA and .*has no plain weights in memory"):
        inject(shapes, [expert], MoLEConfig())


def test_dora_of_input_columns_equals_its_formula(unet: UNet2DConditionModel) -> None:
    """LyCORIS' old form: norms of the input channels, here on top of a LoHa and a convolution."""
    torch.manual_seed(0)
    deltas, state = {}, {}
    for name in (ATTENTION, CONV):
        weight = unet.get_parameter(f"{name}.weight").detach()
        flat = weight.flatten(1)
        tensors = {
            f"hada_{w}_{f}": torch.randn((len(flat), 2) if f == "a" else (2, flat.shape[1])) * 0.3
            for w in ("w1", "w2")
            for f in "ab"
        }
        raw = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
        ones = [1] * (weight.dim() - 2)
        scale = torch.rand(1, weight.shape[1], *ones) + 0.5
        full = weight + raw.view(weight.shape)
        norm = full.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *ones)
        deltas[name] = full * scale / norm - weight
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
        state[f"{name}.dora_scale"] = scale
    expert = expert_of(state)
    assert {factors.kind for factors in expert.factors["unet"].values()} == {"DoRA LoHa"}
    torch.testing.assert_close(alone(unet, expert), merged(unet, deltas), rtol=1e-4, atol=1e-5)


def test_compression_tells_its_error(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    delta = torch.randn(32, 32)
    low = torch.randn(2, 32)
    state = {f"{ATTENTION}.diff": delta, f"{ATTENTION[:-1]}k.diff": low.T @ low}
    exact, small = expert_of(state), expert_of(state, rank=4)
    assert not exact.report.errors
    factors = small.factors["unet"]
    assert {name: found.rank for name, found in factors.items()} == {ATTENTION: 4, f"{ATTENTION[:-1]}k": 4}
    error = float((factors[ATTENTION].delta() - delta).norm() / delta.norm())
    assert small.report.errors[f"unet.{ATTENTION}"] == pytest.approx(error, rel=1e-3)
    best = torch.linalg.svdvals(delta)[4:].norm() / delta.norm()
    assert error == pytest.approx(float(best), rel=1e-3)
    assert small.report.errors[f"unet.{ATTENTION[:-1]}k"] < 1e-5
    assert f"2 deltas compressed, error up to {error:.2%}" in small.report.summary()
    with pytest.raises(ConfigError, match="rank=0 of expert 'dog'"):
        expert_of(state, rank=0)
    conv = {f"{CONV}.diff": torch.randn(32, 32, 3, 3)}
    mixture = inject(unet, [expert_of(conv, rank=2)], MoLEConfig())
    assert run(unet).isfinite().all()
    mixture.eject()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"dora_scale": torch.ones(5, 1)}, "5 DoRA magnitudes for 32 outputs"),
        ({"lora_B.bias": torch.ones(5)}, "a bias of 5 values for 32 outputs"),
        ({"lora_mid.weight": torch.ones(3, 3, 3, 3)}, "its tensors do not fit together: down"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor], message: str) -> None:
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(ExpertLoadError, match=message):
        expert_of({f"{ATTENTION}.{key}": value for key, value in (pair | tensors).items()})


def test_products_that_do_not_fit() -> None:
    loha = {f"hada_{w}_{f}": torch.ones(4, 4) for w in ("w1", "w2") for f in "ab"}
    loha["hada_w2_a"] = torch.ones(5, 4)
    with pytest.raises(ExpertLoadError, match=r"do not fit together: .*hada_w2_a \(5, 4\)"):
        expert_of({f"{ATTENTION}.{key}": value for key, value in loha.items()})


def test_dense_and_low_rank_sites_agree_on_their_kind(unet: UNet2DConditionModel) -> None:
    kinds = {site.name: site.kind for site in map_network(unet).sites}
    assert kinds[ATTENTION] == "attention"
    assert kinds[CONV] == kinds["conv_in"] == "residual"

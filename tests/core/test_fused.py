"""Fused projections: modules of a network and matrices of a file that are several of ours."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from peft import LoraConfig, inject_adapter_in_model
from tiny.families import make_text, run_part
from tiny.networks import lora_state, make_experts, make_joint, make_unet, randomise, run, to_experts, twin
from torch import Tensor, nn

from mole_diffusion import Expert, ExpertLoadError, InjectionError, MoLEConfig, inject
from mole_diffusion.core import matrices
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.core.modules import runs_fused
from mole_diffusion.core.ranks import SharedDown

from .test_invariants import FORMS, assert_close, differs, form_id

forms = pytest.mark.parametrize("form", FORMS, ids=form_id)


@forms
def test_a_unet_fused_before_or_after_or_parted_again(form: MoLEConfig) -> None:
    unet = make_unet()
    experts = make_experts(3, unet)
    base = run(unet)
    mixture = inject(unet, experts, form)
    randomise(mixture)
    expected = run(unet)
    unet.fuse_qkv_projections()
    assert_close(run(unet), expected)
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet), expected)
    unet.set_attn_processor(AttnProcessor2_0())
    assert_close(run(unet), expected)
    mixture.eject()
    unet.fuse_qkv_projections()
    assert_close(run(unet), base)
    mixture.attach()
    assert_close(run(unet), expected)
    mixture.eject()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in unet.modules())
    after = inject(unet, experts, form)
    randomise(after)
    assert after.base == mixture.base
    assert [group.matrices for group in after.groups] == [group.matrices for group in mixture.groups]
    assert_close(run(unet), expected)


def test_gates_learn_on_a_fused_unet_as_on_a_parted_one() -> None:
    gradients = []
    for fused in (False, True):
        unet = make_unet().requires_grad_(False)
        if fused:
            unet.fuse_qkv_projections()
        mixture = inject(unet, make_experts(3, unet), MoLEConfig())
        randomise(mixture)
        run(unet, grad=True).square().mean().backward()
        gradients.append([parameter.grad for parameter in mixture.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_a_matrix_that_is_gone_is_an_error() -> None:
    unet = make_unet()
    inject(unet, make_experts(2, unet), MoLEConfig())
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    del attention.to_k
    attention.set_processor(AttnProcessor2_0())
    with pytest.raises(InjectionError, match=r"does not run 'mid_block\.[\w.]*attn1.to_k' any more"):
        run(unet)


def test_both_ways_in_which_diffusers_fuses() -> None:
    """Old attentions keep both forms, and their processors choose; newer ones take the fused form away."""
    old, new = Attention(query_dim=8, heads=2, dim_head=4), FluxAttention(query_dim=8, heads=2, dim_head=4)
    assert not runs_fused(old)
    assert not runs_fused(new)
    old.fuse_projections()
    new.fuse_projections()
    assert not runs_fused(old)
    assert runs_fused(new)
    old.set_processor(FusedAttnProcessor2_0())
    new.unfuse_projections()
    assert runs_fused(old)
    assert not runs_fused(new)
    assert runs_fused(make_joint().joined[0].attn)


def fused_state(rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA of the joint network's fused modules, in their own names."""
    return {f"transformer.{key}": value for key, value in own_state(make_joint(), rank, seed).items()}


def own_state(network: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in network.named_modules():
        if name.endswith(("qkv", "fc1", "wide")):
            out, fan_in = module.weight.shape
            state[f"{name}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.2
    return state


@pytest.mark.parametrize("dora", [False, True])
def test_a_fused_matrix_of_a_file_is_what_peft_makes_of_it(dora: bool) -> None:
    """Also bias and DoRA, whose norms are of output rows, on the fused network and on the parted one."""
    network = make_joint()
    oracle = make_joint()
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["qkv", "fc1", "wide"], use_dora=dora, lora_bias=not dora
    )
    inject_adapter_in_model(config, oracle)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            module, role = name.split(".lora_")
            state[f"transformer.{module}.lora_{role}"] = parameter.detach().clone()
            state[f"transformer.{module}.alpha"] = torch.tensor(6.0)
    expert = Expert.from_state_dict(state, name="dog")
    assert set(expert.report.loaded) == set(state)
    for host in (network, twin(network)):
        mixture = inject(host, [expert], MoLEConfig())
        assert not mixture.unmatched["dog"]
        assert differs(run(host), run(make_joint()))
        assert_close(run(host), run(oracle.eval()))


def test_parts_of_a_fused_matrix_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_joint()
    files = {name: fused_state(rank, rank) for name, rank in (("dog", 2), ("cat", 3))}
    experts = [Expert.from_state_dict(state, name=name) for name, state in files.items()]
    parts = [experts[0].factors["transformer"][f"joined.0.attn.to_{x}"] for x in "qkv"]
    assert parts[0].down is parts[1].down is parts[2].down
    split = to_experts({"boot": lora_state(network, 4, 9)}, "transformer")
    products: list[int] = []
    original = matrices.rank_rows

    def counted(module: nn.Module, x: Tensor, factors: SharedDown) -> Tensor:
        products.append(factors.down.shape[1])
        return original(module, x, factors)

    monkeypatch.setattr(matrices, "rank_rows", counted)
    inject(network, experts, MoLEConfig()).activate()
    run(network)
    # Two projections and two feed-forwards of the block of two streams; the others' read one tensor.
    assert products == [5, 5, 5, 5, 5 + 5, 5 + 5]
    mixed = make_joint()
    mixture = inject(mixed, [*experts, *split], MoLEConfig())
    products.clear()
    randomise(mixture)
    found = run(mixed)
    assert 5 + 3 * 4 in products
    other = twin(network)
    apart = [Expert.from_state_dict(unfused(state), name=name) for name, state in files.items()]
    again = inject(other, [*apart, *split], MoLEConfig())
    randomise(again)
    assert_close(run(other), found)


def unfused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same file with a LoRA each for q, k and v."""
    parted = {}
    for key, value in state.items():
        if ".qkv." not in key:
            parted[key] = value
            continue
        parts = value.chunk(3) if "lora_B" in key else [value] * 3
        parted |= {key.replace("qkv", f"to_{x}"): part.clone() for x, part in zip("qkv", parts, strict=True)}
    return parted


def test_rows_of_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 5, generator=generator), torch.randn(6, 4, generator=generator)
    factors = LoraFactors(down, up, 2.0, bias=torch.arange(6.0))
    part = factors.rows_of(slice(2, 4))
    torch.testing.assert_close(part.delta(), factors.delta()[2:4])
    assert part.bias.tolist() == [2.0, 3.0]
    # Three LoRAs side by side, each for rows of its own: each part keeps its own ranks.
    stacked = LoraFactors(torch.randn(6, 5), torch.block_diag(*torch.randn(3, 4, 2)), 3.0)
    parts = [stacked.rows_of(slice(4 * k, 4 * k + 4)) for k in range(3)]
    assert [one.rank for one in parts] == [2, 2, 2]
    torch.testing.assert_close(torch.cat([one.delta() for one in parts]), stacked.delta())
    nothing = LoraFactors(down, torch.zeros(6, 4), 2.0).rows_of(slice(0, 3))
    assert nothing.rank == 4


def test_fused_files_that_cannot_be_taken_apart() -> None:
    state = {
        "transformer.joined.0.attn.qkv.lora_A.weight": torch.ones(2, 16),
        "transformer.joined.0.attn.qkv.lora_B.weight": torch.ones(47, 2),
    }
    with pytest.raises(ExpertLoadError, match="47 rows cannot be shared out in 3 equal parts"):
        Expert.from_state_dict(state, name="dog")
    state["transformer.joined.0.attn.qkv.lora_B.weight"] = torch.ones(48, 2)
    state["transformer.joined.0.attn.qkv.dora_scale"] = torch.ones(1, 16)
    with pytest.raises(ExpertLoadError, match="magnitudes per input belong to all its rows together"):
        Expert.from_state_dict(state, name="dog")
    del state["transformer.joined.0.attn.qkv.dora_scale"]
    state["transformer.joined.0.attn.to_k.lora_A.weight"] = torch.ones(2, 16)
    state["transformer.joined.0.attn.to_k.lora_B.weight"] = torch.ones(16, 2)
    with pytest.raises(ExpertLoadError, match=r"second entry for matrix 'joined\.0\.attn\.to_k'"):
        Expert.from_state_dict(state, name="dog")


@pytest.mark.parametrize("form", ["lora", "lokr", "full"])
def test_openclips_in_proj_is_three_matrices(form: str) -> None:
    network = make_text(True)
    width = network.config.hidden_size
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    stem = "lora_te2_transformer_resblocks_1_attn_in_proj"
    if form == "lora":
        tensors = {"lora_down.weight": draw(4, width), "lora_up.weight": draw(3 * width, 4)}
        delta = tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    elif form == "lokr":
        tensors = {"lokr_w1": draw(6, 2), "lokr_w2": draw(3 * width // 6, width // 2)}
        delta = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    else:
        tensors = {"diff": draw(3 * width, width)}
        delta = tensors["diff"]
    expert = Expert.from_state_dict({f"{stem}.{role}": value for role, value in tensors.items()}, name="dog")
    assert set(expert.factors["text_encoder_2"]) == {f"encoder.layers.1.self_attn.{x}_proj" for x in "qkv"}
    mixture = inject(network, [expert], MoLEConfig(), part="text_encoder_2")
    found = run_part("text_encoder_2", network)
    mixture.eject()
    before = run_part("text_encoder_2", network)
    with torch.no_grad():
        for x, part in zip("qkv", delta.chunk(3), strict=True):
            network.get_submodule(f"text_model.encoder.layers.1.self_attn.{x}_proj").weight += part
    torch.testing.assert_close(found, run_part("text_encoder_2", network), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.01

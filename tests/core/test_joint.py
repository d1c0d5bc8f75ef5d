"""A network that is none of ours: what its table says is what it does. The invariants run over it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import joint_table
from tiny.joint_network import TEXT_TOKENS, TEXT_WIDTH
from tiny.networks import (
    lora_state,
    make_clip,
    make_experts,
    make_joint,
    make_unet,
    randomise,
    run,
    states,
    to_experts,
    twin,
    with_peft,
)
from tiny.transformers import (
    make_anima,
    make_chroma,
    make_flux,
    make_flux2,
    make_krea2,
    make_qwen_image,
    make_z_image,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mole_diffusion import ConfigError, Expert, InjectionError, MoLEConfig, RegionMaskError, inject
from mole_diffusion.core.checkpoint import load_gates, save_gates
from mole_diffusion.core.export import lora_tensors, static_factors
from mole_diffusion.core.networks import map_network

from .test_invariants import FORMS, assert_close, differs, form_id
from .test_robustness import gradients

LENGTHS = (TEXT_TOKENS, 3)
forms = pytest.mark.parametrize("form", FORMS, ids=form_id)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, time, text and mask of two pictures, the second with half a text."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    mask = (torch.arange(TEXT_TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    return latent, torch.tensor([0.5, 0.3]), text, mask


def test_the_table_is_small() -> None:
    assert len(Path(joint_table.__file__).read_text().splitlines()) <= 90


@pytest.mark.parametrize("fused", [True, False])
def test_matrices_run_in_the_order_of_the_table(fused: bool) -> None:
    network = make_joint() if fused else twin(make_joint())
    layout = map_network(network)
    ran: list[str] = []
    for path in {site.path for site in layout.sites}:
        network.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    run(network)
    assert ran == list(dict.fromkeys(site.path for site in layout.sites))
    assert layout.part == "transformer"
    assert [site.name for site in layout.sites] == [site.name for site in map_network(twin(network)).sites]
    assert {site.name for site in layout.sites} == {
        name for name, module in twin(network).named_modules() if isinstance(module, nn.Linear)
    }


@forms
def test_padding_counts_nowhere(form: MoLEConfig) -> None:
    """A padded batch is its texts one by one without padding, which flattened gates keep."""
    network = make_joint()
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)
    latent, time, text, mask = inputs()
    with torch.no_grad():
        both = network(latent, time, text, mask)
        gates = mixture.live_weights()
        for i, length in enumerate(LENGTHS):
            length = TEXT_TOKENS if form.pooling == "flatten" else length
            one = slice(i, i + 1)
            single = network(latent[one], time[one], text[one, :length], mask[one, :length])
            assert_close(both[one], single)
            for label, weights in mixture.live_weights().items():
                torch.testing.assert_close(gates[label][one], weights, rtol=1e-3, atol=1e-5)
    # What stands in the padding is read by nobody.
    spoiled = torch.where(mask.unsqueeze(-1).bool(), text, 5.0)
    with torch.no_grad():
        assert_close(network(latent, time, spoiled, mask), both)
        assert differs(network(latent, time, spoiled, torch.ones_like(mask)), both)


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_padding_of_a_text_encoder_and_of_a_unets_text(pooling: str) -> None:
    config = MoLEConfig(pooling=pooling, granularity="layer")
    clip = make_clip()
    mixture = inject(clip, make_experts(3, clip), config)
    randomise(mixture)
    ids, mask = torch.randint(3, 64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad():
        both = clip(ids, attention_mask=mask).last_hidden_state
        gates = mixture.live_weights()
        single = clip(ids[1:, :5], attention_mask=mask[1:, :5]).last_hidden_state
    assert_close(both[1:, :5], single)
    for label, weights in mixture.live_weights().items():
        torch.testing.assert_close(gates[label][1:], weights, rtol=1e-3, atol=1e-5)

    unet = make_unet()
    loras = {name: lora_state(unet, 2, seed, ("attn2.to_k", "attn2.to_v")) for seed, name in enumerate("abc")}
    mixture = inject(unet, to_experts(loras, "unet"), config)
    randomise(mixture)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16)
    with torch.no_grad():
        both = unet(x, torch.tensor(5), text, encoder_attention_mask=mask).sample
        single = unet(x[1:], torch.tensor(5), text[1:, :5], encoder_attention_mask=mask[1:, :5]).sample
    assert_close(both[1:], single)
    with pytest.raises(InjectionError, match=r"mask of the context of the unet is for 2 x 9 tokens"):
        unet(x, torch.tensor(5), text, encoder_attention_mask=mask[:, :9])


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_text_tokens_have_a_gate_of_their_own(pooling: str) -> None:
    """Whichever runs first, and whether the streams are apart or in one sequence."""
    network = make_joint()
    mixture = inject(network, make_experts(3, network), MoLEConfig(pooling=pooling))
    groups = {group.name: group for group in mixture.groups}
    run(network)
    for name, text, image in (
        ("apart.0", "apart.0.text.to_q", "apart.0.image.to_q"),
        ("joined.0", "joined.0.attn.to_q", "joined.0.attn.to_q"),
    ):
        assert groups[name].leader("context").name == text
        assert groups[name].leader("tokens").name == image
        assert {name, f"{name}.context"} <= set(mixture.live_weights())
    # The wide matrix runs first and reads the same tensor: the gate is computed then, and read off q.
    assert groups["joined.0"].first("tokens").name == "joined.0.wide"
    assert groups["joined.0"].gate.projection.shape == (3, 16, 3)
    base = run(network)
    gate = groups["joined.0"].gate
    for projection in (gate.projection, gate.context_projection):
        with torch.no_grad():
            projection.add_(torch.randn(projection.shape))
        changed = run(network)
        assert differs(changed, base)
        base = changed


@pytest.mark.parametrize("granularity", ["layer", "block", "network"])
def test_rows_that_run_first_lead_themselves_alone(granularity: str) -> None:
    """As (B, 1, d) in blocks and as (B, d) outside; what reads tokens has a gate of tokens."""
    network = make_joint()
    experts = make_experts(3, network)
    mixture = inject(network, experts, MoLEConfig(granularity=granularity, pooling="mean"))
    rows = {"time_in", "apart.0.modulation", "joined.0.modulation", "joined.1.modulation"}
    for group in mixture.groups:
        if rows & set(group.matrices):
            assert len(group.matrices) == 1
        else:
            assert group.slots[0].stream != "embedding" or group.matrices == ("modulation_out",)
    randomise(mixture)
    run(network)
    assert rows <= set(mixture.live_weights())
    own = {name: state for name, state in states(3, network).items() if name in mixture.expert_names}
    only = {n: {k: v for k, v in s.items() if "modulation" in k or "time_in" in k} for n, s in own.items()}
    mixture.eject()
    mixture = inject(network, to_experts(only, "transformer"), MoLEConfig(strength=1.0))
    assert_close(run(network), run(with_peft(network, only, dict.fromkeys(only, 1 / 3))))


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_regions_weight_image_tokens_alone(pooling: str) -> None:
    network = make_joint()
    mixture = inject(network, make_experts(3, network), MoLEConfig(pooling=pooling))
    randomise(mixture)
    free = run(network)
    mixture.activate(region_masks={name: torch.ones(8, 8) for name in mixture.expert_names})
    assert_close(run(network), free)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    mixture.activate(region_masks={"dog": left, "cat": 1 - left, "boot": torch.zeros(8, 8)})
    run(network)
    values = mixture._context.values
    image, text = values["joined.1"], values["joined.1.context"]
    assert image.joint is not None
    for weights, _ in image.joint[1].values():
        owners = [i for i in range(3) for _ in range((2, 3, 4)[i])]
        assert weights.shape == (2, TEXT_TOKENS + 16, len(owners))
        strength = float(text.strength.detach())
        expected = (text.weights * strength)[..., owners].expand(2, TEXT_TOKENS, len(owners))
        torch.testing.assert_close(weights[:, :TEXT_TOKENS], expected)
        grid = weights[:, TEXT_TOKENS:].view(2, 4, 4, len(owners))
        for rank, owner in enumerate(owners):
            inside = {0: grid[:, :, :2, rank], 1: grid[:, :, 2:, rank]}.get(owner)
            outside = {0: grid[:, :, 2:, rank], 1: grid[:, :, :2, rank]}.get(owner, grid[..., rank])
            assert torch.all(outside == 0)
            if inside is not None:
                torch.testing.assert_close(inside, torch.ones_like(inside))
    mixture.activate(region_masks={"dog": torch.ones(10, 10)}, latent_size=(10, 10))
    with pytest.raises(RegionMaskError, match=r"16 image tokens do not fit the latent of 10 x 10"):
        run(network)


def test_regions_with_fixed_weights() -> None:
    """Half a mask everywhere halves a weight on image tokens, and text tokens keep it."""
    network = make_joint()
    loras = states(2, network)
    mixture = inject(network, to_experts(loras, "transformer"), MoLEConfig())
    weights = {"dog": 0.5, "cat": 1.0}
    mixture.activate(weights=weights, region_masks={"cat": torch.ones(8, 8)})
    assert_close(run(network), run(with_peft(network, loras, weights)))
    mixture.activate(weights=weights, region_masks={"cat": torch.full((8, 8), 0.5)})
    halved = run(network)
    assert differs(halved, run(with_peft(network, loras, weights)))
    assert differs(halved, run(with_peft(network, loras, {"dog": 0.5, "cat": 0.5})))


def test_time_is_read_from_clean_to_noise() -> None:
    """In the network's unit 1 is clean; gates read 0 there."""
    network = make_joint()
    mixture = inject(network, make_experts(3, network), MoLEConfig(pooling="mean", timestep=True))
    with torch.no_grad():
        for group in mixture.groups:
            # A slope over time alone: the first expert for clean pictures, the last for noise.
            group.gate.timestep_projection[1] = torch.tensor([3.0, 0.0, -3.0])
        latent, _, text, mask = inputs()
        network(latent, torch.tensor([0.99, 0.01]), text, mask)
    for weights in mixture.live_weights().values():
        assert weights.argmax(-1).tolist() == [0, 2]


def test_gates_of_the_fused_network_fit_the_parted_one(tmp_path: Path) -> None:
    network = make_joint()
    experts = make_experts(3, network)
    mixture = inject(network, experts, MoLEConfig())
    randomise(mixture)
    save_gates(tmp_path / "gates.safetensors", {"transformer": mixture})
    other = twin(network)
    loaded = inject(other, experts, MoLEConfig())
    assert differs(run(other), run(network))
    load_gates(tmp_path / "gates.safetensors", {"transformer": loaded})
    assert_close(run(other), run(network))


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "make",
    [make_joint, make_flux, make_chroma, make_flux2, make_krea2, make_qwen_image, make_anima, make_z_image],
)
def test_an_exported_file_is_read_again(make: Callable[[], nn.Module], dialect: str) -> None:
    network = make()
    mixture = inject(network, make_experts(3, network), MoLEConfig(strength=1.0))
    nla = run(network)
    weights = {label: dict.fromkeys(mixture.expert_names, 1 / 3) for label in mixture.live_weights()}
    factors = static_factors({"transformer": mixture}, {"transformer": weights})
    tensors = lora_tensors(factors, dialect, torch.float32)
    expert = Expert.from_state_dict(tensors, name="mixed")
    assert set(expert.report.loaded) == set(tensors)
    mixture.eject()
    assert differs(run(network), nla)
    inject(network, [expert], MoLEConfig())
    assert_close(run(network), nla)


@pytest.mark.parametrize("form", [FORMS[2], FORMS[3], FORMS[6]], ids=form_id)
def test_gradient_checkpointing(form: MoLEConfig) -> None:
    network = make_joint().requires_grad_(False)
    mixture = inject(network, make_experts(3, network), form)
    randomise(mixture)

    expected = gradients(network, mixture)
    for block in network.joined:
        original = block.forward
        block.forward = lambda *args, f=original: checkpoint(f, *args, use_reentrant=False)
    for found, wanted in zip(gradients(network, mixture), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in expected)


def test_compilation() -> None:
    network = make_joint()
    mixture = inject(network, make_experts(3, network), FORMS[2])
    randomise(mixture)
    with torch.no_grad():
        once = network(*inputs())
        torch._dynamo.reset()
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert_close(compiled(*inputs()), once)
    torch._dynamo.reset()


def test_what_cannot_be_is_said() -> None:
    network = make_joint()
    experts = make_experts(2, network)
    config = MoLEConfig(composition="output", granularity="layer")
    with pytest.raises(ConfigError, match=r"'apart\.0' returns context and tokens apart"):
        inject(network, experts, config)
    mixture = inject(network, experts, MoLEConfig())
    with pytest.raises(InjectionError, match="22 tokens of the transformer holds text and image together"):
        network.joined[0](torch.zeros(1, 22, 16), torch.zeros(1, 1, 16), torch.ones(1, 22, dtype=torch.bool))
    mixture.eject()

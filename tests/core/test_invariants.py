"""Invariants 1-7 of the architecture page, on diffusers and LDM names; PEFT is the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny.networks import (
    LDMUNet,
    lora_state,
    make_clip,
    make_experts,
    make_joint,
    make_unet,
    part_of,
    randomise,
    run,
    states,
    to_experts,
    twin,
    with_peft,
)
from tiny.transformers import KINDS
from torch import Tensor, nn

from mole_diffusion import ConfigError, Expert, MoLEConfig, inject
from mole_diffusion.core.experts import LoraFactors

# Relative to the largest value of the expected output; bf16 has 8 bits and tens of layers to lose them in.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}

NETWORKS = {
    "linear": lambda: make_unet(linear=True),
    "conv": lambda: make_unet(linear=False),
    "clip": make_clip,
    "joint": make_joint,
    **{kind.__name__: known.make for kind, known in KINDS.items()},
}
FORMS = [
    MoLEConfig(granularity="matrix", pooling="mean"),
    MoLEConfig(granularity="layer", pooling="token"),
    MoLEConfig(granularity="block", pooling="token"),
    MoLEConfig(granularity="block", pooling="mean", gate_input="hidden"),
    MoLEConfig(granularity="block", pooling="flatten"),
    MoLEConfig(granularity="layer", pooling="token", gate_input="hidden"),
    MoLEConfig(granularity="block", pooling="token", gate_input="own"),
    MoLEConfig(granularity="block", pooling="token", gate_function="sigmoid", timestep=True),
    MoLEConfig(granularity="block", pooling="mean", gate_input="hidden", gate_function="sigmoid"),
    MoLEConfig(granularity="network", pooling="mean"),
    MoLEConfig(granularity="block", pooling="token", composition="output"),
]


def form_id(config: MoLEConfig) -> str:
    names = [config.granularity, config.pooling, config.gate_input, config.composition, config.gate_function]
    return "-".join([*names, "timestep"] if config.timestep else names)


forms = pytest.mark.parametrize("form", FORMS, ids=form_id)
#: Transformers have the same hooks: of all but the first, every run tries the default form, a pooled one and
#: the one that some refuse; the rest are slow tests.
_TOLD = (FORMS[2], FORMS[4], FORMS[8])
_ALL_FORMS = {"linear", "conv", "clip", "joint", next(iter(KINDS)).__name__}
cases = pytest.mark.parametrize(
    ("kind", "form"),
    [
        pytest.param(
            *(kind, form),
            id=f"{kind}-{form_id(form)}",
            marks=() if kind in _ALL_FORMS or form in _TOLD else pytest.mark.slow,
        )
        for kind in NETWORKS
        for form in FORMS
    ],
)
COUNTS = (1, 3, 6)
counts = pytest.mark.parametrize("count", COUNTS)
#: One number of experts is tried with every network; more experts run through the same hooks.
counted = pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param(*(kind, count), marks=() if kind in _ALL_FORMS or count == 3 else pytest.mark.slow)
        for kind in NETWORKS
        for count in COUNTS
    ],
)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < TOLERANCE[dtype]


def differs(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() > 1e-2 * expected.abs().max())


@functools.cache
def oracle(kind: str, count: int, each: float = 1.0, names: tuple[str, ...] = ()) -> Tensor:
    """What PEFT makes of a network and some of its LoRAs (all if none is named), whatever form gates have."""
    network = NETWORKS[kind]()
    loras = states(count, network)
    chosen = {name: loras[name] for name in names or loras}
    return run(with_peft(network, chosen, dict.fromkeys(chosen, each)))


def hosts(network: nn.Module) -> list[nn.Module]:
    """The network, and the same under the names of other hosts: LDM's, or with parted projections."""
    if type(network) in KINDS:
        other = KINDS[type(network)].other
    else:
        other = {"unet": LDMUNet, "transformer": twin}.get(part_of(network))
    return [network] if other is None else [network, other(network)]


def flatten_tokens(network: nn.Module) -> tuple[int, int] | int:
    return 12 if part_of(network) == "text_encoder" else (8, 8)


def has_no_fixed_size(network: nn.Module, form: MoLEConfig) -> bool:
    """Whether gates of this form are refused, with a sentence, for networks whose texts have any length."""
    if form.pooling != "flatten" or type(network) not in KINDS or KINDS[type(network)].flattens:
        return False
    with pytest.raises(ConfigError, match="pooling='flatten' needs texts of one length"):
        inject(network, make_experts(2, network), form, flatten_tokens=(8, 8))
    return True


def uniform(form: MoLEConfig, **changes: object) -> MoLEConfig:
    return MoLEConfig(**{**form.to_dict(), "strength": 1.0, **changes})


@counted
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fresh_gates_are_nla(kind: str, count: int, dtype: torch.dtype) -> None:
    network = NETWORKS[kind]()
    expected = oracle(kind, count, 1 / count)
    assert differs(expected, run(network))
    for host in hosts(network):
        host.to(dtype)
        inject(host, make_experts(count, network), MoLEConfig(strength=1.0))
        assert_close(run(host), expected, dtype)


@counts
def test_a_text_strength_of_their_number_adds_experts_up(count: int) -> None:
    network = NETWORKS["clip"]()
    loras = states(count, network)
    expected = run(with_peft(network, loras, dict.fromkeys(loras, 1.0)))
    mixture = inject(network, to_experts(loras, "text_encoder"), MoLEConfig(text_strength=count))
    assert_close(run(network), expected)
    some = dict(list(loras.items())[-2:])
    mixture.activate(list(some))
    assert_close(run(network), run(with_peft(NETWORKS["clip"](), some, dict.fromkeys(some, 1.0))))


@forms
def test_fresh_gates_are_nla_in_every_form(form: MoLEConfig) -> None:
    if form.composition == "output":
        pytest.skip("mixing block outputs is not linear in the weights")
    network = make_unet()
    for strength in (1.0, 1.5):
        mixture = inject(network, make_experts(3, network), uniform(form, strength=strength))
        assert_close(run(network), oracle("linear", 3, strength / 3))
        mixture.eject()


@cases
def test_one_active_expert_is_that_lora_alone_after_training(form: MoLEConfig, kind: str) -> None:
    network = NETWORKS[kind]()
    if has_no_fixed_size(network, form):
        return
    expected = oracle(kind, 3, 1.0, ("cat",))
    for host in hosts(network):
        mixture = inject(host, make_experts(3, network), form, flatten_tokens=flatten_tokens(network))
        randomise(mixture)
        assert differs(run(host), expected)
        mixture.activate(["cat"])
        assert_close(run(host), expected)


@counts
def test_one_expert_among_n(count: int, unet: nn.Module) -> None:
    loras = states(count, unet)
    expected = run(with_peft(unet, {"dog": loras["dog"]}, {"dog": 0.7}))
    mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig())
    randomise(mixture)
    mixture.activate(["dog"], expert_scales={"dog": 0.7})
    assert_close(run(unet), expected)


@cases
def test_masking_keeps_the_ratios_of_the_first_gate(form: MoLEConfig, kind: str) -> None:
    network = NETWORKS[kind]()
    if has_no_fixed_size(network, form):
        return
    mixture = inject(network, make_experts(3, network), form, flatten_tokens=flatten_tokens(network))
    randomise(mixture)
    # Only the first group sees the same input in both runs; the mean over tokens of pooled gates is exact.
    run(network)
    first = mixture.groups[0].name
    full = mixture._context.values[first].weights
    mixture.activate(["dog", "boot"])
    run(network)
    masked = mixture._context.values[first].weights
    expected = full[..., [0, 2]] / full[..., [0, 2]].sum(-1, keepdim=True)
    torch.testing.assert_close(masked[..., [0, 2]], expected, rtol=1e-4, atol=1e-6)
    assert torch.all(masked[..., 1] == 0)
    assert full.std() > 1e-3


@pytest.mark.parametrize("composition", ["delta", "output"])
def test_a_masked_expert_never_influences_the_output(composition: str, unet: nn.Module) -> None:
    """With gates on the hidden state nothing of a masked expert is read at all."""
    config = MoLEConfig(gate_input="hidden", composition=composition)
    experts = make_experts(3, unet)
    outputs = []
    for broken in (False, True):
        if broken:
            nan = {
                name: LoraFactors(f.down * float("nan"), f.up * float("nan"), f.alpha)
                for name, f in experts[1].factors["unet"].items()
            }
            experts[1] = Expert(**{**vars(experts[1]), "factors": {"unet": nan}})
        mixture = inject(unet, experts, config)
        randomise(mixture)
        mixture.activate(["dog", "boot"])
        outputs.append(run(unet))
        mixture.eject()
    assert torch.equal(*outputs)


def test_masked_gates_on_expert_outputs_mix_only_the_active_deltas(unet: nn.Module) -> None:
    """A masked expert is still read by the gates of the others (the ratios stay), but adds nothing itself."""
    loras = states(3, unet)
    mixture = inject(unet, to_experts(loras, "unet"), MoLEConfig(granularity="network", pooling="mean"))
    randomise(mixture)
    mixture.activate(["dog", "boot"])
    found = run(unet, batch=slice(0, 1))
    weights = mixture.live_weights()["unet"][0]
    strength = 1 + (mixture.groups[0].gate.strength.item() - 1) / 2
    oracle = with_peft(
        make_unet(),
        loras,
        {"dog": float(weights[0]) * strength, "cat": 0.0, "boot": float(weights[2]) * strength},
    )
    assert_close(found, run(oracle, batch=slice(0, 1)))


@forms
def test_reordering_experts_with_their_gate_rows_changes_nothing(form: MoLEConfig, unet: nn.Module) -> None:
    order = [2, 0, 1]
    experts = make_experts(3, unet)
    first = inject(unet, experts, form)
    randomise(first)
    expected = run(unet)
    first.eject()
    second = inject(unet, [experts[i] for i in order], form)
    with torch.no_grad():
        for old, new in zip(first.groups, second.groups, strict=True):
            for key, value in old.gate.state_dict().items():
                if value.dim():
                    # Features of one expert each have no axis for the weights that they give.
                    rows = -2 if form.gate_input == "own" else -1
                    value = value.index_select(rows, torch.tensor(order))
                    if form.gate_input == "experts" and value.dim() > 2:  # not the timestep's
                        value = value.index_select(-3, torch.tensor(order))
                new.gate.state_dict()[key].copy_(value)
    assert_close(run(unet), expected)
    randomise(second, seed=8)
    assert differs(run(unet), expected)


@cases
def test_eject_restores_bitwise_and_leaves_no_hook(form: MoLEConfig, kind: str) -> None:
    network = NETWORKS[kind]()
    if has_no_fixed_size(network, form):
        return
    for host in hosts(network):
        base, keys = run(host), list(host.state_dict())
        mixture = inject(host, make_experts(2, network), form, flatten_tokens=flatten_tokens(network))
        assert differs(run(host), base)
        assert list(host.state_dict()) == keys
        mixture.disable()
        assert torch.equal(run(host), base)
        mixture.enable()
        assert differs(run(host), base)
        mixture.eject()
        mixture.eject()
        assert torch.equal(run(host), base)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("form", FORMS[-2:], ids=form_id)
def test_eject_after_an_exception_inside_the_network(form: MoLEConfig, unet: nn.Module) -> None:
    base = run(unet)
    mixture = inject(unet, make_experts(2, unet), form)
    expected = run(unet)
    feed_forward = unet.mid_block.attentions[0].transformer_blocks[0].ff
    original, feed_forward.net[2].weight = feed_forward.net[2].weight, nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="shape"):
        run(unet)
    feed_forward.net[2].weight = original
    assert torch.equal(run(unet), expected)
    mixture.eject()
    assert torch.equal(run(unet), base)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in unet.modules())


@counted
def test_fixed_weights_equal_single_deltas_and_merged_weights(kind: str, count: int) -> None:
    network = NETWORKS[kind]()
    loras = states(count, network)
    weights = {name: (0.4 + 0.2 * i) / count for i, name in enumerate(loras)}
    together = run(with_peft(network, loras, weights))
    whole = twin(network)
    with torch.no_grad():
        for name, state in loras.items():
            for key in [key for key in state if "lora_A" in key]:
                down, up = state[key], state[key.replace("lora_A", "lora_B")]
                weight = whole.get_submodule(key.split(".lora_")[0]).weight
                weight += weights[name] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    merged = run(whole)
    for host in hosts(network):
        for dtype in TOLERANCE:
            host.to(dtype)
            mixture = inject(host, make_experts(count, network), MoLEConfig())
            mixture.activate(weights=weights)
            found = run(host)
            assert_close(found, together, dtype)
            assert_close(found, merged, dtype)
            mixture.eject()


@cases
def test_a_batch_of_two_is_two_singles(form: MoLEConfig, kind: str) -> None:
    network = NETWORKS[kind]()
    if has_no_fixed_size(network, form):
        return
    mixture = inject(network, make_experts(3, network), form, flatten_tokens=flatten_tokens(network))
    randomise(mixture)
    both = run(network)
    singles = torch.cat([run(network, batch=slice(i, i + 1)) for i in range(2)])
    assert_close(both, singles)
    assert differs(both[:1], both[1:])


@pytest.mark.parametrize(
    ("linear", "layers", "form"),
    [
        pytest.param(
            *(linear, layers, form),
            id=f"{layers}-{linear}-{form_id(form)}",
            # Names and shapes do not ask the form: each form is tried with two of the four UNets.
            marks=() if linear == (layers == 1) or form in _TOLD else pytest.mark.slow,
        )
        for linear in (True, False)
        for layers in (1, 2)
        for form in FORMS
    ],
)
def test_ldm_names_give_the_same_output(form: MoLEConfig, linear: bool, layers: int) -> None:
    unet = make_unet(linear=linear, layers=layers)
    ldm = LDMUNet(unet)
    assert torch.equal(run(ldm), run(unet))
    experts = make_experts(3, unet)
    mixtures = [inject(host, experts, form, flatten_tokens=(8, 8)) for host in (unet, ldm)]
    for mixture in mixtures:
        randomise(mixture)
    assert [g.name for g in mixtures[0].groups] == [g.name for g in mixtures[1].groups]
    assert [g.matrices for g in mixtures[0].groups] == [g.matrices for g in mixtures[1].groups]
    assert_close(run(ldm), run(unet))
    assert mixtures[0].base["shapes"] == mixtures[1].base["shapes"]


def test_experts_that_lack_matrices_or_a_whole_network(unet: nn.Module, clip: nn.Module) -> None:
    loras = {
        "dog": lora_state(unet, 2, 1, ("attn2.to_k", "attn2.to_v")),
        "cat": lora_state(unet, 3, 2, ("to_q", "to_v")),
        "boot": lora_state(unet, 4, 3, ("ff.net.2",)),
    }
    none = Expert.from_state_dict(
        {f"text_encoder.{k}": v for k, v in lora_state(clip, 2, 1).items()}, name="words"
    )
    expected = run(with_peft(unet, loras, dict.fromkeys(loras, 1 / 4)))
    for host in (unet, LDMUNet(unet)):
        mixture = inject(host, [*to_experts(loras, "unet"), none], MoLEConfig(strength=1.0))
        assert_close(run(host), expected)
        randomise(mixture)
        for name in loras:
            mixture.activate([name])
            assert_close(run(host), run(with_peft(make_unet(), {name: loras[name]}, {name: 1.0})))
        mixture.activate(["words"])
        assert torch.equal(run(host), run(make_unet()))

"""Gates: parameters, learning, recording, injection errors."""

from __future__ import annotations

import math

import pytest
import torch
from tiny.networks import (
    LDMUNet,
    active_weights,
    lora_state,
    make_clip,
    make_experts,
    make_unet,
    randomise,
    run,
    to_experts,
)
from torch import nn

from mole_diffusion import (
    AllExpertsMaskedError,
    ConfigError,
    InjectionError,
    MoLEConfig,
    NoExpertsError,
    UnknownExpertError,
    inject,
)
from mole_diffusion.core import functional
from mole_diffusion.core.functional import balance_loss, entropy
from mole_diffusion.core.networks import architectures
from mole_diffusion.core.networks.base import Forward
from mole_diffusion.core.records import GateRecord, GateWeights, Recorder

from .test_invariants import FORMS, differs, form_id


@pytest.mark.parametrize(
    ("granularity", "groups", "matrices"),
    [("matrix", 48, 1), ("layer", 20, 4), ("block", 4, 12), ("network", 1, 48)],
)
def test_granularity_decides_the_groups(
    granularity: str, groups: int, matrices: int, unet: nn.Module
) -> None:
    config = MoLEConfig(granularity=granularity, pooling="mean")
    mixture = inject(unet, make_experts(2, unet), config)
    assert len(mixture.groups) == groups
    assert max(len(group.matrices) for group in mixture.groups) == matrices
    assert sum(len(group.matrices) for group in mixture.groups) == 48
    assert [g.gate for g in mixture.groups] == list(mixture.gates.values())


@pytest.mark.parametrize("make", [make_unet, make_clip, lambda: make_unet(linear=False, layers=2)])
@pytest.mark.parametrize("ldm", [False, True])
def test_the_order_of_matrices_is_the_order_of_execution(make, ldm: bool) -> None:
    network = make()
    experts = make_experts(1, network)
    if ldm and not isinstance(network, type(make_clip())):
        network = LDMUNet(network)
    mixture = inject(network, experts, MoLEConfig())
    ran: list[str] = []
    for group in mixture.groups:
        for slot in group.slots:
            slot.module.register_forward_hook(lambda *_, name=slot.name: ran.append(name))
    run(network)
    assert ran == [name for group in mixture.groups for name in group.matrices]


def test_gates_hold_the_only_parameters(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    names = {name.split(".")[-1] for name, _ in mixture.gates.named_parameters()}
    assert names == {"projection", "context_projection", "log_temperature", "strength"}
    fixed = MoLEConfig(learn_temperature=False, learn_strength=False, temperature=0.5, strength=1.2)
    mixture.eject()
    mixture = inject(unet, make_experts(3, unet), fixed)
    names = {name.split(".")[-1] for name, _ in mixture.gates.named_parameters()}
    assert names == {"projection", "context_projection"}
    assert float(mixture.groups[0].gate.temperature) == pytest.approx(0.5)
    assert float(mixture.groups[0].gate.strength) == pytest.approx(1.2)
    assert all(p.dtype == torch.float32 for p in mixture.parameters())


def test_text_encoders_have_a_strength_of_their_own_that_is_not_trained(clip: nn.Module) -> None:
    mixture = inject(clip, make_experts(3, clip), MoLEConfig(strength=1.3, text_strength=0.75))
    names = {name.split(".")[-1] for name, _ in mixture.gates.named_parameters()}
    assert names == {"projection", "log_temperature"}
    assert {float(group.gate.strength) for group in mixture.groups} == {0.75}


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("kind", ["unet", "clip"])
def test_a_few_steps_learn_to_prefer_one_expert(form: MoLEConfig, kind: str) -> None:
    """Gates alone move the output towards that of one expert; experts and base stay as they were."""
    network = make_unet() if kind == "unet" else make_clip()
    frozen = {k: v.clone() for k, v in network.state_dict().items()}
    network.requires_grad_(False)
    mixture = inject(network, make_experts(3, network), form, flatten_tokens=None if kind == "unet" else 12)
    mixture.activate(["cat"])
    target = run(network)
    mixture.activate()
    optimiser = torch.optim.Adam(mixture.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = (run(network, grad=True) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in mixture.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, frozen[k]) for k, v in network.state_dict().items())


def test_temperature_and_strength_get_gradients(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    run(unet, grad=True).square().mean().backward()
    for group in mixture.groups:
        for name, parameter in group.gate.named_parameters():
            assert parameter.grad.abs().max() > 0, f"{group.name} {name}"


def test_balance_and_entropy_of_a_mixture(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    assert mixture.live_weights() == {}
    run(unet, grad=True)
    uniform = active_weights(mixture)
    assert float(balance_loss(uniform, normalised=True).detach()) == pytest.approx(0, abs=1e-4)
    assert float(balance_loss(uniform).detach()) == pytest.approx(3 * math.log(3), abs=1e-4)
    assert float(entropy(uniform).detach()) == pytest.approx(math.log(3), abs=1e-4)
    randomise(mixture)
    run(unet, grad=True)
    loss = balance_loss(active_weights(mixture), normalised=True)
    loss.backward()
    assert float(loss.detach()) > 1e-4
    assert mixture.groups[0].gate.projection.grad.abs().max() > 0
    mixture.activate(["dog", "cat"])
    run(unet)
    assert float(entropy(active_weights(mixture, (0, 1)))) < math.log(2)
    mixture.activate(weights={"dog": 1.0})
    run(unet)
    assert mixture.live_weights() == {}


def test_a_recorder_keeps_what_the_gates_said_in_every_forward(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    recorder, hooks = Recorder(), list(unet._forward_hooks)
    handle = recorder.watch(mixture)
    for _ in range(2):
        run(unet)
    live = mixture.live_weights()
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert set(live) == {g.name + end for g in mixture.groups for end in ("", ".context")}
    weights = recorder.weights
    assert len(weights.records) == 2 * len(live)
    record = next(r for r in weights.records if r.step == 1 and r.group == block)
    assert (record.network, record.branch, record.entries) == ("unet", "prompt", (0, 1))
    assert record.experts == mixture.expert_names
    torch.testing.assert_close(record.weights, live[block])
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(2))
    means = weights.means()["unet"]
    assert list(means) == list(live)
    for group, own in means.items():
        torch.testing.assert_close(torch.tensor(list(own.values())), live[group].mean(0))
    handle.remove()
    run(unet)
    assert len(recorder.weights.records) == 2 * len(live)
    assert recorder.forwards == {"unet": 2}
    recorder.reset()
    assert len(recorder.weights) == 0
    assert list(unet._forward_hooks) == hooks


def test_rows_and_means_of_gate_weights() -> None:
    def record(
        step: int | None, branch: str, weights: list[list[float]], network: str = "unet"
    ) -> GateRecord:
        entries = tuple(range(len(weights)))
        return GateRecord(network, "g", step, branch, entries, ("dog", "cat"), torch.tensor(weights))

    weights = GateWeights(
        [
            record(0, "negative", [[0.5, 0.5]]),
            record(0, "prompt", [[1.0, 0.0]]),
            record(1, "prompt", [[0.25, 0.75]]),
            record(None, "prompt", [[0.0, 1.0], [0.5, 0.5]], "text_encoder"),
        ]
    )
    assert len(weights) == len(list(weights)) == 10
    assert [row.weight for row in weights.where(network="unet", branch="prompt", expert="cat")] == [0.0, 0.75]
    assert [row.weight for row in weights.where(entry=1)] == [0.5, 0.5]
    assert weights.mean("step", "expert")[1, "cat"] == 0.75
    assert weights.mean("expert") == {("dog",): 2.25 / 5, ("cat",): 2.75 / 5}
    assert weights.means() == {
        "unet": {"g": {"dog": 1.75 / 3, "cat": 1.25 / 3}},
        "text_encoder": {"g": {"dog": 0.25, "cat": 0.75}},
    }
    part = weights[1:4]
    assert [row.weight for row in part] == [0.5, 1.0, 0.0]
    assert part.mean("expert") == {("cat",): 0.25, ("dog",): 1.0}
    array, labels = weights.to_array("unet")
    assert array.tolist() == [[[[1.0, 0.0]], [[0.25, 0.75]]]]
    assert labels == {"group": ["g"], "step": [0, 1], "entry": [0], "expert": ["dog", "cat"]}
    for call in (lambda: weights.where(gate="g"), lambda: weights.mean("weight")):
        with pytest.raises(ConfigError, match="gate weights have no field"):
            call()


def test_scales(unet: nn.Module) -> None:
    [expert] = to_experts({"dog": lora_state(unet, 2, 1)}, "unet")
    mixture = inject(unet, [expert], MoLEConfig())
    base, full = run(make_unet()), run(unet)
    mixture.activate(expert_scales={"dog": 0.0})
    assert torch.allclose(run(unet), base, atol=1e-6)
    mixture.activate(expert_scales={"dog": 1.0})
    assert torch.equal(run(unet), full)
    mixture.activate(weights={"dog": 0.5}, expert_scales={"dog": 2.0})
    assert torch.allclose(run(unet), full, atol=1e-5)


def test_fixed_weights_are_used_as_given(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    base = run(make_unet())
    mixture.activate(weights={})
    assert torch.equal(run(unet), base)
    mixture.activate(["dog"], weights={"dog": 1.0, "cat": 1.0})
    alone = run(unet)
    mixture.activate(["dog"])
    assert torch.allclose(run(unet), alone, atol=1e-5)


def test_a_new_choice_forgets_the_old_gates_at_once(unet: nn.Module) -> None:
    """Also where a host calls a block and never the network itself."""
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    block, x = unet.mid_block.attentions[0].transformer_blocks[0].ff, torch.randn(1, 4, 32)
    mixture.activate(weights={"dog": 1.0})
    first = block(x)
    mixture.activate(weights={"cat": 1.0})
    assert differs(block(x), first)


def test_activation_errors(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    before = run(unet)
    for call in ({"active_experts": ["dgo"]}, {"expert_scales": {"dgo": 1.0}}, {"weights": {"dgo": 1.0}}):
        with pytest.raises(UnknownExpertError, match=r"Unknown expert 'dgo'.*Did you mean 'dog'"):
            mixture.activate(**call)
    with pytest.raises(
        AllExpertsMaskedError, match="active_experts is empty; name at least one of dog, cat, boot"
    ):
        mixture.activate([])
    assert torch.equal(run(unet), before)


def test_injection_errors(unet: nn.Module, clip: nn.Module) -> None:
    experts = make_experts(2, unet)
    with pytest.raises(NoExpertsError, match="no experts to inject"):
        inject(unet, [], MoLEConfig())
    with pytest.raises(ConfigError, match="used more than once: dog"):
        inject(unet, [experts[0], experts[0]], MoLEConfig())
    with pytest.raises(
        InjectionError,
        match=f"Linear has no matrices of a known {' or '.join(a.name for a in architectures())}; looked for",
    ):
        inject(nn.Linear(2, 2), experts, MoLEConfig())
    with pytest.raises(
        InjectionError, match="'dog', 'cat' has matrices for the vae; they have some for: unet"
    ):
        inject(unet, experts, MoLEConfig(), part="vae")
    with pytest.raises(
        InjectionError, match="None of the experts 'dog', 'cat' has matrices for the text_encoder"
    ):
        inject(clip, experts, MoLEConfig())
    mixture = inject(unet, experts, MoLEConfig())
    with pytest.raises(InjectionError, match="UNet2DConditionModel already carries a mixture"):
        inject(unet, experts, MoLEConfig())
    mixture.eject()
    assert not mixture.injected
    mixture.attach()
    assert mixture.injected


def test_experts_of_another_base_model(unet: nn.Module) -> None:
    state = lora_state(unet, 2, 1, ("attn2.to_k",))
    wrong = {k: torch.zeros(2, 99) if "lora_A" in k else v for k, v in state.items()}
    with pytest.raises(
        InjectionError, match=r"'dog' does not fit .*attn2.to_k': its delta is 16 x 99, the matrix 16"
    ):
        inject(unet, to_experts({"dog": wrong}, "unet"), MoLEConfig())
    deep = {k.replace("up_blocks.1", "up_blocks.3"): v for k, v in state.items()}
    mixture = inject(unet, to_experts({"dog": deep}, "unet"), MoLEConfig())
    assert all(name.startswith("up_blocks.3") for name in mixture.unmatched["dog"])
    assert len(mixture.unmatched["dog"]) == 2
    nowhere = {k.replace("blocks.0", "blocks.9"): v for k, v in state.items() if k.startswith("down")}
    with pytest.raises(InjectionError, match="Expert 'cat' matches nothing in this UNet2DConditionModel"):
        inject(make_unet(), to_experts({"cat": nowhere}, "unet"), MoLEConfig())


def test_flattened_gates_are_bound_to_one_resolution(unet: nn.Module, clip: nn.Module) -> None:
    config = MoLEConfig(pooling="flatten")
    inject(unet, make_experts(2, unet), config)
    run(unet)
    with pytest.raises(InjectionError, match=r"made for 64 tokens .*and received 256"):
        run(unet, size=16)
    mixture = inject(clip, make_experts(2, clip), config)
    assert mixture.groups[0].gate.tokens == 77
    with pytest.raises(InjectionError, match=r"made for 77 tokens .*and received 12"):
        run(clip)
    ldm = LDMUNet(make_unet())
    with pytest.raises(ConfigError, match="needs the latent's size: pass flatten_tokens"):
        inject(ldm, make_experts(2, make_unet()), config)
    with pytest.raises(ConfigError, match=r"flatten_tokens=\(8, 8\) is not allowed for a text encoder"):
        inject(make_clip(), make_experts(2, clip), config, flatten_tokens=(8, 8))


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_other_gates_work_at_any_resolution(pooling: str, unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(2, unet), MoLEConfig(pooling=pooling))
    randomise(mixture)
    for size in (4, 8, 12):
        assert differs(run(unet, size=size), run(make_unet(), size=size))


def test_an_unknown_order_of_execution_is_an_error(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    run(unet)
    late = mixture.groups[0].slots[1]
    mixture._context.begin(Forward())
    with pytest.raises(
        InjectionError, match=r"attn1.to_q' ran before the gate 'down_blocks.0.* was computed"
    ):
        late.module(torch.zeros(1, 4, 16))


def test_the_text_encoder_prefix_of_older_libraries(clip: nn.Module) -> None:
    experts = make_experts(2, clip)
    wrapped = nn.Module()
    wrapped.text_model = make_clip()
    first, second = inject(clip, experts, MoLEConfig()), inject(wrapped, experts, MoLEConfig())
    assert (
        [g.name for g in first.groups]
        == [g.name for g in second.groups]
        == ["encoder.layers.0", "encoder.layers.1"]
    )
    assert torch.equal(run(clip), run(wrapped.text_model))
    assert differs(run(clip), run(make_clip()))


def test_gates_that_read_the_timestep(unet: nn.Module) -> None:
    mixture = inject(unet, make_experts(3, unet), MoLEConfig(pooling="mean", timestep=True))

    def weights(timestep: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            unet(torch.ones(2, 4, 8, 8), timestep, torch.ones(2, 12, unet.config.cross_attention_dim))
        return torch.stack(list(mixture.live_weights().values()))

    assert weights(torch.tensor(10)).allclose(torch.tensor(1 / 3))
    # A slope over time alone: the first expert at the start of the schedule, the last at its end.
    with torch.no_grad():
        for group in mixture.groups:
            group.gate.timestep_projection[1] = torch.tensor([3.0, 0.0, -3.0])
    assert weights(torch.tensor(10)).argmax(-1).eq(0).all()
    assert weights(torch.tensor(990)).argmax(-1).eq(2).all()
    assert weights(torch.tensor([10, 990])).argmax(-1).tolist() == [[0, 2]] * len(mixture.groups)


def test_a_sigmoid_gate_can_open_for_all_experts_at_once() -> None:
    logits = torch.tensor([[[9.0, 9.0, -9.0]]])
    total = functional.sigmoid_total(logits, 1.0, (0, 1, 2))
    shares = functional.sigmoid_weights(logits, 1.0, (0, 1, 2))
    assert (total * shares).squeeze().tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-3)
    fresh = torch.zeros(1, 1, 3)
    assert float(functional.sigmoid_total(fresh, 1.0, (0, 1, 2))) == pytest.approx(1.0)
    # Shares of the others are as before when one is left out.
    assert functional.sigmoid_weights(logits, 1.0, (0, 2)).squeeze().tolist()[1] == 0.0

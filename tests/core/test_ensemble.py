"""The experts of a model with several networks: what fails changes nothing, what comes off is put back."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.networks import CLIP_TARGETS, UNET_TARGETS, lora_state, make_clip, make_unet, randomise, run
from torch import Tensor, nn

from mole_diffusion import (
    ConfigError,
    Expert,
    ExpertLoadError,
    GateMismatchError,
    InjectionError,
    MoLEConfig,
    RegionMaskError,
    UnknownExpertError,
    inject,
)
from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.mixture import mixture_on
from mole_diffusion.core.mixture_set import Choice
from mole_diffusion.core.modules import network_device
from mole_diffusion.core.records import Recorder

from .test_invariants import assert_close, differs

EPSILON = {"prediction_type": "epsilon"}
LOCAL = ("ff.net.0.proj",)


@pytest.fixture
def networks(unet: nn.Module, clip: nn.Module) -> dict[str, nn.Module]:
    return {"unet": unet, "text_encoder": clip}


def expert(name: str, seed: int, networks: dict[str, nn.Module], **header: str) -> Expert:
    """An expert for both networks."""
    leaves = {"unet": UNET_TARGETS, "text_encoder": CLIP_TARGETS}
    state = {
        f"{part}.{key}": value
        for part, network in networks.items()
        for key, value in lora_state(network, 2, seed, leaves[part]).items()
    }
    metadata = {key.replace("__", "."): value for key, value in header.items()}
    return Expert.from_state_dict(state, name=name, metadata=metadata)


@pytest.fixture
def experts(networks: dict[str, nn.Module]) -> list[Expert]:
    return [expert(name, seed, networks) for seed, name in enumerate(("dog", "cat", "boot"))]


@pytest.fixture
def ensemble(networks: dict[str, nn.Module], experts: list[Expert]) -> Ensemble:
    made = Ensemble(networks, facts=EPSILON, flatten_tokens={"text_encoder": 12})
    made.set_experts(experts)
    for mixture in made.mixtures.values():
        randomise(mixture)
    return made


def outputs(networks: dict[str, nn.Module]) -> list[Tensor]:
    return [run(network) for network in networks.values()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def hooks(networks: dict[str, nn.Module]) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for network in networks.values()
        for module in network.modules()
    )


class Word:
    """A companion that notes what happens to it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def attach(self) -> None:
        self.log.append(f"+{self.name}")

    def detach(self) -> None:
        self.log.append(f"-{self.name}")

    def show(self, shown: bool) -> None:
        self.log.append(f"{self.name} {'shown' if shown else 'hidden'}")


def test_eject_is_bitwise_and_leaves_no_hook(networks, experts) -> None:
    base = outputs(networks)
    ensemble = Ensemble(networks, facts=EPSILON)
    ensemble.set_experts(experts)
    assert all(differs(a, b) for a, b in zip(outputs(networks), base, strict=True))
    ensemble.eject()
    assert same(outputs(networks), base)
    assert hooks(networks) == 0
    assert ensemble.experts == {}


def test_a_failure_leaves_everything_as_it_was(ensemble, networks, experts) -> None:
    before, count, log = outputs(networks), hooks(networks), []
    wide = {
        key: torch.cat([v, v], 1) if "lora_A" in key else v
        for key, v in lora_state(networks["unet"], 2, 7).items()
    }
    misfit = Expert.from_state_dict({f"unet.{k}": v for k, v in wide.items()}, name="wide")
    other_base = expert("v", 8, networks, modelspec__prediction_type="v")

    def words(_: Sequence[Expert]) -> Iterator[Word]:
        yield Word("first", log)
        raise ExpertLoadError("the second word is taken")

    for call, error in (
        (lambda: ensemble.set_experts([*experts, misfit]), InjectionError),
        (lambda: ensemble.set_experts([*experts, other_base]), ExpertLoadError),
        (lambda: ensemble.set_experts([*experts, experts[0]]), ConfigError),
        (lambda: ensemble.set_experts(experts[:2], companions=words), ExpertLoadError),
        (lambda: ensemble.activate(Choice(["dgo"])), UnknownExpertError),
        (lambda: ensemble.activate(Choice(["dgo"], base_only=True)), UnknownExpertError),
        (lambda: ensemble.activate(Choice(["dog"], regions={"dog": torch.ones(2)})), RegionMaskError),
    ):
        with pytest.raises(error):
            call()
        assert same(outputs(networks), before)
        assert hooks(networks) == count
    assert log == ["-first"]
    ensemble.set_experts([*experts, other_base], unchecked=[other_base.name])
    ensemble.set_experts([other_base])  # it has been let in once


def test_a_network_that_carries_anothers_mixture(networks, experts) -> None:
    """The last network refuses: the first one's hooks must not stay."""
    other = inject(networks["text_encoder"], experts, MoLEConfig())
    ensemble = Ensemble(networks, facts={})
    with pytest.raises(InjectionError, match="CLIPTextModel already carries a mixture"):
        ensemble.set_experts(experts)
    assert mixture_on(networks["unet"]) is None
    assert mixture_on(networks["text_encoder"]) is other
    other.eject()
    ensemble.set_experts(experts)
    with pytest.raises(InjectionError):
        Ensemble(networks, facts={}).set_experts(experts)
    assert mixture_on(networks["unet"]) is ensemble.mixtures["unet"]


def test_park_and_unpark_are_bitwise_part_by_part(ensemble, networks) -> None:
    on = outputs(networks)
    ensemble.park()
    off = outputs(networks)
    assert hooks(networks) == 0
    ensemble.unpark(["text_encoder"])
    assert same(outputs(networks), [off[0], on[1]])
    ensemble.unpark()
    assert same(outputs(networks), on)
    ensemble.park(["text_encoder"])
    assert same(outputs(networks), [on[0], off[1]])


def test_take_and_put_hand_everything_over(ensemble, networks, experts) -> None:
    ensemble.activate(Choice(["dog", "cat"], scales={"cat": 0.5}))
    on = outputs(networks)
    held = ensemble.take()
    assert hooks(networks) == 0
    assert not ensemble.experts
    ensemble.set_experts(experts[:1])
    with pytest.raises(InjectionError, match=r"There are the experts \['dog'\]; take\(\) them first"):
        ensemble.put(held)
    ensemble.eject()
    ensemble.put(held)
    assert same(outputs(networks), on)
    assert list(ensemble.experts) == ["dog", "cat", "boot"]
    held = ensemble.take()
    with pytest.raises(InjectionError, match="taken off other networks"):
        Ensemble({"unet": make_unet()}, facts={}).put(held)


def test_another_set_stands_in_for_a_while(ensemble, networks, experts) -> None:
    ensemble.activate(Choice(["cat"]))
    before = outputs(networks)
    stand_in = ensemble.build(experts[:1], MoLEConfig.uniform())
    for _ in range(2):
        with ensemble.standing_in(stand_in):
            assert list(ensemble.experts) == ["dog"]
            inside = outputs(networks)
        assert same(outputs(networks), before)
        assert list(ensemble.experts) == ["dog", "cat", "boot"]
        assert all(differs(a, b) for a, b in zip(inside, before, strict=True))
    with pytest.raises(RuntimeError, match="inside"), ensemble.standing_in(stand_in):
        raise RuntimeError("inside")
    assert same(outputs(networks), before)


def test_a_choice_holds_for_its_block(ensemble, networks) -> None:
    before = outputs(networks)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    # Regions are a matter of the picture: text tokens have no place in it.
    with ensemble.choosing(Choice(["dog", "cat"], regions={"dog": left})):
        regional = outputs(networks)
    with ensemble.choosing(Choice(["dog", "cat"])):
        two = outputs(networks)
    assert differs(regional[0], two[0])
    assert torch.equal(regional[1], two[1])
    ensemble.park()
    base = outputs(networks)
    ensemble.unpark()
    with ensemble.choosing(Choice(base_only=True)):
        assert same(outputs(networks), base)
    assert same(outputs(networks), before)


def test_companions_come_and_go_with_their_experts(networks, experts) -> None:
    log: list[str] = []
    ensemble = Ensemble(networks, facts=EPSILON)

    def words(of: Sequence[Expert]) -> list[Word]:
        return [Word(one.name, log) for one in of]

    ensemble.set_experts(experts[:1], companions=words)
    ensemble.set_experts(experts[1:2], companions=words)
    with ensemble.choosing(Choice(base_only=True)):
        pass
    with ensemble.without_companions():
        log.append("inside")
    held = ensemble.take()
    ensemble.put(held)
    ensemble.configure(MoLEConfig(pooling="mean"))
    ensemble.eject()
    assert log == [
        "+dog", "dog shown",
        "-dog", "+cat", "cat shown",
        "cat hidden", "cat shown",
        "-cat", "inside", "+cat", "cat shown",
        "-cat", "+cat", "cat shown",
        "-cat",
    ]  # fmt: skip


def test_pipelines_around_the_same_networks_find_the_experts(ensemble, networks) -> None:
    assert Ensemble.carrying(networks) is ensemble
    assert Ensemble.carrying({"unet": networks["unet"]}) is None
    compiled = torch.compile(networks["unet"], backend="eager")
    assert Ensemble.carrying({**networks, "unet": compiled}) is ensemble
    ensemble.take()
    assert Ensemble.carrying(networks) is None


def test_gates_of_each_network_have_the_form_that_their_file_says(
    ensemble, networks, experts, tmp_path
) -> None:
    """The format keeps a configuration per part."""
    path = tmp_path / "gates.safetensors"
    ensemble.configure(MoLEConfig(granularity="layer"))
    forms = {
        "unet": MoLEConfig(granularity="layer"),
        "text_encoder": MoLEConfig(pooling="mean", strength=2.0),
    }
    mixed = ensemble.build(experts, configs=forms)
    for mixture in mixed.mixtures.values():
        randomise(mixture)
    with ensemble.standing_in(mixed):
        expected = outputs(networks)
        ensemble.save_gates(path, {"prompts": "a dog"})
    ensemble.configure(MoLEConfig())
    assert ensemble.load_gates(path)["prompts"] == "a dog"
    assert {part: mixture.config for part, mixture in ensemble.mixtures.items()} == forms
    assert same(outputs(networks), expected)
    ensemble.set_experts(experts[:2])  # fresh gates of the same forms
    assert {part: mixture.config for part, mixture in ensemble.mixtures.items()} == forms
    ensemble.configure(MoLEConfig())
    assert {mixture.config for mixture in ensemble.mixtures.values()} == {MoLEConfig()}


def test_a_gates_file_says_which_experts_are_styles(ensemble, networks, experts, tmp_path) -> None:
    name, *others = ensemble.experts
    assert ensemble.styles == []
    ensemble.say_styles([name])
    for mixture in ensemble.mixtures.values():
        randomise(mixture)
    ensemble.save_gates(tmp_path / "gates.safetensors")
    other = Ensemble(ensemble.networks, facts=EPSILON, attached=False)
    other.set_experts(ensemble.experts.values())
    nobody = Choice()
    assert other.balanced(nobody, lambda: None) is nobody
    other.load_gates(tmp_path / "gates.safetensors")
    assert other.styles == [name]
    styled = other.balanced(nobody, lambda: None).styled
    assert styled is not None
    assert list(styled.styles) == [name]
    # Not alone, not in place of something else, and not where nobody wants it.
    for choice in (Choice([name]), Choice(others), Choice(base_only=True), Choice(weights={name: 1.0})):
        assert other.balanced(choice, lambda: None) is choice
    other.style_balance = 0.0
    assert other.balanced(nobody, lambda: None) is nobody


@pytest.mark.parametrize("said", ["[1]", "{}", "sketch", "["])
def test_a_gates_file_whose_styles_are_no_names_is_refused(ensemble, tmp_path, said) -> None:
    ensemble.save_gates(tmp_path / "gates.safetensors", {"styles": said})
    before = [
        parameter.clone() for mixture in ensemble.mixtures.values() for parameter in mixture.parameters()
    ]
    for mixture in ensemble.mixtures.values():
        randomise(mixture, seed=9)
    now = [parameter.clone() for mixture in ensemble.mixtures.values() for parameter in mixture.parameters()]
    assert not same(before, now)
    with pytest.raises(GateMismatchError, match="damaged: its header's 'styles'"):
        ensemble.load_gates(tmp_path / "gates.safetensors")
    assert same(
        now, [parameter for mixture in ensemble.mixtures.values() for parameter in mixture.parameters()]
    )


@pytest.mark.parametrize(
    "form", [MoLEConfig(), MoLEConfig(granularity="layer")], ids=["same form", "other form"]
)
def test_gates_that_do_not_fit_change_nothing(ensemble, networks, experts, tmp_path, form) -> None:
    trained = Ensemble(
        {"unet": make_unet(), "text_encoder": make_clip()}, facts={"prediction_type": "v_prediction"}
    )
    trained.set_experts(experts, form)
    trained.save_gates(tmp_path / "v.safetensors")
    trained.facts = EPSILON
    trained.set_experts(experts[:2])
    trained.save_gates(tmp_path / "two.safetensors")
    before = outputs(networks)
    for name, difference in (
        ("v", "base model: prediction_type is 'v_prediction' in the file, 'epsilon' here"),
        ("two", "unet: expert 'boot' is here, not in the file"),
    ):
        with pytest.raises(GateMismatchError) as caught:
            ensemble.load_gates(tmp_path / f"{name}.safetensors")
        assert difference in caught.value.differences
        assert same(outputs(networks), before)
        assert ensemble.config == MoLEConfig()
    ensemble.load_gates(tmp_path / "v.safetensors", strict=False)
    assert ensemble.config == form


def test_only_some_parts_of_a_gates_file(ensemble, networks, experts, tmp_path) -> None:
    path = tmp_path / "gates.safetensors"
    ensemble.save_gates(path)
    expected = run(networks["unet"])
    ensemble.eject()
    half = Ensemble({"unet": networks["unet"]}, facts=EPSILON)
    half.set_experts(experts)
    with pytest.raises(GateMismatchError, match="part 'text_encoder' is in the file, not here"):
        half.load_gates(path)
    half.load_gates(path, parts=["unet"])
    assert torch.equal(run(networks["unet"]), expected)


def test_trained_gates_that_are_lost_are_told(ensemble, experts, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="mole_diffusion"):
        ensemble.set_experts(experts[:2])
        assert "the gates trained for ['unet', 'text_encoder'] are lost" in caplog.text
        caplog.clear()
        ensemble.configure(MoLEConfig(pooling="mean"))
        ensemble.eject()
    assert not caplog.records


def test_modules_that_were_replaced_are_found_again(ensemble, networks) -> None:
    before = outputs(networks)
    feed_forward = networks["unet"].mid_block.attentions[0].transformer_blocks[0].ff
    old = feed_forward.net[2]
    feed_forward.net[2] = nn.Linear(old.in_features, old.out_features)
    feed_forward.net[2].load_state_dict(old.state_dict())
    assert not torch.equal(run(networks["unet"]), before[0])
    ensemble.renew("unet")
    ensemble.unpark()
    assert same(outputs(networks), before)


def test_a_recorder_watches_while_hooks_are_on(ensemble, networks) -> None:
    recorder = Recorder()
    ensemble.record(recorder)
    outputs(networks)
    assert recorder.forwards == {"unet": 1, "text_encoder": 1}
    ensemble.park(["unet"])
    outputs(networks)
    ensemble.configure(MoLEConfig(pooling="mean"))
    outputs(networks)
    assert recorder.forwards == {"unet": 1, "text_encoder": 3}
    recorder.reset(["text_encoder"])
    assert set(recorder.weights.means()) == {"unet"}
    ensemble.record(None)
    outputs(networks)
    assert recorder.forwards == {"unet": 1}


def test_an_ensemble_is_not_kept_alive_by_its_networks(networks, experts) -> None:
    ensemble = Ensemble(networks, facts={})
    ensemble.set_experts(experts)
    watched = weakref.ref(ensemble)
    del ensemble
    gc.collect()
    assert watched() is None
    # The hooks are still there, and so is the mixture: whoever wants the network bare can have it.
    mixture = mixture_on(networks["unet"])
    assert mixture is not None
    mixture.eject()
    assert mixture_on(networks["unet"]) is None


@pytest.mark.parametrize("form", [MoLEConfig(), MoLEConfig(composition="output")], ids=["delta", "output"])
def test_an_expert_of_scale_0_is_left_out(networks, experts, form) -> None:
    ensemble = Ensemble(networks, facts=EPSILON)
    ensemble.set_experts(experts, form)
    for mixture in ensemble.mixtures.values():
        randomise(mixture)
    everybody = outputs(networks)
    with ensemble.choosing(Choice(["dog", "boot"])):
        without = outputs(networks)
    with ensemble.choosing(Choice(scales={"cat": 0.0})):
        assert same(outputs(networks), without)
    with ensemble.choosing(Choice(scales={"cat": 1e-6})):
        small = outputs(networks)
    assert all(differs(a, b) for a, b in zip(small, without, strict=True))
    assert all(differs(a, b) for a, b in zip(everybody, without, strict=True))
    ensemble.set_experts(
        [dataclasses.replace(one, scale=0.0 if one.name == "cat" else 1.0) for one in experts]
    )
    assert ensemble.mixtures["unet"].chosen() == ("dog", "boot")
    with ensemble.choosing(Choice(base_only=True)):
        base = outputs(networks)
    for mixture in ("gates", "fixed"):
        weights = {"dog": 1.0, "cat": 1.0} if mixture == "fixed" else None
        with ensemble.choosing(Choice(scales=dict.fromkeys(("dog", "cat", "boot"), 0.0), weights=weights)):
            assert same(outputs(networks), base)


def test_gates_are_where_the_network_computes(networks, experts) -> None:
    """No second device here: torch's fake tensors have one, and refuse to be mixed with others."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("this torch asks the real device for random numbers of fake tensors")
        with torch.device("cuda"):
            unet = make_unet()
        assert network_device(unet) == torch.device("cuda:0")
        mixture = inject(unet, experts, MoLEConfig())
        assert {p.device.type for p in mixture.parameters()} == {"cuda"}


def test_an_offloaded_network_says_where_it_computes() -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook

    unet = make_unet()
    cpu_offload_with_hook(unet, torch.device("cpu"))
    assert network_device(unet) == torch.device("cpu")
    unet = make_unet()
    cpu_offload(unet, torch.device("cpu"))
    assert network_device(unet) is None


def test_nothing_is_copied_or_made_from_numbers_in_a_forward(ensemble, networks) -> None:
    """Gates, scales and weights lie ready: a second forward makes no tensor from Python's numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    choices = [
        Choice(scales={"cat": 0.5}),
        Choice(weights={"dog": 0.3, "cat": 0.7}, scales={"cat": 0.5}),
        Choice(),
    ]
    for choice in choices:
        with ensemble.choosing(choice):
            outputs(networks)
            with Made() as gated:
                outputs(networks)
        with ensemble.choosing(Choice(base_only=True)), Made() as bare:
            outputs(networks)
        for made in ("lift_fresh", "_to_copy", "scalar_tensor"):
            assert gated.names.count(made) == bare.names.count(made), (choice, made)


def test_a_gates_file_of_one_form_written_before_is_read_as_ever(ensemble, networks, tmp_path) -> None:
    """Header entries that a configuration of today has and an older file lacks take their default."""
    path = tmp_path / "gates.safetensors"
    ensemble.save_gates(path)
    expected = outputs(networks)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    parts = json.loads(header["parts"])
    for part in parts.values():
        del part["config"]["timestep"]
    save_file(load_file(path), path, {**header, "parts": json.dumps(parts)})
    ensemble.configure(MoLEConfig(pooling="mean"))
    ensemble.load_gates(path)
    for found, wanted in zip(outputs(networks), expected, strict=True):
        assert_close(found, wanted)


def test_a_dora_is_computed_anew_when_its_base_changed(networks, experts) -> None:
    """A LoRA that was fused when the expert came is taken out again, or the other way round."""
    unet = networks["unet"]
    state = {f"unet.{key}": value for key, value in lora_state(unet, 2, 5, ("to_q", "ff.net.2")).items()}
    for name, module in unet.named_modules():
        if f"unet.{name}.lora_A.weight" in state:
            state[f"unet.{name}.lora_magnitude_vector"] = module.weight.detach().norm(dim=1) * 1.3
    dora = Expert.from_state_dict(state, name="dora")
    fused = [module for name, module in unet.named_modules() if name.endswith("attn1.to_q")]
    ensemble = Ensemble(networks, facts=EPSILON)
    ensemble.set_experts([dora, experts[0]])
    randomise(ensemble.mixtures["unet"])
    expected = run(unet)
    gates = ensemble.mixtures["unet"].gates.state_dict()

    def fuse(sign: float) -> None:
        for number, module in enumerate(fused):
            delta = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(number))
            module.weight.data += sign * 0.2 * delta

    fuse(1.0)
    during = run(unet)
    with ensemble.choosing(Choice()):
        with_fused = run(unet)
    other = Ensemble({**networks, "unet": make_unet()}, facts=EPSILON)
    other.networks["unet"].load_state_dict(unet.state_dict())
    ensemble.park(["text_encoder"])
    other.set_experts([dora, experts[0]])
    other.mixtures["unet"].gates.load_state_dict(gates)
    assert torch.equal(with_fused, run(other.networks["unet"]))
    assert differs(during, with_fused)
    fuse(-1.0)
    ensemble.activate(Choice())
    assert_close(run(unet), expected)


def test_a_dora_is_computed_from_what_the_host_calls_the_bare_weight(networks) -> None:
    unet = networks["unet"]
    state = {f"unet.{key}": value for key, value in lora_state(unet, 2, 5, ("to_q",)).items()}
    bare = {}
    for name, module in unet.named_modules():
        if f"unet.{name}.lora_A.weight" in state:
            state[f"unet.{name}.lora_magnitude_vector"] = module.weight.detach().norm(dim=1) * 1.3
            bare[module] = module.weight.detach().clone()
    dora = Expert.from_state_dict(state, name="dora")
    ensemble = Ensemble(networks, facts=EPSILON)
    ensemble.set_experts([dora])
    expected = ensemble.mixtures["unet"].groups[0].slots[0].factors[0].matrices
    ensemble.eject()
    for module in bare:
        module.weight.data.mul_(2.0)
    patched = Ensemble(networks, facts=EPSILON, base_weight=bare.__getitem__)
    patched.set_experts([dora])
    patched.activate(Choice())
    found = patched.mixtures["unet"].groups[0].slots[0].factors[0].matrices
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

"""What is derived once and kept: dropped when what it is made of changes, made anew where it must be."""

from __future__ import annotations

import pytest
import torch
from tiny.networks import lora_state, randomise, run, to_experts
from torch import Tensor, nn

from mole_diffusion import MoLEConfig, inject
from mole_diffusion.core.caches import KEPT, ParameterCache, Plans
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.core.functional import expert_logits, expert_logits_flat, joined_logits
from mole_diffusion.core.ranks import gate_factors

from .test_invariants import assert_close, differs

CPU = torch.device("cpu")


class Doubled:
    """Twice a parameter, through a cache, and how often that was computed."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.cache, self.times = ParameterCache(), 0

    def __call__(self) -> Tensor:
        return self.cache.get("twice", [self.parameter], self._build)

    def _build(self) -> Tensor:
        self.times += 1
        return self.parameter * 2


@pytest.fixture
def doubled() -> Doubled:
    return Doubled()


@torch.no_grad()
def test_what_is_made_of_a_parameter_stays_as_long_as_that_does(doubled: Doubled) -> None:
    assert doubled() is doubled()
    assert doubled.times == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda parameter: parameter.copy_(torch.tensor([5.0, 6.0])),
        lambda parameter: parameter.add_(1.0),
        lambda parameter: setattr(parameter, "data", torch.tensor([5.0, 6.0])),
    ],
    ids=["copy", "add", "other storage"],
)
@torch.no_grad()
def test_a_parameter_that_changed_is_noticed(doubled: Doubled, change) -> None:
    before = doubled()
    change(doubled.parameter)
    assert torch.equal(doubled(), doubled.parameter * 2)
    assert not torch.equal(doubled(), before)
    assert doubled.times == 2


def test_a_fused_optimiser_is_noticed_though_it_counts_no_versions(doubled: Doubled) -> None:
    optimiser = torch.optim.AdamW([doubled.parameter], lr=0.5, fused=True)
    for _ in range(2):
        doubled().sum().backward()
        optimiser.step()
        with torch.no_grad():
            assert torch.equal(doubled(), doubled.parameter * 2)
    optimiser.zero_grad()
    with torch.no_grad():
        assert torch.equal(doubled(), doubled.parameter * 2)


def test_with_gradient_it_is_made_anew_and_has_a_graph(doubled: Doubled) -> None:
    with torch.no_grad():
        doubled()
    for _ in range(2):
        doubled().sum().backward()
    assert torch.equal(doubled.parameter.grad, torch.tensor([4.0, 4.0]))
    assert doubled.times == 3


def test_what_inference_mode_made_serves_training_later(doubled: Doubled) -> None:
    with torch.inference_mode():
        kept = doubled()
    assert not kept.is_inference()
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        again = doubled()
    (weight * again).sum().backward()
    assert torch.equal(weight.grad, again)
    assert doubled.times == 1


def test_plans_are_made_once_per_choice_and_place() -> None:
    plans: Plans[object] = Plans()
    plans.choose("a")
    first = plans.get(CPU, torch.float32, object)
    half = plans.get(CPU, torch.bfloat16, object)
    plans.choose("b")
    other = plans.get(CPU, torch.float32, object)
    plans.choose("a")
    assert plans.get(CPU, torch.float32, object) is first
    assert plans.get(CPU, torch.bfloat16, object) is half
    assert len({id(one) for one in (first, half, other)}) == 3
    assert plans.places == [(CPU, torch.float32), (CPU, torch.bfloat16)]


def test_plans_of_many_choices_do_not_pile_up_and_a_choice_outlives_clearing() -> None:
    plans: Plans[object] = Plans()
    for choice in range(3 * KEPT):
        plans.choose(choice)
        plans.get(CPU, torch.float32, object)
        assert len(plans._kept) <= KEPT
    last = plans.get(CPU, torch.float32, object)
    plans.clear()
    assert plans.places == []
    assert plans.get(CPU, torch.float32, object) is not last


def factors(rank: int, width: int = 24, seed: int = 0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*size, generator=generator) for size in ((rank, 8), (width, rank)))
    return LoraFactors(down, up, rank / 2)


@pytest.mark.parametrize(
    "ranks",
    [[2, 3, 2], [16] * 20, [16, 8, 16] * 7, [30], [4] * 70, [2] * 60 + [3] * 60],
    ids=[
        "dense",
        "blocks",
        "blocks of two ranks",
        "rank above width",
        "70 experts",
        "two ranks, 120 experts",
    ],
)
def test_logits_in_rank_space_are_those_of_the_outputs(ranks: list[int]) -> None:
    experts = {i: factors(rank, seed=i) for i, rank in enumerate(ranks)}
    generator = torch.Generator().manual_seed(99)
    z = torch.randn(2, 5, sum(ranks), generator=generator)
    projection = torch.randn(len(ranks), 24, len(ranks), generator=generator)
    read = gate_factors(experts, len(ranks), CPU)
    assert isinstance(read.root, tuple) == (sum(ranks) > 256)
    outputs = torch.cat(
        [part @ one.weighted_up().T for part, one in zip(z.split(ranks, -1), experts.values(), strict=True)],
        -1,
    )
    flat = projection.reshape(-1, len(ranks))
    expected = (outputs @ flat) / outputs.norm(dim=-1, keepdim=True)
    projected = read.project(projection)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(expert_logits(z, projected, read.root), expected, **close)
    rows = z.flatten(0, 1)
    torch.testing.assert_close(expert_logits(rows, projected, read.root), expected.flatten(0, 1), **close)
    if not isinstance(read.root, tuple):
        joined = torch.cat([projected, read.root], dim=1)
        torch.testing.assert_close(joined_logits(z, joined, len(ranks)), expected, **close)
    literal = (outputs.flatten(1) @ flat.repeat(5, 1)) / outputs.flatten(1).norm(dim=-1, keepdim=True)
    per_token = projected.expand(5, *projected.shape)
    torch.testing.assert_close(
        expert_logits_flat(z, per_token, read.root),
        literal,
        rtol=1e-4,
        atol=1e-3 * float(literal.abs().max()),
    )


@pytest.mark.parametrize("count", [40, 66])
def test_many_experts_are_mixed_as_few_are(count: int, clip: nn.Module) -> None:
    """Over 256 ranks the experts' lengths come block by block: the same gates as one dense product gives."""
    experts = to_experts(
        {str(i): lora_state(clip, 9 if i % 3 else 4, 10 + i) for i in range(count)}, "text_encoder"
    )
    mixture = inject(clip, experts, MoLEConfig())
    randomise(mixture)
    slot = mixture.groups[0].slots[0]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = clip(ids).last_hidden_state
        blocks = slot.gate_factors(count, CPU).root
        assert isinstance(blocks, tuple)
        for group in mixture.groups:
            for one in group.slots:
                one.release()
            group.gate.cache.clear()
        import mole_diffusion.core.ranks as ranks

        limit, ranks._DENSE = ranks._DENSE, 10**6
        try:
            assert_close(clip(ids).last_hidden_state, found)
            assert isinstance(slot.gate_factors(count, CPU).root, Tensor)
        finally:
            ranks._DENSE = limit
        mixture.activate(["1", "2"])
        assert differs(clip(ids).last_hidden_state, found)


def test_gates_that_train_are_seen_by_forwards_without_gradient(unet: nn.Module) -> None:
    mixture = inject(
        unet, to_experts({n: lora_state(unet, 2, i) for i, n in enumerate("ab")}, "unet"), MoLEConfig()
    )
    randomise(mixture)
    before = run(unet)
    optimiser = torch.optim.SGD(mixture.parameters(), lr=10.0)
    run(unet, grad=True).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()
    after = run(unet)
    assert differs(after, before)
    for group in mixture.groups:
        group.gate.cache.clear()
    assert_close(run(unet), after)

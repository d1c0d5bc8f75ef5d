"""The pure mathematics against the paper's equations written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny.networks import make_experts, randomise, run
from torch import nn

from mole_diffusion import MoLEConfig, inject
from mole_diffusion.core import functional


def literal_expert_logits(
    x: torch.Tensor, deltas: list[torch.Tensor], projection: torch.Tensor
) -> torch.Tensor:
    """Eq. 9-10 with the experts' outputs formed: normalise their concatenation, then project."""
    features = torch.cat([x @ delta.T for delta in deltas], dim=-1)
    return nn.functional.normalize(features, dim=-1) @ projection.reshape(-1, projection.shape[-1])


@pytest.mark.parametrize("pooling", ["mean", "token", "flatten"])
def test_gates_in_rank_space_equal_the_paper(pooling: str, unet: nn.Module) -> None:
    experts = make_experts(3, unet)
    mixture = inject(unet, experts, MoLEConfig(pooling=pooling))
    randomise(mixture)
    seen: list[torch.Tensor] = []
    group = mixture.groups[0]
    group.slots[0].module.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    run(unet)
    x, name = seen[0], group.matrices[0]
    deltas = []
    for expert in experts:
        down, up = expert.factors["unet"][name].matrices
        deltas.append(up @ down)
    projection = group.gate.projection.detach()
    if pooling == "flatten":
        outputs = torch.stack([x @ delta.T for delta in deltas], dim=2).flatten(1)
        logits = (nn.functional.normalize(outputs, dim=-1) @ projection.reshape(-1, 3)).unsqueeze(1)
    else:
        logits = literal_expert_logits(
            x.mean(1, keepdim=True) if pooling == "mean" else x, deltas, projection
        )
    expected = torch.softmax(logits / group.gate.temperature, dim=-1)
    found = mixture._context.values[group.name].weights
    assert found.shape == ((2, 64, 3) if pooling == "token" else (2, 1, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


def test_vanishing_features_give_uniform_gates_and_finite_gradients() -> None:
    z = torch.zeros(2, 5, 4, requires_grad=True)
    projected = torch.randn(4, 3, requires_grad=True)
    logits = functional.expert_logits(z, projected, torch.eye(4))
    functional.gate_weights(logits, 1.0).square().sum().backward()
    assert torch.all(logits == 0)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(projected.grad).all()


def test_gate_weights_of_active_experts() -> None:
    logits = torch.randn(4, 3)
    weights = functional.gate_weights(logits, 0.5, (0, 2))
    full = torch.softmax(logits / 0.5, -1)
    torch.testing.assert_close(weights[:, 0] / weights[:, 2], full[:, 0] / full[:, 2])
    assert torch.all(weights[:, 1] == 0)


def test_effective_strength() -> None:
    strength = torch.tensor(2.5)
    values = [float(functional.effective_strength(strength, n, 4)) for n in (1, 2, 3, 4)]
    assert values == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert float(functional.effective_strength(strength, 1, 1)) == 1.0


@pytest.mark.parametrize("count", [1, 3, 6])
def test_balance_loss_is_n_log_n_at_uniform_and_larger_elsewhere(count: int) -> None:
    uniform = torch.full((4, 2, count), 1 / count)
    assert float(functional.balance_loss(uniform)) == pytest.approx(count * math.log(count), abs=1e-5)
    assert float(functional.balance_loss(uniform, normalised=True)) == pytest.approx(0, abs=1e-5)
    if count > 1:
        logits = torch.randn(4, 2, count, requires_grad=True)
        loss = functional.balance_loss(torch.softmax(logits, -1))
        loss.backward()
        assert float(loss.detach()) > count * math.log(count)
        assert logits.grad.abs().max() > 0
    one_hot = torch.zeros(1, count)
    one_hot[0, 0] = 1
    assert torch.isfinite(functional.balance_loss(one_hot))


def test_balance_loss_is_smallest_at_its_prior() -> None:
    weights = torch.softmax(torch.randn(5, 2, 4), -1)
    even = torch.full((4,), 0.25)
    for normalised in (False, True):
        paper = functional.balance_loss(weights, normalised=normalised)
        torch.testing.assert_close(functional.balance_loss(weights, even, normalised=normalised), paper)
    prior = torch.tensor([0.7, 0.1, 0.15, 0.05])
    assert float(functional.balance_loss(prior[None], prior, normalised=True)) == pytest.approx(0, abs=1e-5)
    divergence = 4 * (prior * (prior / even).log()).sum()
    torch.testing.assert_close(functional.balance_loss(even[None], prior, normalised=True), divergence)


def test_entropy() -> None:
    assert float(functional.entropy(torch.full((2, 4), 0.25))) == pytest.approx(math.log(4))
    assert float(functional.entropy(torch.tensor([[1.0, 0.0]]))) == 0.0


def test_region_weights_and_counts() -> None:
    weights = torch.tensor([[[0.5, 0.3, 0.2]]])
    masks = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    found = functional.region_weights(weights, masks)[0]
    torch.testing.assert_close(found, torch.tensor([[0.625, 0.375, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(functional.region_counts(masks), torch.tensor([[2.0], [1.0], [1.0]]))


@pytest.mark.parametrize("image", [False, True])
def test_fused_add_is_the_same_with_and_without_gradient(image: bool) -> None:
    z, weights, up = torch.randn(2, 12, 5), torch.rand(2, 1, 5), torch.randn(5, 7)
    output = torch.randn(2, 7, 3, 4) if image else torch.randn(2, 12, 7)
    delta = functional.mixed_delta(z, weights, up)
    expected = output + (delta.transpose(1, 2).reshape(2, 7, 3, 4) if image else delta)
    before = output.clone()
    torch.testing.assert_close(functional.add_mixed_delta(output, z, weights, up), expected)
    assert torch.equal(output, before)
    with torch.no_grad():
        found = functional.add_mixed_delta(output, z, weights, up)
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == output.data_ptr()

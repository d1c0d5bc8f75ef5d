"""Tokens of a concept choose the concept's expert, where a collage and its caption say which it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mole_diffusion import MoLEConfig
from mole_diffusion.training import Concept, GateTrainer, TrainingConfig
from mole_diffusion.training.losses import routing_loss

Tiny = Callable[..., TrainingConfig]
PROMPT = "a zor boot and a vim cat"


def test_the_loss_is_the_cross_entropy_over_owned_tokens() -> None:
    weights = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]])
    owners = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]]])
    expected = -(torch.tensor(0.9).log() + 0.5 * torch.tensor(0.8).log()) / 1.5
    torch.testing.assert_close(routing_loss(weights, owners), expected)
    assert float(routing_loss(weights, torch.zeros_like(owners))) == 0.0
    uniform = torch.full((2, 4, 3), 1 / 3)
    torch.testing.assert_close(routing_loss(uniform, torch.eye(3)[[0, 1, 2, 0]]), torch.tensor(3.0).log())


def test_words_belong_to_the_concept_they_name(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    router = GateTrainer(pipe, PROMPT, concepts, tiny())._objective._router  # type: ignore[attr-defined]
    row = router._words([PROMPT, ""], "text_encoder", 16)
    ids = pipe.tokenizer(PROMPT).input_ids
    words = [pipe.tokenizer.decode([i]) for i in ids]
    said = {
        name: "".join(
            word.removesuffix("</w>")
            for word, mine in zip(words, row[0, : len(words), index].tolist(), strict=True)
            if mine
        )
        for index, name in enumerate(pipe.experts)
    }
    assert {name: text.replace(" ", "") for name, text in said.items()} == {
        "boot": "azorboot",
        "cat": "avimcat",
    }
    assert row[1].sum() == 0


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block"])
def test_training_sends_tokens_to_the_expert_they_belong_to(
    pipe: Any, concepts: list[Concept], tiny: Tiny, granularity: str
) -> None:
    pipe.configure(MoLEConfig(granularity=granularity))
    settings = {"iterations": 20, "gate_lr": 0.1, "alpha": 0.0, "text_encoder_gates": True}
    history = GateTrainer(pipe, PROMPT, concepts, tiny(route_weight=10.0, **settings)).train().history
    routing = [row["parts"]["routing"] for row in history]
    assert routing[0] == pytest.approx(0.6931, abs=0.02), "fresh gates know nothing: log 2"
    assert sum(routing[-3:]) / 3 < 0.75 * routing[0]


def test_gates_that_pool_the_tokens_are_left_alone(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    pipe.configure(MoLEConfig(pooling="mean"))
    (row,) = GateTrainer(pipe, PROMPT, concepts, tiny(iterations=1, route_weight=1.0)).train().history
    assert "routing" not in row["parts"]

"""Methods without gates: PEFT and the authors' formulas are the oracles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.routing import Route
from mole_diffusion.text import MoLEForSeq2SeqLM
from mole_diffusion.text.merging import alone, lorahub, mix_factors, pems, searched, tuned
from mole_diffusion.text.phatgoose import KeyConfig, phatgoose, train_keys
from mole_diffusion.text.selection import preselected
from mole_diffusion.text.training import CrossEntropy, TextTrainingConfig

from .conftest import Make, save_adapter
from .test_model import TEXTS, logits, peft
from .test_training import examples, loss

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def test_arrow_is_peft(base: Any, make: Make, tmp_path: Path) -> None:
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    # Its power iterations want a direction that stands out.
    folders = [save_adapter(base, tmp_path / str(seed), seed, loudest=4.0) for seed in (1, 2, 3)]
    model = make(0)
    model.load_experts(folders)
    batch = model.read(TEXTS)
    oracle = create_arrow_model(
        copy.deepcopy(base),
        task_specific_adapter_paths=[str(path) for path in folders],
        arrow_config=ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1),
    ).eval()
    ours = logits(model, batch, mixture=Route("arrow", top_k=2, temperature=0.7))
    assert_close(ours, logits(oracle, batch), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(ours, logits(model, batch, mixture="nla"), atol=0.1)


def test_routes_choose_the_loudest_for_its_size(make: Make) -> None:
    route = Route("energy", top_k=1)
    factors = list(make(2).experts.values())
    pair = {
        i: one.factors["encoder"]["encoder.block.0.layer.0.SelfAttention.q"] for i, one in enumerate(factors)
    }
    x = torch.randn(5, 16)
    z = torch.cat([x @ one.down.T for one in pair.values()], dim=-1)
    owners = torch.eye(2).repeat_interleave(3, dim=1)
    found = route.weights(route.factors(pair), z, owners)
    deltas = [one.up @ one.down * one.scaling for one in pair.values()]
    sizes = torch.stack([(x @ d.T).norm(dim=-1) / d.norm() for d in deltas], dim=-1)
    assert torch.equal(found.argmax(-1), sizes.argmax(-1))
    assert_close(found.sum(-1), torch.ones(5))
    arrow = Route("arrow", top_k=2)
    first = torch.stack([torch.linalg.svd(d)[2][0] for d in deltas])
    expected = torch.softmax((x @ first.T).abs(), dim=-1)
    assert_close(arrow.weights(arrow.factors(pair), z, owners), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["arrow", "energy"])
def test_routes_obey_masks_scales_and_caches(make: Make, kind: str) -> None:
    model = make(3)
    batch = model.read(TEXTS)
    assert_close(
        logits(model, batch, mixture=kind, active_experts=["two"]),
        logits(make(3), batch, active_experts=["two"]),
    )
    two = logits(make(2), batch, mixture=kind)
    assert_close(logits(model, batch, mixture=kind, active_experts=["one", "two"]), two, rtol=1e-4, atol=1e-4)
    assert_close(logits(model, batch, mixture=kind, expert_scales={"three": 0}), two, rtol=1e-4, atol=1e-4)
    settings = {**batch, "mixture": kind, "max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(model.generate(**settings), model.generate(**settings, use_cache=False))
    with pytest.raises(ConfigError, match="expected one of"):
        model.generate(**batch, mixture="arrows")
    with pytest.raises(ConfigError, match="composition='output'"):
        make(2, MoLEConfig(composition="output")).generate(**batch, mixture=kind, use_cache=False)


def test_factors_mix_as_in_the_authors_code(
    base: Any, adapters: list[Path], make: Make, tmp_path: Path
) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    weights = {"one": 0.8, "two": -0.5}
    merged = mix_factors(list(model.experts.values()), weights, "mixed")
    again = MoLEForSeq2SeqLM(copy.deepcopy(base), model.tokenizer)
    again.add_expert(merged)
    # As LoRAHub's get_final_weights: a weighted sum of state dicts.
    oracle = peft(base, *adapters[:2])
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    states = [get_peft_model_state_dict(oracle, adapter_name=name) for name in ("a0", "a1")]
    summed = {key: 0.8 * states[0][key] - 0.5 * states[1][key] for key in states[0]}
    set_peft_model_state_dict(oracle, summed, adapter_name="a0")
    oracle.set_adapter("a0")
    assert_close(logits(again, batch), logits(oracle, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(again, batch), logits(model, batch, mixture=weights), atol=1e-2)


def test_pems_is_the_mean_of_factors_and_can_be_kept(base: Any, make: Make, tmp_path: Path) -> None:
    model = make(2)
    batch = model.read(TEXTS)
    merged = pems(model)
    assert merged.weights == {"one": 0.5, "two": 0.5}
    assert merged.expert is not None
    again = MoLEForSeq2SeqLM(copy.deepcopy(base), model.tokenizer)
    again.add_expert(merged.expert)
    opened = PeftModel.from_pretrained(copy.deepcopy(base), str(merged.save(tmp_path / "pems"))).eval()
    assert_close(logits(again, batch), logits(opened, batch), rtol=1e-4, atol=1e-4)


def test_factors_that_differ_cannot_be_mixed(base: Any, make: Make, tmp_path: Path) -> None:
    model = make(1)
    model.load_expert(save_adapter(base, tmp_path / "other", 8, r=2))
    with pytest.raises(ConfigError, match="differs"):
        pems(model)


def test_searches_find_the_expert_that_answers(make: Make) -> None:
    model = make(2)
    pairs = examples(model, "two")
    before = logits(model, model.read(TEXTS))
    assert alone(model, model.tokenizer, pairs).weights == {"two": 1.0}
    found = searched(model, model.tokenizer, pairs, budget=60)
    assert found.score is not None
    assert found.score < loss(model, pairs, weights={"two": 0.0})
    plain = lorahub(model, model.tokenizer, pairs, budget=40, literal=False)
    assert plain.evaluations == 40
    assert plain.score is not None
    again = lorahub(model, model.tokenizer, pairs, budget=40, literal=False)
    assert plain.weights == again.weights
    one = tuned(model, model.tokenizer, pairs)
    assert len(set(one.weights.values())) == 1
    assert torch.equal(logits(model, model.read(TEXTS)), before)


def test_few_of_many_are_chosen_by_the_encoders_gates(make: Make) -> None:
    model = make(3, MoLEConfig(gate_input="own"))
    choices = preselected(model, TEXTS, 1)
    with model.active(), model.recording():
        model.model.get_encoder()(**model.read(TEXTS))
    means = [model.gate_weights().where(network="encoder", entry=k).mean("expert") for k in range(len(TEXTS))]
    assert choices == [(max(own, key=lambda key: own[key])[0],) for own in means]
    assert choices == [preselected(model, [text], 1)[0] for text in TEXTS]
    assert len(set(choices)) > 1
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    few = model.answer(TEXTS, top_k=1, **settings)
    single = [
        model.answer(text, active_experts=names, **settings)[0]
        for text, names in zip(TEXTS, choices, strict=True)
    ]
    assert few == single
    assert model.answer(TEXTS, top_k=3, **settings) == model.answer(TEXTS, **settings)
    assert preselected(model, TEXTS, 1, active=["two", "three"]) != choices
    with pytest.raises(ConfigError, match="top_k is 0; it has to be at least 1"):
        model.answer(TEXTS, top_k=0)
    with pytest.raises(ConfigError, match="top_k goes by the gates, and mixture is 'nla'"):
        model.answer(TEXTS, top_k=1, mixture="nla")


def test_the_best_of_many_are_kept_for_a_task(make: Make) -> None:
    model = make(3, MoLEConfig(gate_input="own"))
    pairs = [(text, text) for text in TEXTS]
    objective = CrossEntropy(model.model, model.tokenizer, pairs, TextTrainingConfig())
    with torch.no_grad(), model.active(), model.recording():
        objective.loss(pairs)
    weights = {name: weight for (name,), weight in model.gate_weights().mean("expert").items()}
    least = min(weights, key=lambda name: weights[name])
    assert model.keep_best(pairs, 3) == tuple(weights)
    assert all(mixture.is_trained for mixture in model.mixtures.values())
    kept = model.keep_best(pairs, 2)
    assert set(kept) == set(weights) - {least}
    assert list(model.experts) == list(kept)
    assert not any(mixture.is_trained for mixture in model.mixtures.values())
    with pytest.raises(ConfigError, match="count is 0; it has to be at least 1"):
        model.keep_best(pairs, 0)
    assert list(model.experts) == list(kept)


def test_phatgoose_routes_tokens_by_keys(make: Make) -> None:
    model = make(2)
    torch.manual_seed(2)
    keys = {
        name: {
            matrix: torch.randn(f.down.shape[1]) for own in e.factors.values() for matrix, f in own.items()
        }
        for name, e in model.experts.items()
    }
    route = phatgoose(model, keys, top_k=1)
    module = model.model.encoder.block[0].layer[0].SelfAttention.q
    name, seen = "encoder.block.0.layer.0.SelfAttention.q", []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    batch = model.read(TEXTS)
    logits(model, batch, mixture=route)
    handle.remove()
    x, output = seen[0]
    # As their router: both normalised, scaled by the root of the width, the best of all experts.
    normal = torch.nn.LayerNorm(16, elementwise_affine=False)
    stacked = torch.stack([normal(keys[one][name]) for one in ("one", "two")])
    best = (normal(x) @ stacked.T / 4.0).argmax(-1, keepdim=True)
    assert 0 < best.float().mean() < 1
    deltas = [
        x @ (f.up @ f.down * f.scaling).T
        for f in (e.factors["encoder"][name] for e in model.experts.values())
    ]
    expected = module.weight @ x.transpose(1, 2)
    assert_close(output, expected.transpose(1, 2) + torch.where(best == 0, *deltas), rtol=1e-3, atol=1e-3)
    settings = {**batch, "mixture": route, "max_new_tokens": 6}
    assert torch.equal(model.generate(**settings), model.generate(**settings, use_cache=False))
    assert_close(
        logits(model, batch, mixture=route, active_experts=["two"]),
        logits(make(2), batch, active_experts=["two"]),
    )


def test_keys_open_an_expert_to_what_it_was_made_for(make: Make) -> None:
    model = make(2)
    pairs = examples(model, "two")
    base = logits(model, model.read(TEXTS))
    found: list[float] = []
    keys = train_keys(
        model, model.tokenizer, "two", pairs,
        KeyConfig(iterations=60, batch_size=6, learning_rate=0.1, progress=False),
        callback=lambda event: found.append(event.row["loss"]),
    )  # fmt: skip
    assert set(keys) == {name for own in model.experts["two"].factors.values() for name in own}
    # At first every matrix adds half of the expert.
    assert found[0] == pytest.approx(loss(model, pairs, weights={"two": 0.5}), rel=1e-3)
    assert found[-1] < 0.8 * found[0]
    assert torch.equal(logits(model, model.read(TEXTS)), base)
    with pytest.raises(ConfigError, match="these experts have no keys: one"):
        phatgoose(model, {"two": keys})
    with pytest.raises(ConfigError, match="no expert is called 'three'"):
        train_keys(model, model.tokenizer, "three", pairs)
    with pytest.raises(ConfigError, match="kind='keys' needs keys"):
        Route("keys")

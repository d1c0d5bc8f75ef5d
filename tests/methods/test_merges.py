"""PEFT's merges against PEFT's own `add_weighted_adapter` on the whole networks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from mole_diffusion import load_expert
from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.methods import PrepareOptions, load_prepared, prepare

CLOSE = {"atol": 2e-4, "rtol": 0.0}
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def merged_by_peft(
    plain: Any, lora_files: dict[str, Path], method: str, weights: dict[str, float], density: float | None
) -> Any:
    """The diffusers pipeline with every network replaced by PEFT's model with the merged adapter active."""
    for part, targets in TARGETS.items():
        model: Any = None
        loaded = []
        for name, path in lora_files.items():
            state = {
                key.removeprefix(f"{part}."): value
                for key, value in load_file(path).items()
                if key.startswith(f"{part}.")
            }
            if not state:
                continue
            rank = next(value for key, value in state.items() if "lora_A" in key).shape[0]
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
            if model is None:
                model = get_peft_model(copy.deepcopy(getattr(plain, part)), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            result = set_peft_model_state_dict(
                model, {f"base_model.model.{key}": value for key, value in state.items()}, adapter_name=name
            )
            assert not result.unexpected_keys
            loaded.append(name)
        model.add_weighted_adapter(
            loaded, [weights[n] for n in loaded], "merged", combination_type=method, density=density
        )
        model.set_adapter("merged")
        setattr(plain, part, model.base_model.model)
    return plain


@pytest.mark.parametrize(
    ("method", "weights", "density"),
    [
        ("svd", {"boot": 1.0, "cat": 1.0, "clock": 1.0}, None),
        ("svd", {"boot": 0.7, "cat": -0.4, "clock": 1.2}, None),
        ("ties", {"boot": 1.0, "cat": 1.0, "clock": 1.0}, 0.2),
        ("ties", {"boot": 1.0, "cat": 0.5, "clock": 1.0}, 0.6),
        ("dare_linear", {"boot": 1.0, "cat": 1.0, "clock": 0.5}, 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_merge_is_that_of_peft(pipe, plain, draw, lora_files, method, weights, density) -> None:
    options = PrepareOptions(weights=weights, density=density)
    prepared = prepare(method, pipe, options=options)
    expected = draw(merged_by_peft(plain, lora_files, method, weights, density))
    torch.testing.assert_close(draw(pipe, mixture=prepared), expected, **CLOSE)
    assert (draw(pipe, mixture="none") - expected).abs().max() > 0.01


def test_scale_of_an_expert_multiplies_its_weight(empty, plain, draw, lora_files) -> None:
    for name, path in lora_files.items():
        empty.load_expert(path, name=name, scale=0.5 if name == "cat" else 1.0)
    weights = {"boot": 1.0, "cat": 0.5, "clock": 1.0}
    expected = draw(merged_by_peft(plain, lora_files, "svd", weights, None))
    torch.testing.assert_close(draw(empty, mixture=prepare("svd", empty)), expected, **CLOSE)


def test_dare_drops_the_same_values_for_the_same_seed(pipe, tiny, tmp_path) -> None:
    state = torch.random.get_rng_state()
    files = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepared = prepare("dare_linear", pipe, config=tiny(seed=seed), folder=tmp_path / folder)
        files.append(load_file(prepared.folder / "merged.safetensors"))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = files
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert prepared.details["density"] == 0.7


def test_merged_file_is_a_lora_that_diffusers_loads(pipe, plain, draw, tmp_path) -> None:
    prepared = prepare("svd", pipe, folder=tmp_path)
    header = load_expert(tmp_path / "merged.safetensors").metadata
    assert [one["name"] for one in json.loads(header["mole.experts"])] == ["boot", "cat", "clock"]
    assert header["mole.kind"] == "merge svd"
    assert header["prediction_type"] == "v_prediction"
    plain.load_lora_weights(tmp_path / "merged.safetensors")
    torch.testing.assert_close(draw(pipe, mixture=prepared), draw(plain), **CLOSE)


def test_ranks_that_differ(pipe, other_rank, draw) -> None:
    pipe.load_expert(other_rank, name="other")
    with pytest.raises(ConfigError, match=r"PEFT cannot merge these experts by 'ties' .*'other': \[2\]"):
        prepare("ties", pipe)
    assert draw(pipe, mixture=prepare("svd", pipe)).isfinite().all()


def test_a_merge_has_no_single_experts(pipe, draw) -> None:
    before = draw(pipe)
    prepared = prepare("svd", pipe)
    for options in ({"active_experts": ["boot"]}, {"expert_scales": {"boot": 0.5}}):
        with pytest.raises(ConfigError, match="is one piece"):
            draw(pipe, mixture=prepared, **options)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)


def test_weights_and_density_are_checked(pipe) -> None:
    with pytest.raises(ConfigError, match="density is 0"):
        PrepareOptions(density=0)
    with pytest.raises(ConfigError, match="finite"):
        PrepareOptions(weights={"boot": float("nan")})
    with pytest.raises(UnknownExpertError, match="'dog'"):
        prepare("svd", pipe, options=PrepareOptions(weights={"dog": 1.0}))
    with pytest.raises(ConfigError, match="'clock'"):
        prepare("svd", pipe, options=PrepareOptions(weights={"boot": 1.0, "cat": 1.0}))


def test_reloads(pipe, draw, tmp_path) -> None:
    prepared = prepare("ties", pipe, folder=tmp_path)
    expected = draw(pipe, mixture=prepared)
    torch.testing.assert_close(draw(pipe, mixture=load_prepared(tmp_path)), expected, rtol=0, atol=0)

"""Gates and experts with a wrong fact are refused with the error of the diffusers pipeline."""

from pathlib import Path
from typing import Any

import comfy.model_sampling
from conftest import part
from refusals import EXPERT, FOLDER, RIGHT, error_of, refusals

from mole_diffusion.core.experts import load_expert
from tools import hooks


def apply(starter: tuple[Any, Any, Any], experts: Any, gates: Path | None) -> Any:
    model, clip, _ = starter
    return part("apply").apply_experts(model, clip, experts, gates and part("experts").GatesFile(gates))


def test_the_same_error_as_in_the_diffusers_pipeline(
    starter: tuple[Any, Any, Any], experts: Any, oracle: Path
) -> None:
    said, name = refusals(oracle)
    apply(starter, experts, oracle / FOLDER / f"{RIGHT}.safetensors")
    for case, expected in said.items():
        if case != EXPERT:
            gates = oracle / FOLDER / f"{case}.safetensors"
            assert error_of(apply, starter, experts, gates) == expected, case
    wrong = load_expert(oracle / FOLDER / f"{name}.safetensors")
    others = [expert for expert in experts.experts if expert.name != name]
    chosen = part("experts").ExpertSet((wrong, *others))
    assert error_of(apply, starter, chosen, None) == said[EXPERT]
    trusting = part("experts").ExpertSet().with_expert(wrong, check_base=False)
    for expert in others:
        trusting = trusting.with_expert(expert)
    model, _ = apply(starter, trusting, None)
    assert part("apply").applied_to(model).experts.names == trusting.names
    assert hooks(starter[0].model.diffusion_model) == 0


def test_what_is_predicted_is_what_the_model_would_be_sampled_with(starter: tuple[Any, Any, Any]) -> None:
    """Nodes such as ModelSamplingDiscrete change it for a clone."""
    model = starter[0].clone()
    known = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
    facts = part("binding").facts_of
    before = facts(model)["prediction_type"]
    kinds = {
        "epsilon": comfy.model_sampling.EPS,
        "v_prediction": comfy.model_sampling.V_PREDICTION,
    }

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, kinds[known[before]]):
        pass

    model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    assert facts(model) == {"prediction_type": known[before]}
    assert facts(starter[0]) == {"prediction_type": before}

    class Flow(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
        pass

    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    assert facts(model) == {}

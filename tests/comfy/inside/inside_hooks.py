"""Who owns the hooks: clones, clones of clones, collected clones, exceptions, other loaders."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from conftest import part

from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.export import lora_tensors
from mole_diffusion.starter import starter_experts
from tools import Operations, draw, encoded, hooks, sample

PROMPT = "a zorin boot and a kipra clock on the beach"


@pytest.fixture(autouse=True)
def _unloaded() -> Iterator[None]:
    """Every test begins and ends without loaded models."""
    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


def experts_named(*names: str) -> Any:
    found = part("experts").ExpertSet()
    for name in names:
        found = found.with_expert(load_expert(starter_experts()[name].path))
    return found


def apply(model: Any, clip: Any, *names: str) -> tuple[Any, Any]:
    applied: tuple[Any, Any] = part("apply").apply_experts(model, clip, experts_named(*names), None)
    return applied


def as_kohya(name: str) -> dict[str, torch.Tensor]:
    """One of the starter's experts as a file that the core's loader knows for any network."""
    factors = load_expert(starter_experts()[name].path).factors
    whole = {
        network: {
            matrix: replace(pair, up=pair.up * pair.scaling, alpha=float(pair.rank))
            for matrix, pair in matrices.items()
        }
        for network, matrices in factors.items()
    }
    return lora_tensors(whole, "kohya", torch.float32)


def networks(model: Any, clip: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return model.model.diffusion_model, clip.cond_stage_model


def test_clones_with_different_experts_take_turns_and_leave_the_base_as_it_was(
    starter: tuple[Any, Any, Any],
) -> None:
    model, clip, _ = starter
    base = draw(model, clip, PROMPT)
    a = apply(model, clip, "boot", "clock")
    b = apply(model, clip, "monster")
    assert hooks(networks(model, clip)[0]) == 0
    pictures = [draw(*pair, PROMPT) for pair in (a, b, a, (model, clip), b, a)]
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[0], pictures[5])
    assert torch.equal(pictures[1], pictures[4])
    assert torch.equal(pictures[3], base)
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], base)


def test_clones_of_a_clone_draw_what_it_draws(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    first = draw(mixed, mixed_clip, PROMPT)
    # Cloned while its parent is loaded: the flag that it has injected must not come along.
    copy = mixed.clone().clone()
    assert not copy.is_injected
    again = draw(copy, mixed_clip.clone(), PROMPT)
    assert torch.equal(first, again)
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), first)


def test_collecting_unused_clones_leaves_the_hooks_of_the_loaded_one(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    first = draw(mixed, mixed_clip, PROMPT)
    counts = [hooks(network) for network in networks(model, clip)]
    assert min(counts) > 0
    unused = [mixed.clone(), mixed.clone().clone(), apply(model, clip, "monster"), model.clone()]
    del unused
    gc.collect()
    assert [hooks(network) for network in networks(model, clip)] == counts
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), first)


def test_collecting_the_loaded_clone_takes_its_hooks_along(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    base = draw(model, clip, PROMPT)
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    draw(mixed, mixed_clip, PROMPT)
    assert hooks(networks(model, clip)[0]) > 0
    del mixed, mixed_clip
    gc.collect()
    assert [hooks(network) for network in networks(model, clip)] == [0, 0]
    assert torch.equal(draw(model, clip, PROMPT), base)


def test_exception_in_the_sampler_leaves_models_usable(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    base = draw(model, clip, PROMPT)
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    expected = draw(mixed, mixed_clip, PROMPT)
    broken = mixed.clone()
    calls = []

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("somebody's wrapper fails")
        return executor(*args, **kwargs)

    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", fail)
    with pytest.raises(RuntimeError, match="somebody's wrapper"):
        draw(broken, mixed_clip, PROMPT)
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), expected)
    assert torch.equal(draw(model, clip, PROMPT), base)

    inner = mixed.model.diffusion_model.middle_block[1]
    handle = inner.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside the network")))
    with pytest.raises(RuntimeError, match="inside the network"):
        draw(mixed, mixed_clip, PROMPT)
    handle.remove()
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), expected)
    assert torch.equal(draw(model, clip, PROMPT), base)


def test_unloading_between_runs_changes_nothing(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    first = draw(mixed, mixed_clip, PROMPT)
    comfy.model_management.unload_all_models()
    assert [hooks(network) for network in networks(model, clip)] == [0, 0]
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), first)


@pytest.mark.parametrize("order", ["before", "after"])
def test_core_lora_loader_beside_the_experts(starter: tuple[Any, Any, Any], order: str) -> None:
    """A LoRA of the core adds to the weights, experts add to what they give: the order does not matter."""
    model, clip, _ = starter
    lora = as_kohya("monster")
    base = draw(model, clip, PROMPT)

    def load(pair: tuple[Any, Any]) -> tuple[Any, Any]:
        loaded: tuple[Any, Any] = comfy.sd.load_lora_for_models(*pair, lora, 0.7, 0.7)
        return loaded

    alone = draw(*apply(model, clip, "boot"), PROMPT)
    pair = apply(*load((model, clip)), "boot") if order == "before" else load(apply(model, clip, "boot"))
    both = draw(*pair, PROMPT)
    # Two LoRAs of the core are the same sum.
    merged = comfy.sd.load_lora_for_models(*load((model, clip)), as_kohya("boot"), 1.0, 1.0)
    assert (both - draw(*merged, PROMPT)).abs().max() < 1e-3
    assert (both - alone).abs().max() > 0.05
    assert torch.equal(draw(model, clip, PROMPT), base)


def test_a_dora_is_computed_from_weights_without_patches(starter: tuple[Any, Any, Any]) -> None:
    """Also while a LoRA of the core is in the weights, and when it comes after the experts."""
    model, clip, _ = starter
    state = as_kohya("clock")
    for key in [key for key in state if key.startswith("lora_unet_") and key.endswith("lora_up.weight")]:
        up = state[key]
        state[key.replace("lora_up.weight", "dora_scale")] = torch.full((len(up), 1), 1.5)
    dora = part("experts").ExpertSet((Expert.from_state_dict(state, name="clock"),))
    clean = draw(*part("apply").apply_experts(model, clip, dora, None), PROMPT)
    lora = comfy.sd.load_lora_for_models(model, clip, as_kohya("monster"), 0.7, 0.7)
    patched = draw(*lora, PROMPT)
    assert model.backup
    mixed = part("apply").apply_experts(model, clip, dora, None)
    assert torch.equal(draw(*mixed, PROMPT), clean)
    both = draw(*part("apply").apply_experts(*lora, dora, None), PROMPT)
    assert torch.equal(
        draw(*comfy.sd.load_lora_for_models(*mixed, as_kohya("monster"), 0.7, 0.7), PROMPT), both
    )
    assert not torch.equal(both, clean)
    assert not torch.equal(both, patched)


def test_modules_that_were_replaced_since_are_found(starter: tuple[Any, Any, Any]) -> None:
    """Some nodes replace modules by object patches: hooks go to what is there when the model is loaded."""
    model, clip, _ = starter
    mixed, mixed_clip = apply(model, clip, "boot", "clock")
    first = draw(mixed, mixed_clip, PROMPT)
    name = "middle_block.1.transformer_blocks.0.attn1.to_q"
    old = mixed.model.diffusion_model.get_submodule(name)
    with torch.inference_mode(False):
        new = type(old)(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
    patched = mixed.clone()
    patched.add_object_patch(f"diffusion_model.{name}", new)
    assert (draw(patched, mixed_clip, PROMPT) - first).abs().max() < 1e-5
    assert torch.equal(draw(mixed, mixed_clip, PROMPT), first)


def test_half_precision_casts(starter: tuple[Any, Any, Any]) -> None:
    """Weights in one type and arithmetic in another, as ComfyUI does on many cards."""
    module = part("starter")
    model, clip, _ = starter
    expected = draw(*apply(model, clip, "boot", "clock"), PROMPT)
    cast, _, _ = module.load_starter()
    cast.model.diffusion_model.to(torch.bfloat16)
    cast.model.manual_cast_dtype = torch.float32
    cast.set_model_compute_dtype(torch.float32)
    mixed, mixed_clip = apply(cast, clip, "boot", "clock")
    found = draw(mixed, mixed_clip, PROMPT)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert not torch.equal(found, draw(cast, clip, PROMPT))


def test_errors_leave_the_models_alone_and_say_what_is_wrong(
    starter: tuple[Any, Any, Any], tmp_path: Any
) -> None:
    model, clip, _ = starter
    from safetensors.torch import save_file

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4)}
    save_file({f"{name}.{k}": torch.ones(*v) for k, v in shapes.items()}, tmp_path / "sd15.safetensors")
    wrong = part("experts").ExpertSet((load_expert(tmp_path / "sd15.safetensors"),))
    with pytest.raises(Exception, match="Expert 'sd15' does not fit"):
        part("apply").apply_experts(model, clip, wrong, None)
    with pytest.raises(Exception, match="connect at least one Load Expert"):
        part("apply").apply_experts(model, clip, part("experts").ExpertSet(), None)
    once = apply(model, clip, "boot", "clock")
    for pair, what in (((once[0], clip), "MODEL"), ((model, once[1]), "CLIP")):
        with pytest.raises(
            Exception, match=f"This {what} has the experts boot, clock already, from a MoLE Apply"
        ):
            apply(*pair, "monster")
    assert hooks(model.model.diffusion_model) == 0
    assert not model.injections


def test_experts_cost_nothing_per_run_and_least_without_gates(starter: tuple[Any, Any, Any]) -> None:
    """What experts need is made ready once, although ComfyUI lets a model go before every run."""
    model, clip, _ = starter
    chosen = experts_named("boot", "monster", "clock")
    gates = part("experts").GatesFile(part("places").gates_file(part("places").STARTER_GATES))
    counts: dict[str, tuple[int, int]] = {}
    for name, found in (("bare", None), ("gates", gates), ("alike", None)):
        pair = (model, clip) if name == "bare" else part("apply").apply_experts(model, clip, chosen, found)
        texts = encoded(pair[1], PROMPT)
        sample(pair[0], texts, steps=1)
        runs = []
        for steps in (2, 4):
            with Operations() as operations:
                sample(pair[0], texts, steps=steps)
            runs.append(operations.count)
        step = (runs[1] - runs[0]) // 2
        counts[name] = step, runs[0] - 2 * step
    steps = {name: step for name, (step, _) in counts.items()}
    assert steps["bare"] < steps["alike"] < steps["gates"] < 1.7 * steps["bare"]
    for name, (_, fixed) in counts.items():
        assert fixed <= counts["bare"][1] + 10, name


def test_experts_that_lose_their_turn_keep_nothing_on_the_device(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    (first, texts), (second, _) = apply(model, clip, "boot", "clock"), apply(model, clip, "monster")

    def ready(pair: Any) -> int:
        mixture = part("apply").applied_to(pair).ensemble.mixtures["unet"]
        return sum(len(slot.plans.places) for bundle in mixture._bundles for slot in bundle.slots)

    draw(first, texts, PROMPT)
    assert ready(first) > 0
    draw(first, texts, PROMPT)
    draw(second, texts, PROMPT)
    assert ready(first) == 0 < ready(second)
    comfy.model_management.unload_all_models()
    assert ready(second) == 0

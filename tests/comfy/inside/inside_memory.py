"""Experts in ComfyUI's memory management: loaded with the model, counted once, freed by it."""

import gc
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from conftest import part
from inside_hooks import PROMPT, apply, as_kohya, experts_named

from mole_diffusion import MoLEConfig
from mole_diffusion.core.errors import TrainingError
from tools import draw, encoded, sample

management = comfy.model_management


@pytest.fixture(autouse=True)
def _unloaded() -> Iterator[None]:
    management.unload_all_models()
    yield
    management.unload_all_models()
    gc.collect()


def counted(patcher: Any) -> list[Any]:
    """What ComfyUI has loaded of our experts for a MODEL or CLIP."""
    own = patcher.model_patches_models()
    return [one for one in management.current_loaded_models if one.model in own]


def copies(pair: tuple[Any, Any], name: str = "unet") -> Any:
    return part("apply").applied_to(pair[0]).ensemble.mixtures[name].copies


def test_experts_are_loaded_with_the_model_and_counted(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    pair = apply(model, clip, "boot", "clock")
    assert not copies(pair).made
    before = management.loaded_models()
    management.load_models_gpu([pair[0]])
    (experts,) = counted(pair[0])
    assert len(management.loaded_models()) == len(before) + 2
    # Every expert changes matrices of this UNet: their bytes, not a guess.
    factors = [e.factors["unet"] for e in part("apply").applied_to(pair[0]).experts.experts]
    bytes_of = sum(
        4 * (one.down.numel() + one.up.numel()) for matrices in factors for one in matrices.values()
    )
    assert bytes_of <= experts.model_memory() <= 2 * bytes_of
    assert experts.model_loaded_memory() == experts.model_memory()
    assert experts.model_offloaded_memory() == 0
    # Ready before the first step, in the type that it computes in.
    assert copies(pair).made
    slots = [s for b in part("apply").applied_to(pair[0]).ensemble.mixtures["unet"]._bundles for s in b.slots]
    places = {place for slot in slots for place in slot.plans.places}
    draw(*pair, PROMPT)
    assert (
        {place for slot in slots for place in slot.plans.places}
        == places
        == {(torch.device("cpu"), torch.float32)}
    )
    # The model's own size is what it was.
    assert pair[0].model_size() == model.model_size()


def test_freed_memory_takes_experts_away(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    pair = apply(model, clip, "boot", "clock")
    first = draw(*pair, PROMPT)
    assert copies(pair).made
    assert copies(pair, "text_encoder").made
    (experts,) = counted(pair[0])
    others = [one for one in management.current_loaded_models if one is not experts]
    management.free_memory(1e30, torch.device("cpu"), keep_loaded=others)
    assert counted(pair[0]) == []
    assert not copies(pair).made
    assert copies(pair, "text_encoder").made
    # They come back with the next run.
    texts = encoded(pair[1], PROMPT)
    assert torch.equal(sample(pair[0], texts), first)
    assert counted(pair[0])[0].model_loaded_memory() > 0
    management.unload_all_models()
    assert not copies(pair).made
    assert not copies(pair, "text_encoder").made


def test_clones_share_experts_and_count_them_once(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    pair = apply(model, clip, "boot", "clock")
    copy = pair[0].clone().clone()
    assert copy.model_patches_models() == pair[0].model_patches_models()
    assert len(copy.model_patches_models()) == 1
    management.load_models_gpu([pair[0]])
    management.load_models_gpu([copy])
    assert len(counted(copy)) == 1
    # A core LoRA makes a clone too.
    patched, _ = comfy.sd.load_lora_for_models(*pair, as_kohya("monster"), 0.7, 0.7)
    management.load_models_gpu([patched])
    assert len(counted(pair[0])) == 1
    assert model.model_patches_models() == []


def test_experts_that_lose_their_turn_hold_nothing(starter: tuple[Any, Any, Any]) -> None:
    model, clip, _ = starter
    first, second = apply(model, clip, "boot", "clock"), apply(model, clip, "monster")
    draw(*first, PROMPT)
    draw(*second, PROMPT)
    sizes = [[one.model_loaded_memory() for one in counted(pair[0])] for pair in (first, second)]
    assert sizes[0] in ([], [0])
    assert sizes[1][0] > 0
    del first, second
    gc.collect()
    draw(model, clip, PROMPT)
    names = [type(one.model).__name__ for one in management.current_loaded_models if one.model is not None]
    assert "ExpertsPatcher" not in names


def test_training_lets_the_originals_go(starter: tuple[Any, Any, Any]) -> None:
    """Whose copies are trained on: two of a large model are one too many."""
    model, clip, vae = starter
    base = draw(model, clip, PROMPT)
    experts = experts_named("boot")
    with torch.inference_mode(False):
        copy = part("native").TrainingCopy(model, clip, vae, experts, MoLEConfig())
    loaded = [one.model for one in management.current_loaded_models]
    assert not any(model.is_clone(one) or clip.patcher.is_clone(one) for one in loaded)
    assert copy.denoiser.network is not model.model.diffusion_model
    assert torch.equal(draw(model, clip, PROMPT), base)


def test_dynamic_vram_makes_room_by_itself_and_is_not_trained_on(
    starter: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the core does with it needs a card; that its own sign of it is heeded does not."""
    model, clip, vae = starter
    dynamic = model.clone()
    monkeypatch.setattr(type(dynamic), "is_dynamic", lambda self: self.model is model.model, raising=False)
    pair = apply(dynamic, clip, "boot", "clock")
    assert pair[0].model_patches_models() == []
    assert len(pair[1].patcher.model_patches_models()) == 1
    with pytest.raises(TrainingError, match="--disable-dynamic-vram"):
        part("native").TrainingCopy(dynamic, clip, vae, experts_named("boot"), MoLEConfig())

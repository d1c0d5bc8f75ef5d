"""Shared gates: what refines `mixture="auto"` for experts that nobody trained it on."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from pipeline_helpers import CLOSE, train_a_little
from safetensors.torch import load_file, save_file
from tiny.shared import randomised

from mole_diffusion import FluxMoLEPipeline, StableDiffusionMoLEPipeline
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import GateMismatchError
from mole_diffusion.core.shared_gates import SharedGates, is_shared_gates
from mole_diffusion.pictures.auto import AutoMixture

LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


def trained(pipe) -> SharedGates:
    """Shared gates for a pipeline that do something."""
    return randomised(SharedGates.fresh(pipe.mixtures))


@pytest.fixture
def file(loaded, tmp_path):
    """A file of shared gates for the pipeline's base."""
    path = tmp_path / "shared.safetensors"
    trained(loaded).save(path, {"trained_on": '["boot"]'})
    return path


def test_untrained_they_change_nothing(loaded, draw) -> None:
    fresh = SharedGates.fresh(loaded.mixtures)
    expected = draw(loaded, mixture="auto")
    assert torch.equal(draw(loaded, mixture=AutoMixture(shared=fresh)), expected)


def test_loaded_they_refine_auto_and_nothing_else(loaded, file, draw) -> None:
    loaded.unload_expert("clock")  # which no prompt can name
    before = {word: draw(loaded, mixture=word) for word in ("auto", "gates", "nla")}
    assert loaded.load_shared_gates(file)["trained_on"] == '["boot"]'
    refined = draw(loaded, mixture="auto")
    assert (refined - before["auto"]).abs().max() > 1e-3
    assert torch.equal(draw(loaded), refined), "what a call without a mixture draws with"
    for word in ("gates", "nla"):
        assert torch.equal(draw(loaded, mixture=word), before[word])
    loaded.unload_shared_gates()
    assert torch.equal(draw(loaded, mixture="auto"), before["auto"])


def test_beside_an_expert_of_the_whole_picture_they_say_that_they_rest(loaded, file, draw, caplog) -> None:
    before = draw(loaded)
    loaded.load_shared_gates(file)
    for _ in range(2):
        assert torch.equal(draw(loaded), before)
    told = [record.getMessage() for record in caplog.records if "refine nothing" in record.getMessage()]
    assert len(told) == 1
    assert "'clock' counts in the whole picture" in told[0]
    draw(loaded, "a cat on the beach")
    loaded.unload_expert("clock")
    caplog.clear()
    assert not torch.equal(draw(loaded), before)
    assert not caplog.records


def test_they_serve_whatever_experts_come(pipe, lora_files, file, draw) -> None:
    pipe.eject()
    pipe.load_shared_gates(file)
    for name in ("clock", "cat", "boot"):
        pipe.load_expert(lora_files[name], name=name)
    called = AutoMixture(phrases={name: name for name in pipe.experts})
    three = draw(pipe, "a boot and a cat", mixture=called)
    pipe.unload_expert("clock")
    torch.testing.assert_close(draw(pipe, "a boot and a cat"), three, **CLOSE)
    pipe.eject()
    for name in ("boot", "cat"):
        pipe.load_expert(lora_files[name], name=name)
    torch.testing.assert_close(draw(pipe, "a boot and a cat"), three, **CLOSE)


def test_the_only_expert_that_a_prompt_names_is_that_lora_alone(loaded, file, draw) -> None:
    expected = draw(loaded, "a cat on the beach", mixture="auto")
    loaded.load_shared_gates(file)
    assert torch.equal(draw(loaded, "a cat on the beach", mixture="auto"), expected)


def test_beside_a_style_nothing_is_refined(loaded, file, draw) -> None:
    """Subjects among themselves are all that they have seen."""
    words = {"boot": "boot", "cat": "cat", "clock": "red"}
    for styles, same in (((), False), (("clock",), True)):
        styled = AutoMixture(phrases=words, styles=styles)
        loaded.unload_shared_gates()
        plain = draw(loaded, "a red boot and a cat", mixture=styled)
        loaded.load_shared_gates(file)
        assert torch.equal(draw(loaded, "a red boot and a cat", mixture=styled), plain) is same


def test_a_batch_is_its_singles(loaded, file, draw) -> None:
    loaded.load_shared_gates(file)
    prompts = ["a boot and a cat", "a cat on the boot"]
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    called = AutoMixture(phrases={name: name for name in loaded.experts})
    both = draw(loaded, prompts, latents=latents, mixture=called)
    for index, prompt in enumerate(prompts):
        single = draw(loaded, prompt, latents=latents[index : index + 1], mixture=called)
        torch.testing.assert_close(both[index : index + 1], single, **CLOSE)


def test_masks_scales_and_regions_hold(loaded, file, draw) -> None:
    loaded.load_shared_gates(file)
    none = draw(loaded, expert_scales={"boot": 0.0})
    torch.testing.assert_close(none, draw(loaded, active_experts=["cat", "clock"]), **CLOSE)
    draw(loaded, active_experts=["boot", "cat"], region_masks={"boot": LEFT, "cat": 1 - LEFT})
    weights = loaded.gate_weights().where(network="unet", branch="prompt").mean("group", "expert")
    assert all(weight == 0.0 for (_, expert), weight in weights.items() if expert == "clock")


def test_all_experts_are_treated_alike() -> None:
    base = {"class": "X", "matrices": "y"}
    shared = randomised(SharedGates({"unet": {"gates": ["one", "two"], "base": base}}))
    weights = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(2))
    weights[..., 2] = 0.0
    found = shared.refine("unet", "one", weights, 0.5)
    order = [2, 0, 1]
    torch.testing.assert_close(shared.refine("unet", "one", weights[..., order], 0.5), found[..., order])
    torch.testing.assert_close(shared.refine("unet", "one", weights[..., :2], 0.5), found[..., :2])
    assert torch.equal(found[..., 2], weights[..., 2]), "who is not named stays so"
    assert not torch.allclose(found, shared.refine("unet", "two", weights, 0.5)), "gate by gate"
    assert not torch.allclose(found, shared.refine("unet", "one", weights, 0.9)), "time by time"
    assert torch.equal(shared.refine("unet", "unknown", weights, 0.5), weights)
    assert (found[weights > 0] / weights[weights > 0]).log().abs().max() <= 1.5 + 1e-4


def test_files_keep_every_bit(loaded, file, tmp_path) -> None:
    assert is_shared_gates(file)
    again = tmp_path / "again.safetensors"
    SharedGates.load(file).save(again)
    read = SharedGates.load(again)
    assert read.metadata == SharedGates.load(file).metadata == {"trained_on": '["boot"]'}
    assert read.parts == SharedGates.fresh(loaded.mixtures).parts
    expected = trained(loaded).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in read.state_dict().items())


def altered(file, tmp_path, tensors=None, **header):
    """A copy of a file with other tensors or entries of its header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as read:
        known = read.metadata()
    path = tmp_path / "altered.safetensors"
    save_file(load_file(file) if tensors is None else tensors, path, {**known, **header})
    return path


def test_what_is_no_such_file_is_refused(loaded, file, tmp_path, draw) -> None:
    loaded.load_shared_gates(file)
    expected = draw(loaded, mixture="auto")
    gates = tmp_path / "gates.safetensors"
    train_a_little(loaded)
    loaded.save_gates(gates)
    tensors = load_file(file)
    key = next(iter(tensors))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-40])
    cases = {
        tmp_path / "nowhere.safetensors": "cannot be read",
        cut: "cannot be read",
        gates: "is not a file of shared gates",
        altered(file, tmp_path, format_version="9"): "format_version '9'",
    }
    for path, words in cases.items():
        with pytest.raises(GateMismatchError, match=words):
            loaded.load_shared_gates(path)
    changes = [
        ({name: value for name, value in tensors.items() if name != key}, {}, "missing in the file"),
        ({**tensors, key: tensors[key][:1]}, {}, "expected"),
        ({**tensors, key: tensors[key] * float("nan")}, {}, "no finite numbers"),
        (tensors, {"parts": "[]"}, "no gates and bases"),
        (tensors, {"parts": "{"}, "cannot be read"),
    ]
    for others, header, words in changes:
        with pytest.raises(GateMismatchError, match=words):
            loaded.load_shared_gates(altered(file, tmp_path, others, **header))
    assert torch.equal(draw(loaded, mixture="auto"), expected), "all is as before"


def test_another_base_is_refused_and_strange_gates_are_told(
    loaded, xl_loaded, file, draw, tmp_path, caplog
) -> None:
    with pytest.raises(GateMismatchError, match="other matrices"):
        xl_loaded.load_shared_gates(file)
    assert xl_loaded.shared_gates is None
    read = SharedGates.load(file)
    fewer = {part: {**own, "gates": own["gates"][1:]} for part, own in read.parts.items()}
    some = tmp_path / "some.safetensors"
    SharedGates(fewer).save(some)
    with caplog.at_level(logging.WARNING):
        loaded.load_shared_gates(some)
        draw(loaded)
    assert caplog.text.count("trained without 2 gates") == 1
    none = tmp_path / "none.safetensors"
    SharedGates({part: {**own, "gates": ["other"]} for part, own in read.parts.items()}).save(none)
    with pytest.raises(GateMismatchError, match="was not trained"):
        loaded.load_shared_gates(none)


def test_an_xl_pipeline_has_them_too(xl_loaded, draw) -> None:
    expected = draw(xl_loaded, mixture="auto")
    shared = AutoMixture(shared=trained(xl_loaded))
    assert (draw(xl_loaded, mixture=shared) - expected).abs().max() > 1e-3


def test_metadata_may_not_use_the_formats_own_names(loaded, tmp_path) -> None:
    with pytest.raises(ValueError, match="parts"):
        SharedGates.fresh(loaded.mixtures).save(tmp_path / "x.safetensors", {"parts": json.dumps({})})
    assert not os.listdir(tmp_path)


def test_the_form_of_gates_that_nobody_trained_does_not_matter(loaded, file, draw) -> None:
    loaded.load_shared_gates(file)
    expected = draw(loaded, mixture="auto")
    loaded.configure(MoLEConfig.uniform())
    torch.testing.assert_close(draw(loaded, mixture="auto"), expected, **CLOSE)


@pytest.mark.parametrize("maker", [StableDiffusionMoLEPipeline, FluxMoLEPipeline])
def test_text_and_image_in_one_sequence_have_them_too(maker) -> None:
    pipe = maker.from_starter(experts=["cat", "can"])
    pipe.unload_shared_gates()
    fresh, other = SharedGates.fresh(pipe.mixtures), trained(pipe)

    def drawn(shared=None):
        noise = torch.Generator().manual_seed(0)
        prompt, called = "a fenna cat and a gidro can", AutoMixture(shared=shared)
        found = pipe(prompt, mixture=called, num_inference_steps=2, generator=noise, output_type="pt").images
        return found

    expected = drawn()
    assert torch.equal(drawn(fresh), expected)
    assert (drawn(other) - expected).abs().max() > 1e-2


def test_the_starter_comes_with_some() -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=["wolf", "boot"])
    assert pipe.shared_gates is not None
    assert "wolf" not in json.loads(pipe.shared_gates.metadata["trained_on"])
    assert pipe.usual_mixture == "auto"
    assert StableDiffusionMoLEPipeline.from_starter().usual_mixture == "gates"

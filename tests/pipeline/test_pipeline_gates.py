"""Gates to and from files through the pipeline, and the record of the last call."""

import pytest
import torch
from PIL import Image
from pipeline_helpers import CLOSE, train_a_little

from mole_diffusion import MoLEConfig
from mole_diffusion.core.errors import GateMismatchError
from mole_diffusion.pictures.training import Concept, TrainingConfig


@pytest.mark.parametrize(
    "config",
    [
        MoLEConfig(),
        MoLEConfig.uniform(),
        MoLEConfig(granularity="layer", gate_input="hidden"),
        MoLEConfig.paper(),
    ],
    ids=["default", "uniform", "layer", "paper"],
)
def test_saved_and_loaded_gates_draw_the_same(pipe, components, draw, lora_files, tmp_path, config) -> None:
    pipe.configure(config)
    for name in ("boot", "cat"):
        pipe.load_expert(lora_files[name])
    train_a_little(pipe)
    expected = draw(pipe)
    pipe.save_gates(tmp_path / "gates.safetensors", {"prompts": "a boot and a cat"})
    pipe.eject()
    pipe.configure(MoLEConfig())
    for name in ("boot", "cat"):
        pipe.load_expert(lora_files[name])
    assert (draw(pipe) - expected).abs().max() > 1e-3
    metadata = pipe.load_gates(tmp_path / "gates.safetensors")
    assert metadata["prompts"] == "a boot and a cat"
    assert pipe.mole_config == config
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-6)


def test_gates_of_other_experts_are_refused_with_differences(loaded, draw, lora_files, tmp_path) -> None:
    path = tmp_path / "gates.safetensors"
    loaded.save_gates(path)
    loaded.unload_expert("cat")
    loaded.configure(MoLEConfig(granularity="layer"))
    train_a_little(loaded)
    before = draw(loaded)
    with pytest.raises(GateMismatchError) as caught:
        loaded.load_gates(path)
    assert any("cat" in difference for difference in caught.value.differences)
    assert loaded.mole_config.granularity == "layer"
    torch.testing.assert_close(draw(loaded), before, rtol=0, atol=0)


def test_gates_of_another_file_under_the_same_name_are_refused(pipe, lora_files, tmp_path) -> None:
    pipe.load_expert(lora_files["boot"], name="x")
    pipe.save_gates(tmp_path / "gates.safetensors")
    pipe.eject()
    pipe.load_expert(lora_files["cat"], name="x")
    with pytest.raises(GateMismatchError, match="x"):
        pipe.load_gates(tmp_path / "gates.safetensors")


def test_no_record_before_the_first_call(loaded) -> None:
    assert len(loaded.gate_weights()) == 0


def test_rows_say_network_group_step_branch_entry_expert(loaded, draw) -> None:
    draw(loaded, ["a boot", "a cat"], num_inference_steps=3, mixture="gates")
    weights = loaded.gate_weights()
    unet = weights.where(network="unet")
    names = [group.name for group in loaded.mixtures["unet"].groups]
    groups = [*names, *(f"{name}.context" for name in names)]
    assert {row.group for row in unet} == set(groups)
    assert [{row.step for row in unet}, {row.entry for row in unet}] == [{0, 1, 2}, {0, 1}]
    assert {row.branch for row in unet} == {"prompt", "negative"}
    assert len(unet) == len(groups) * 3 * 2 * 2 * 3
    text = weights.where(network="text_encoder")
    assert {row.step for row in text} == {None}
    assert len(text) == len(loaded.mixtures["text_encoder"].groups) * 2 * 2 * 3
    assert weights[0].network == "text_encoder"
    assert all(abs(row.weight - 1 / 3) < 1e-5 for row in weights)


def test_rows_of_trained_gates_differ_and_sum_to_one(loaded, draw) -> None:
    train_a_little(loaded)
    draw(loaded)
    array, labels = loaded.gate_weights().to_array("unet")
    assert labels["expert"] == ["boot", "cat", "clock"]
    assert labels["step"] == [0, 1, 2]
    assert array.shape == tuple(len(labels[axis]) for axis in ("group", "step", "entry", "expert"))
    torch.testing.assert_close(array.sum(-1), torch.ones(array.shape[:-1]), atol=1e-5, rtol=0)
    assert (array[:, 0] - array[:, 2]).abs().max() > 1e-4, "gates see the step through their input"
    negative, _ = loaded.gate_weights().to_array("unet", "negative")
    assert (array - negative).abs().max() > 1e-4
    row = loaded.gate_weights().to_dicts()[0]
    assert list(row) == ["network", "group", "step", "branch", "entry", "expert", "weight"]


def test_rows_of_masked_experts_are_zero(loaded, draw) -> None:
    draw(loaded, active_experts=["cat"])
    for row in loaded.gate_weights():
        assert row.weight == pytest.approx(1.0 if row.expert == "cat" else 0.0)


def test_rows_without_guidance_and_with_own_embeddings(loaded, draw) -> None:
    draw(loaded, guidance_scale=1.0)
    assert {row.branch for row in loaded.gate_weights()} == {"prompt"}
    prompt, negative = loaded.encode_prompt("a boot", "cpu", 1, True)
    draw(loaded, prompt_embeds=prompt)
    assert {row.branch for row in loaded.gate_weights().where(network="text_encoder")} == {"negative"}
    draw(loaded, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert {row.network for row in loaded.gate_weights()} == {"unet"}


def test_last_call_only_and_nothing_for_the_base(loaded, draw) -> None:
    draw(loaded, num_inference_steps=3)
    draw(loaded, num_inference_steps=2)
    assert {row.step for row in loaded.gate_weights().where(network="unet")} == {0, 1}
    draw(loaded, mixture="none")
    assert len(loaded.gate_weights()) == 0


def test_order_of_loading_does_not_matter_for_a_gates_file(pipe, draw, lora_files, tmp_path) -> None:
    for name in ("boot", "cat", "clock"):
        pipe.load_expert(lora_files[name])
    train_a_little(pipe)
    expected = draw(pipe)
    pipe.save_gates(tmp_path / "gates.safetensors")
    pipe.eject()
    for name in ("clock", "boot", "cat"):
        pipe.load_expert(lora_files[name])
    pipe.load_gates(tmp_path / "gates.safetensors")
    torch.testing.assert_close(draw(pipe), expected, **CLOSE)


def test_gates_of_another_prediction_type_are_refused_unless_not_strict(loaded, tmp_path) -> None:
    loaded.save_gates(tmp_path / "gates.safetensors")
    config = {**loaded.scheduler.config, "prediction_type": "epsilon"}
    loaded.scheduler = type(loaded.scheduler).from_config(config)
    with pytest.raises(GateMismatchError) as caught:
        loaded.load_gates(tmp_path / "gates.safetensors")
    assert caught.value.differences == [
        "base model: prediction_type is 'v_prediction' in the file, 'epsilon' here"
    ]
    loaded.load_gates(tmp_path / "gates.safetensors", strict=False)


def test_training_through_the_pipeline_moves_the_gates(loaded, draw, tmp_path) -> None:
    before = draw(loaded)
    settings = TrainingConfig(iterations=2, objective="collage", progress=False)
    references = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    concepts = {
        name: Concept(name, f"a {name}", f"a {name}", references) for name in ("boot", "cat", "clock")
    }
    events = []
    result = loaded.train_gates(
        "a boot and a cat and a clock",
        concepts,
        settings,
        callback=lambda event: events.append(event),
        checkpoint_dir=tmp_path,
    )
    assert len(result.history) == len(events) == 2
    assert result.gates is not None
    trained = draw(loaded)
    assert (trained - before).abs().max() > 1e-5
    loaded.configure(loaded.mole_config)
    loaded.load_gates(result.gates)
    torch.testing.assert_close(draw(loaded), trained, rtol=0, atol=1e-6)

"""Loading and unloading experts, and what goes wrong."""

import copy
import logging
import threading

import pytest
import torch
from pipeline_helpers import CLOSE, build, train_a_little
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mole_diffusion import MoLEConfig
from mole_diffusion.core.errors import (
    AllExpertsMaskedError,
    ConfigError,
    ExpertLoadError,
    InUseError,
    MoLEError,
    NoExpertsError,
    UnknownExpertError,
)
from mole_diffusion.pictures.pipelines import StableDiffusionMoLEPipeline


def test_experts_are_in_loading_order_and_read_only(loaded) -> None:
    assert list(loaded.experts) == ["boot", "cat", "clock"]
    assert set(loaded.mixtures) == {"unet", "text_encoder"}
    assert loaded.experts["cat"].name == "cat"
    with pytest.raises(TypeError):
        loaded.experts["x"] = loaded.experts["cat"]


def test_expert_without_text_encoder_part_leaves_the_text_encoder_alone(pipe, lora_files) -> None:
    expert = pipe.load_expert(lora_files["clock"])
    assert expert.name == "clock"
    assert set(pipe.mixtures) == {"unet"}


def test_unload_leaves_the_others(loaded, pipe, draw, lora_files) -> None:
    loaded.unload_expert("cat")
    assert list(loaded.experts) == ["boot", "clock"]
    with_two = draw(loaded, mixture="la")
    pipe.eject()
    pipe.load_expert(lora_files["boot"])
    pipe.load_expert(lora_files["clock"])
    torch.testing.assert_close(draw(pipe, mixture="la"), with_two, rtol=0, atol=0)


def test_unload_of_the_last_is_the_base(pipe, plain, draw, lora_files) -> None:
    pipe.load_expert(lora_files["boot"])
    pipe.unload_expert("boot")
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=0, atol=0)


def test_new_expert_makes_gates_fresh_and_says_so(pipe, lora_files, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="mole_diffusion"):
        pipe.load_expert(lora_files["boot"])
        pipe.load_expert(lora_files["cat"])
        assert not caplog.records
        train_a_little(pipe)
        pipe.load_expert(lora_files["clock"])
    assert "gates trained for" in caplog.text
    assert not any(group.gate.projection.any() for group in pipe.mixtures["unet"].groups)


def test_configure_rebuilds_with_the_same_experts(loaded) -> None:
    blocks = len(loaded.mixtures["unet"].groups)
    loaded.configure(MoLEConfig(granularity="matrix"))
    assert len(loaded.mixtures["unet"].groups) > blocks
    assert list(loaded.experts) == ["boot", "cat", "clock"]
    assert loaded.mole_config.granularity == "matrix"


def test_unknown_expert_lists_known_and_suggests(loaded, draw) -> None:
    for call in (
        lambda: draw(loaded, active_experts=["clok"]),
        lambda: draw(loaded, expert_scales={"clok": 1.0}),
        lambda: draw(loaded, mixture={"clok": 1.0}),
        lambda: draw(loaded, region_masks={"clok": torch.ones(32, 32)}),
        lambda: draw(loaded, active_experts=["clok"], mixture="none"),
        lambda: loaded.unload_expert("clok"),
    ):
        with pytest.raises(UnknownExpertError) as caught:
            call()
        message = str(caught.value)
        assert "'clok'" in message
        assert "did you mean 'clock'" in message.lower()
        assert all(name in message for name in ("boot", "cat", "clock"))


def test_no_experts_loaded(pipe, draw, tmp_path) -> None:
    for call in (
        lambda: draw(pipe, active_experts=["boot"]),
        lambda: draw(pipe, expert_scales={"boot": 1.0}),
        lambda: draw(pipe, mixture="la"),
        lambda: pipe.save_gates(tmp_path / "gates.safetensors"),
        lambda: pipe.load_gates(tmp_path / "gates.safetensors"),
        lambda: pipe.train_gates("a boot"),
    ):
        with pytest.raises(NoExpertsError, match="no experts are loaded"):
            call()


def test_all_experts_masked(loaded, draw) -> None:
    for mixture in ("gates", "la", "nla"):
        with pytest.raises(AllExpertsMaskedError):
            draw(loaded, active_experts=[], mixture=mixture)


def test_senseless_mixture(loaded, draw) -> None:
    with pytest.raises(
        ConfigError, match=r"mixture is 'mean', expected one of \['gates', 'la', 'nla', 'none'"
    ):
        draw(loaded, mixture="mean")
    with pytest.raises(ConfigError, match="expert 'cat' the weight nan, expected a finite number"):
        draw(loaded, mixture={"cat": float("nan")})
    with pytest.raises(ConfigError, match=r"no weight for the active experts \['boot'\]"):
        draw(loaded, mixture={"cat": 1.0}, active_experts=["boot", "cat"])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e308, -1e5, "much"])
def test_senseless_scales(loaded, draw, lora_files, scale) -> None:
    """Refused before anything is drawn; such numbers end as black pictures."""
    before = draw(loaded)
    with pytest.raises(ConfigError, match="of expert 'cat' is not allowed; choose a number from -10000 to"):
        draw(loaded, expert_scales={"cat": scale})
    with pytest.raises(ConfigError, match=r"scale=.* of expert 'dog' is not allowed"):
        loaded.load_expert(lora_files["cat"], name="dog", scale=scale)
    if scale != "much":
        with pytest.raises(ConfigError, match="expert 'cat'"):
            draw(loaded, mixture={"cat": scale})
    assert torch.equal(before, draw(loaded))


def test_two_threads_get_their_own_pictures_or_are_told(loaded, draw) -> None:
    alone = {name: draw(loaded, active_experts=[name]) for name in ("boot", "cat")}
    begun, go = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        assert go.wait(60)
        return _[-1]

    found = {}

    def first() -> None:
        found["boot"] = draw(loaded, active_experts=["boot"], callback_on_step_end=wait)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert begun.wait(60)
        for call in (
            lambda: draw(loaded, active_experts=["cat"]),
            lambda: draw(loaded, mixture="switch"),
            lambda: draw(loaded),
            lambda: loaded.unload_expert("cat"),
            lambda: loaded.configure(MoLEConfig(granularity="block")),
            lambda: loaded.detach_experts(),
        ):
            with pytest.raises(InUseError, match="in use by another thread"):
                call()
    finally:
        go.set()
        thread.join()
    assert torch.equal(found["boot"], alone["boot"])
    assert torch.equal(draw(loaded, active_experts=["cat"]), alone["cat"])
    assert copy.deepcopy(loaded.ensemble._turn) is not loaded.ensemble._turn


def test_an_error_leaves_the_pipeline_usable(loaded, draw) -> None:
    before = draw(loaded)
    hooks = len(loaded.unet._forward_pre_hooks)
    with pytest.raises(MoLEError):
        draw(loaded, active_experts=["dog"], mixture="none")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(loaded, mixture="la", callback_on_step_end=stop)
    torch.testing.assert_close(draw(loaded), before, rtol=0, atol=0)
    assert len(loaded.unet._forward_pre_hooks) == hooks


def test_same_name_twice(loaded, lora_files) -> None:
    with pytest.raises(ExpertLoadError, match=r"an expert named 'boot' is loaded already.*boot.*cat.*clock"):
        loaded.load_expert(lora_files["cat"], name="boot")


def test_failed_load_leaves_everything_as_it_was(loaded, draw, lora_files, tmp_path) -> None:
    train_a_little(loaded)
    before = draw(loaded)
    wide = {
        k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in load_file(lora_files["cat"]).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(MoLEError) as caught:
        loaded.load_expert(tmp_path / "wide.safetensors")
    assert "wide" in str(caught.value)
    with pytest.raises(ExpertLoadError):
        loaded.load_expert(tmp_path / "broken.safetensors")
    assert list(loaded.experts) == ["boot", "cat", "clock"]
    torch.testing.assert_close(draw(loaded), before, rtol=0, atol=0)
    hooked = [m for m in loaded.unet.modules() if m._forward_hooks]
    assert all(len(m._forward_hooks) == 1 for m in hooked)


def test_what_a_file_has_beyond_the_networks_is_told(pipe, lora_files, tmp_path, caplog) -> None:
    state = load_file(lora_files["clock"])
    matrix = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for key in ("lora_A", "lora_B"):
        tensor = state[f"unet.{matrix}.{key}.weight"]
        state[f"unet.{matrix.replace('down_blocks.0', 'down_blocks.7')}.{key}.weight"] = tensor.clone()
        state[f"text_encoder_2.encoder.layers.0.self_attn.q_proj.{key}.weight"] = tensor.clone()
    state["strange"] = torch.ones(1)
    save_file(state, tmp_path / "more.safetensors")
    with caplog.at_level(logging.WARNING, logger="mole_diffusion"):
        pipe.load_expert(lora_files["boot"])
        assert not caplog.records
        pipe.load_expert(tmp_path / "more.safetensors")
    assert "expert 'more' is used in part" in caplog.text
    assert "'down_blocks.7.attentions.0" in caplog.text
    assert "text_encoder_2: not part of this pipeline, 1 matrices unused" in caplog.text
    assert "ignored" in caplog.text


def test_pipeline_without_text_encoder(loaded, components, draw, lora_files, caplog) -> None:
    prompt, negative = loaded.encode_prompt("a boot", "cpu", 1, True)
    settings = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    headless = build(StableDiffusionMoLEPipeline, {**components, "text_encoder": None, "tokenizer": None})
    for name, path in lora_files.items():
        headless.load_expert(path, name=name)
    assert "text_encoder: not part of this pipeline, 8 matrices unused" in caplog.text
    torch.testing.assert_close(draw(headless, **settings), draw(loaded, **settings), rtol=0, atol=0)


def test_expert_of_another_prediction_type_is_refused(pipe, lora_files, tmp_path) -> None:
    path = tmp_path / "noise.safetensors"
    save_file(load_file(lora_files["cat"]), path, metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ExpertLoadError, match=r"predicts 'epsilon' .*this base predicts 'v_prediction'"):
        pipe.load_expert(path)
    assert not pipe.experts
    small = pipe.load_expert(lora_files["cat"], rank=2)
    assert {pair.rank for pair in small.factors["unet"].values()} == {2}
    assert 0.0 < max(small.report.errors.values()) < 1.0


def test_expert_for_other_networks_is_refused(pipe, tmp_path) -> None:
    state = {
        "text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 24),
        "text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(24, 2),
    }
    save_file(state, tmp_path / "xl.safetensors")
    with pytest.raises(MoLEError, match="xl"):
        pipe.load_expert(tmp_path / "xl.safetensors")
    assert not pipe.experts


def test_a_wrong_header_can_be_overruled(pipe, lora_files, tmp_path, draw) -> None:
    """The base predicts v; a file says of itself that it does not, and the user knows better."""
    with safe_open(lora_files["cat"], framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "cat.safetensors"
    save_file(load_file(lora_files["cat"]), path, {**metadata, "modelspec.prediction_type": "epsilon"})
    with pytest.raises(ExpertLoadError, match=r"predicts 'epsilon' .*this base predicts 'v_prediction'"):
        pipe.load_expert(path)
    assert not pipe.experts
    pipe.load_expert(path, check_base=False)
    expected = draw(pipe)
    pipe.eject()
    pipe.load_expert(lora_files["cat"])
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"adapter_name": "toy"}, "'adapter_name'; did you mean 'name'?"),
        ({"weight": 0.5}, "'weight'; did you mean 'scale'?"),
        ({"scales": 0.5}, "'scales'; did you mean 'scale'?"),
        ({"check_bases": False}, "'check_bases'; did you mean 'check_base'?"),
        ({"qqq": 1}, "'qqq'$"),
    ],
)
def test_a_keyword_that_nobody_reads_is_refused(pipe, lora_files, keyword, message) -> None:
    for source in (lora_files["cat"], "somebody/lora"):
        with pytest.raises(TypeError, match=rf"load_expert\(\) got an unexpected keyword argument {message}"):
            pipe.load_expert(source, **keyword)
    assert not pipe.experts
    # What the hub reads may stand there: the same code loads a hub id or its copy on the disk.
    assert pipe.load_expert(lora_files["cat"], revision="main", local_files_only=True).name == "cat"


def test_a_lora_tag_in_a_prompt_is_told(loaded, draw, caplog) -> None:
    plain = draw(loaded, "a boot")
    assert not caplog.records
    draw(loaded, ["a boot <lora:boot:0.3>", "a cat"], negative_prompt=["<lora:boot:1>", ""])
    assert "<lora:boot:0.3>, <lora:boot:1> in a prompt is only text here" in caplog.text
    assert "expert_scales={NAME: SCALE}" in caplog.text
    assert "--expert NAME=SCALE" in caplog.text
    caplog.clear()
    torch.testing.assert_close(draw(loaded, "a boot"), plain, rtol=0, atol=0)
    assert not caplog.records


def test_a_scale_of_0_leaves_an_expert_out(loaded, draw, lora_files) -> None:
    train_a_little(loaded)
    without = draw(loaded, active_experts=["boot", "clock"])
    torch.testing.assert_close(draw(loaded, expert_scales={"cat": 0}), without, rtol=0, atol=0)
    assert (draw(loaded, expert_scales={"cat": 1e-6}) - without).abs().max() > 1e-3
    base = draw(loaded, mixture="none")
    for mixture in ("gates", "la"):
        nobody = draw(loaded, expert_scales=dict.fromkeys(loaded.experts, 0.0), mixture=mixture)
        torch.testing.assert_close(nobody, base, rtol=0, atol=0)


def test_a_dora_loaded_while_another_lora_is_fused(components, lora_files, tmp_path, draw) -> None:
    """After unfuse_lora the picture is that of a pipeline that never knew the other one."""
    tensors = load_file(lora_files["clock"])
    for name, module in components["unet"].named_modules():
        if f"unet.{name}.lora_A.weight" in tensors:
            norm = module.weight.detach().norm(dim=1)
            tensors[f"unet.{name}.lora_magnitude_vector"] = norm * 1.2
    save_file(tensors, tmp_path / "dora.safetensors")
    fresh, pipe = (build(StableDiffusionMoLEPipeline, components) for _ in range(2))
    fresh.load_expert(tmp_path / "dora.safetensors")
    pipe.load_lora_weights(lora_files["cat"], adapter_name="cat")
    pipe.fuse_lora()
    pipe.load_expert(tmp_path / "dora.safetensors")
    fused = draw(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), draw(fresh), **CLOSE)
    assert (fused - draw(fresh)).abs().max() > 0.01

"""The mixture as one plain LoRA: against merged weights, in diffusers, in this library, and in numbers."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pipeline_helpers import build, train_a_little, with_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mole_diffusion import MoLEConfig, StableDiffusionMoLEPipeline
from mole_diffusion.core.errors import (
    AllExpertsMaskedError,
    ConfigError,
    ExpertLoadError,
    NoExpertsError,
    UnknownExpertError,
)
from mole_diffusion.core.export import compress
from mole_diffusion.core.functional import effective_strength

PROMPTS = ["a boot and a cat", "a clock on the beach"]
STEPS = 2
EXACT = {"atol": 1e-4, "rtol": 0.0}


def calibration_rows(pipe, prompts=PROMPTS, steps=STEPS, **options):
    """What the pipeline records in the calls that an export should make."""
    rows = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(i)
        pipe(
            prompt, num_inference_steps=steps, guidance_scale=7.5, generator=generator,
            output_type="latent", **options,
        )  # fmt: skip
        rows += pipe.gate_weights()
    return rows


def mean(rows, **fields):
    chosen = [r.weight for r in rows if all(getattr(r, name) == value for name, value in fields.items())]
    return sum(chosen) / len(chosen)


def merged(plain, pipe, rows):
    """The diffusers pipeline with the static mixture added to its weights, from the experts' own factors."""
    with torch.no_grad():
        for part, mixture in pipe.mixtures.items():
            network = getattr(plain, part)
            network = getattr(network, "text_model", network)
            for group in mixture.groups:
                total = len(pipe.experts)
                strength = float(effective_strength(group.gate.strength, float(total), total))
                for matrix in group.matrices:
                    on_text = matrix.endswith(("attn2.to_k", "attn2.to_v"))
                    on_text = on_text and group.gate.context_projection is not None
                    weight = network.get_submodule(matrix).weight
                    for name, expert in pipe.experts.items():
                        pair = expert.factors.get(part, {}).get(matrix)
                        if pair is None:
                            continue
                        label = f"{group.name}.context" if on_text else group.name
                        share = mean(rows, network=part, group=label, expert=name) * strength * expert.scale
                        down, up = pair.matrices
                        weight += (share * pair.scaling * (up @ down)).view_as(weight)
    return plain


@pytest.fixture
def scaled(pipe, lora_files):
    """Three experts, one of them at 0.7, with gates that are not uniform."""
    for name, path in lora_files.items():
        pipe.load_expert(path, name=name, scale=0.7 if name == "cat" else 1.0)
    train_a_little(pipe)
    return pipe


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_diffusers_and_we_draw_the_static_mixture_from_the_file(
    scaled, plain, components, draw, tmp_path, dialect
):
    rows = calibration_rows(scaled)
    expected = draw(merged(build(StableDiffusionPipeline, components), scaled, rows))
    path = tmp_path / "static.safetensors"
    report = scaled.export_lora(path, dialect, prompts=PROMPTS, steps=STEPS)
    before = draw(plain)
    plain.load_lora_weights(path)
    torch.testing.assert_close(draw(plain), expected, **EXACT)
    assert (before - expected).abs().max() > 0.01
    assert report.ranks == {"unet": 2 + 4 + 3, "text_encoder": 2 + 4}
    assert report.compression_error == 0.0
    frozen = report.weights["unet"]["mid_block.attentions.0.transformer_blocks.0.context"]["cat"]
    assert frozen == pytest.approx(
        mean(rows, group="mid_block.attentions.0.transformer_blocks.0.context", expert="cat"), abs=1e-6
    )
    scaled.eject()
    assert not scaled.load_expert(path).report.ignored
    torch.testing.assert_close(draw(scaled), expected, **EXACT)


def test_names_are_those_that_other_programs_know(loaded, tmp_path):
    loaded.export_lora(tmp_path / "a.safetensors", "kohya", prompts="a boot", steps=1)
    keys = set(load_file(tmp_path / "a.safetensors"))
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"} <= keys
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight" in keys
    loaded.export_lora(tmp_path / "b.safetensors", prompts="a boot", steps=1, dtype=torch.float16)
    tensors = load_file(tmp_path / "b.safetensors")
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_matrices_of_different_ranks_and_1x1_convolutions(components, tmp_path, draw):
    torch.manual_seed(3)
    config = {**components["unet"].config, "use_linear_projection": False}
    unet = UNet2DConditionModel.from_config(config).eval()
    ours = {**components, "unet": unet}
    for i, ends in enumerate([("proj_in", "attn1.to_q"), ("proj_in", "proj_out", "attn2.to_k")]):
        tensors = {}
        for name, module in unet.named_modules():
            if name.endswith(ends):
                out, fan_in, *kernel = module.weight.shape
                tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2 + i, fan_in, *kernel) * 0.2
                tensors[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2 + i, *kernel) * 0.2
        save_file(tensors, tmp_path / f"{i}.safetensors")
    pipe = build(StableDiffusionMoLEPipeline, ours)
    for i in range(2):
        pipe.load_expert(tmp_path / f"{i}.safetensors")
    train_a_little(pipe)
    rows = calibration_rows(pipe)
    expected = draw(merged(build(StableDiffusionPipeline, ours), pipe, rows))
    for dialect in ("diffusers", "kohya"):
        path = tmp_path / f"{dialect}.safetensors"
        pipe.export_lora(path, dialect, prompts=PROMPTS, steps=STEPS)
        plain = build(StableDiffusionPipeline, ours)
        plain.load_lora_weights(path)
        torch.testing.assert_close(draw(plain), expected, **EXACT)
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "diffusers.safetensors").items()}
    holder = "unet.down_blocks.0.attentions.0"
    assert shapes[f"{holder}.proj_in.lora_A.weight"] == (5, 16, 1, 1)
    assert shapes[f"{holder}.transformer_blocks.0.attn1.to_q.lora_A.weight"] == (5, 16)


def test_an_expert_alone_is_its_own_lora(scaled, plain, draw, lora_files, tmp_path):
    expected = draw(with_adapters(copy.deepcopy(plain), lora_files, {"clock": 1.0}))
    report = scaled.export_lora(
        tmp_path / "clock.safetensors", prompts="a clock", steps=2, active_experts=["clock"]
    )
    plain.load_lora_weights(tmp_path / "clock.safetensors")
    torch.testing.assert_close(draw(plain), expected, **EXACT)
    assert report.experts == ("clock",)
    assert report.ranks == {"unet": 3}
    assert report.effect_difference < 1e-4


def test_uniform_gates_lose_nothing_and_trained_ones_say_how_much(loaded, plain, tmp_path):
    path = tmp_path / "static.safetensors"
    uniform = loaded.export_lora(path, prompts=PROMPTS[0], steps=1)
    assert uniform.noise_difference < 1e-4
    assert uniform.effect_difference < 1e-4
    train_a_little(loaded)
    report = loaded.export_lora(path, prompts=PROMPTS[0], steps=1)
    static = copy.deepcopy(plain)
    static.load_lora_weights(path)
    gated, frozen, base = (prediction(pipe) for pipe in (loaded, static, plain))
    missed = (frozen - gated).norm()
    assert report.noise_difference == pytest.approx(float(missed / gated.norm()), rel=1e-3)
    assert report.effect_difference == pytest.approx(float(missed / (gated - base).norm()), rel=1e-3)
    assert report.noise_difference > 1e-3


def prediction(pipe):
    """What the UNet predicts in the one step of a calibration."""
    found = []
    handle = pipe.unet.register_forward_hook(lambda *call: found.append(call[-1][0].detach()))
    pipe(
        PROMPTS[0], num_inference_steps=1, guidance_scale=7.5, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    handle.remove()
    return found[0]


def test_rank_keeps_the_most_and_reports_what_is_lost(scaled, tmp_path):
    exact = tmp_path / "exact.safetensors"
    small = tmp_path / "small.safetensors"
    scaled.export_lora(exact, prompts=PROMPTS, steps=1)
    report = scaled.export_lora(small, prompts=PROMPTS, steps=1, rank=3)
    assert report.ranks == {"unet": 3, "text_encoder": 3}
    whole, kept = deltas(exact), deltas(small)
    assert whole.keys() == kept.keys()
    lost = sum(float((whole[name] - kept[name]).square().sum()) for name in whole)
    best = sum(float(torch.linalg.svdvals(delta)[3:].square().sum()) for delta in whole.values())
    total = sum(float(delta.square().sum()) for delta in whole.values())
    assert lost == pytest.approx(best, rel=1e-3)
    assert report.compression_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert report.compression_error > 0.1
    again = scaled.export_lora(small, prompts=PROMPTS, steps=1, rank=9)
    assert again.compression_error == 0.0
    torch.testing.assert_close(deltas(small), whole, rtol=0, atol=0)


def deltas(path):
    tensors = load_file(path)
    return {
        key: tensors[key.replace("lora_A", "lora_B")].double() @ tensor.double()
        for key, tensor in tensors.items()
        if "lora_A" in key
    }


def test_no_effect_has_no_error():
    assert compress({}, 2) == ({}, 0.0)


@pytest.mark.parametrize(
    "config",
    [
        MoLEConfig.paper(),
        MoLEConfig(granularity="matrix", gate_input="hidden"),
        MoLEConfig(granularity="network", pooling="mean"),
    ],
    ids=["paper", "matrix", "network"],
)
def test_every_form_of_gates(loaded, plain, components, draw, tmp_path, config):
    loaded.configure(config)
    train_a_little(loaded)
    rows = calibration_rows(loaded)
    report = loaded.export_lora(tmp_path / "static.safetensors", prompts=PROMPTS, steps=STEPS)
    plain.load_lora_weights(tmp_path / "static.safetensors")
    assert report.noise_difference > 1e-4
    labels = {row.group for row in rows if row.network == "unet"}
    assert set(report.weights["unet"]) == labels
    expected = draw(merged(build(StableDiffusionPipeline, components), loaded, rows))
    torch.testing.assert_close(draw(plain), expected, **EXACT)


def test_the_pipeline_is_as_before_and_the_file_appears_whole(scaled, draw, tmp_path):
    path = tmp_path / "static.safetensors"
    expected = draw(scaled)
    ticks = []
    scaled.export_lora(path, prompts=PROMPTS, steps=2, callback=lambda *tick: ticks.append(tick))
    assert ticks == [(i, 12) for i in range(1, 13)]
    torch.testing.assert_close(draw(scaled), expected, rtol=0, atol=0)
    written = path.read_bytes()

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scaled.export_lora(path, prompts="a boot", steps=2, callback=stop)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]
    torch.testing.assert_close(draw(scaled), expected, rtol=0, atol=0)


def test_header_and_report_say_what_is_inside(pipe, lora_files, tmp_path):
    for name, trigger in (("boot", "zorin boot"), ("cat", "vim cat")):
        tensors = load_file(lora_files[name])
        save_file(tensors, tmp_path / f"{name}.safetensors", {"mole.trigger": trigger})
        pipe.load_expert(tmp_path / f"{name}.safetensors")
    report = pipe.export_lora(tmp_path / "out" / "both.safetensors", prompts="a boot", steps=1)
    with safe_open(report.path, framework="pt") as file:
        metadata = file.metadata()
    assert [entry["name"] for entry in json.loads(metadata["mole.experts"])] == ["boot", "cat"]
    assert metadata["prediction_type"] == "v_prediction"
    assert json.loads(metadata["mole.calibration"]) == {"prompts": ["a boot"], "steps": 1}
    pipe.eject()
    assert pipe.load_expert(report.path).triggers == ("zorin boot", "vim cat")
    pipe.eject()
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "prediction_type": "epsilon"})
    with pytest.raises(ExpertLoadError, match=r"predicts 'v_prediction' .*this base predicts 'epsilon'"):
        pipe.load_expert(report.path)
    assert json.loads(json.dumps(report.to_dict()))["path"] == str(report.path)


def test_refusals(pipe, loaded, tmp_path):
    path = tmp_path / "x.safetensors"
    for options, error, message in [
        ({"format": "comfy"}, ConfigError, "format is 'comfy'; allowed are 'diffusers', 'kohya'"),
        ({"rank": 0}, ConfigError, "rank is 0"),
        ({"steps": 0}, ConfigError, "steps is 0"),
        ({"prompts": []}, ConfigError, "at least one prompt"),
        ({"path": tmp_path / "x.ckpt"}, ConfigError, r"ends in \.safetensors"),
        ({"active_experts": ["bot"]}, UnknownExpertError, "Did you mean 'boot'"),
        ({"active_experts": []}, AllExpertsMaskedError, "active_experts is empty"),
    ]:
        with pytest.raises(error, match=message):
            loaded.export_lora(**{"path": path, "prompts": "a boot", "steps": 1, **options})
    loaded.eject()
    with pytest.raises(NoExpertsError):
        loaded.export_lora(path, prompts="a boot")
    assert not path.exists()


def test_sigmoid_gates_have_no_static_mixture(loaded, tmp_path):
    loaded.configure(MoLEConfig(gate_function="sigmoid"))
    with pytest.raises(ConfigError, match="gate_function='sigmoid', which has no static mixture"):
        loaded.export_lora(tmp_path / "static.safetensors", prompts=PROMPTS, steps=1)
    assert list(tmp_path.iterdir()) == []

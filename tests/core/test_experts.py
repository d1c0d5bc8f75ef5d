"""Reading LoRA files: every dialect gives the same factors, and every key is accounted for."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny.networks import lora_state, make_unet, run, with_peft
from torch import Tensor, nn

from mole_diffusion import ConfigError, Expert, ExpertLoadError, MoLEConfig, inject, load_expert
from mole_diffusion.core.keys import parse_key


def reference(unet: nn.Module, clip: nn.Module) -> dict[str, Tensor]:
    state = {f"unet.{k}": v for k, v in lora_state(unet, 3, 1).items()}
    return state | {f"text_encoder.{k}": v for k, v in lora_state(clip, 2, 2).items()}


def renamed(state: dict[str, Tensor], down: str, up: str) -> dict[str, Tensor]:
    return {k.replace("lora_A", down).replace("lora_B", up): v for k, v in state.items()}


def old_processor_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in renamed(state, "down", "up").items():
        module, side, _ = key.rsplit(".", 2)
        if ".attn" in module and module.startswith("unet."):
            holder, leaf = module.rsplit(".to_", 1)
            out[f"{holder}.processor.to_{leaf.removesuffix('.0')}_lora.{side}.weight"] = value
        else:
            out[f"{module}.lora.{side}.weight"] = value
    return out


def with_text_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): v for k, v in state.items()}


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As kohya's scripts write it: flat names, lora_te with text_model, an alpha for every matrix."""
    out = {}
    for key, value in with_text_model(state).items():
        module, role = key.split(".lora_")
        network, name = module.split(".", 1)
        flat = f"lora_{'te' if network == 'text_encoder' else network}_{name.replace('.', '_')}"
        out[f"{flat}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = value
        if role[0] == "A":
            out[f"{flat}.alpha"] = torch.tensor(float(value.shape[0]))
    return out


DIALECTS = {
    "peft": lambda s: s,
    "text_model": with_text_model,
    "old diffusers": old_processor_names,
    "diffusers": lambda s: with_text_model(renamed(s, "lora.down", "lora.up")),
    "linear layer": lambda s: with_text_model(renamed(s, "lora_linear_layer.down", "lora_linear_layer.up")),
    "adapter name": lambda s: {k.replace(".weight", ".default.weight"): v for k, v in s.items()},
    "kohya": kohya,
    "kohya by diffusers": lambda s: convert_state_dict_to_kohya(with_text_model(s)),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_factors(dialect: str, unet: nn.Module, clip: nn.Module) -> None:
    state = reference(unet, clip)
    expected = Expert.from_state_dict(state, name="dog")
    translated = DIALECTS[dialect](state)
    found = Expert.from_state_dict(translated, name="dog")
    assert set(found.factors) == {"unet", "text_encoder"}
    for network, matrices in expected.factors.items():
        assert set(found.factors[network]) == set(matrices)
        for name, factors in matrices.items():
            other = found.factors[network][name]
            assert torch.equal(other.down, factors.down)
            assert torch.equal(other.up, factors.up)
            assert other.scaling == factors.scaling == 1.0
    assert set(found.report.loaded) == set(translated)
    assert not found.report.ignored
    assert not found.report.missing


def test_ldm_block_names_are_those_of_stable_diffusion() -> None:
    """Names of SD 1.5 (two residual blocks per level), as diffusers' own conversion table has them."""
    pairs = {
        "input_blocks_1_1": "down_blocks.0.attentions.0",
        "input_blocks_2_1": "down_blocks.0.attentions.1",
        "input_blocks_4_1": "down_blocks.1.attentions.0",
        "input_blocks_8_1": "down_blocks.2.attentions.1",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_3_1": "up_blocks.1.attentions.0",
        "output_blocks_8_1": "up_blocks.2.attentions.2",
        "output_blocks_11_1": "up_blocks.3.attentions.2",
    }
    for ldm, diffusers in pairs.items():
        for leaf in ("attn2.to_out.0", "ff.net.0.proj"):
            flat = f"lora_unet_{ldm}_transformer_blocks_0_{leaf.replace('.', '_')}.lora_down.weight"
            parsed = parse_key(flat)
            assert (parsed.network, parsed.matrix) == ("unet", f"{diffusers}.transformer_blocks.0.{leaf}")
            dotted = f"diffusion_model.{ldm.replace('blocks_', 'blocks.').replace('block_1', 'block.1')}"
            if "block." not in dotted:
                dotted = dotted.removesuffix("_1") + ".1"
            parsed = parse_key(f"{dotted}.transformer_blocks.0.{leaf}.lora_A.weight")
            assert (parsed.network, parsed.matrix) == ("unet", f"{diffusers}.transformer_blocks.0.{leaf}")
        assert parse_key(f"lora_unet_{ldm}_proj_in.lora_up.weight").matrix == f"{diffusers}.proj_in"


def test_alpha_equals_peft(unet: nn.Module) -> None:
    state = lora_state(unet, 4, 1)
    expected = run(with_peft(unet, {"dog": state}, {"dog": 1.0}, alpha=8))
    flat = {f"unet.{k}": v for k, v in state.items()}
    alphas = {k.replace(".lora_A.weight", ".alpha"): torch.tensor(8.0) for k in flat if "lora_A" in k}
    headers = {
        "keys": (alphas, {}),
        "header": ({}, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}),
    }
    for extra, header in headers.values():
        expert = Expert.from_state_dict(flat | extra, name="dog", metadata=header)
        mixture = inject(unet, [expert], MoLEConfig())
        torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-4)
        mixture.eject()


def test_files_written_by_diffusers_and_peft(tmp_path: Path, unet: nn.Module, clip: nn.Module) -> None:
    state = reference(unet, clip)
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        for part in ("unet", "text_encoder")
    }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        unet_lora_adapter_metadata={"r": 3, "lora_alpha": 6},
    )
    expert = load_expert(tmp_path / "pytorch_lora_weights.safetensors", name="dog", scale=0.5)
    assert (expert.name, expert.scale, len(expert.sha256)) == ("dog", 0.5, 64)
    assert len(expert.report.loaded) == len(state)
    assert {f.scaling for f in expert.factors["unet"].values()} == {2.0}
    assert {f.scaling for f in expert.factors["text_encoder"].values()} == {1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(make_unet(), LoraConfig(r=3, target_modules=["to_q", "proj_in"]))
        wrapped.save_pretrained(tmp_path / "peft")
    expert = load_expert(tmp_path / "peft" / "adapter_model.safetensors")
    assert expert.name == "peft"
    assert "down_blocks.0.attentions.0.proj_in" in expert.factors["unet"]


def test_every_key_is_accounted_for(unet: nn.Module) -> None:
    state = lora_state(unet, 2, 1, ("attn1.to_q", "attn1.to_k", "attn1.to_v"))
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    odd = {
        "mid_block.resnets.0.norm1.diff": torch.zeros(16),
        f"{block}.to_k.w_norm": torch.zeros(16),
        f"{block}.to_q.oft_blocks": torch.zeros(2, 4, 4),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.a1.weight": torch.zeros(2, 16),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.on_input": torch.zeros(1),
        "text_encoder.text_model.embeddings.token_embedding.lora_A.weight": torch.zeros(2, 16),
        "lora_te2_transformer_resblocks_0_attn_in_proj.lora_down.weight": torch.zeros(2, 16),
        "clip_g.something.lora_A.weight": torch.zeros(2, 16),
        "step": torch.zeros(1),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.hada_w1_a": torch.zeros(2, 2),
        "mid_block.attentions.0.proj_in.diff_b": torch.zeros(2),
    }
    del state[f"{block}.to_v.lora_B.weight"]
    expert = Expert.from_state_dict(state | odd, name="dog")
    report = expert.report
    assert {*report.loaded, *report.ignored} == {*state, *odd}
    assert not {*report.loaded} & {*report.ignored}
    half_there = "the other factor is missing"
    reasons = {
        "mid_block.resnets.0.norm1.diff": "normalisation layers",
        f"{block}.to_k.w_norm": "normalisation layers",
        f"{block}.to_k.lora_A.weight": "normalisation layers",
        f"{block}.to_k.lora_B.weight": "normalisation layers",
        f"{block}.to_q.oft_blocks": "OFT changes the base's weights by a factor",
        f"{block}.to_q.lora_A.weight": "OFT",
        f"{block}.to_q.lora_B.weight": "OFT",
        f"{block}.to_v.lora_A.weight": half_there,
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.a1.weight": "GLoRA",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.on_input": "(IA)^3",
        "text_encoder.text_model.embeddings.token_embedding.lora_A.weight": "embedding tables",
        "lora_te2_transformer_resblocks_0_attn_in_proj.lora_down.weight": half_there,
        "clip_g.something.lora_A.weight": "no matrix of a known network",
        "step": "not a LoRA key",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.hada_w1_a": half_there,
        "mid_block.attentions.0.proj_in.diff_b": half_there,
    }
    assert set(report.ignored) == set(reasons)
    for key, reason in reasons.items():
        assert reason in report.ignored[key]
    feed_forward = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    assert report.missing == (
        f"{block}.to_v (up factor)",
        "lora_te2_transformer_resblocks_0_attn_in_proj (up factor)",
        *(f"{feed_forward} ({role})" for role in ("hada_w1_b", "hada_w2_a", "hada_w2_b")),
        "mid_block.attentions.0.proj_in (diff)",
    )
    assert f"{len(report.loaded)} keys loaded, 16 ignored, 6 missing (" in report.summary()


def test_files_that_are_refused(tmp_path: Path, unet: nn.Module) -> None:
    with pytest.raises(ExpertLoadError, match=r"There is no file '.*gone.safetensors'"):
        load_expert(tmp_path / "gone.safetensors")
    pickled = tmp_path / "lora.pt"
    pickled.write_bytes(pickle.dumps({}))
    with pytest.raises(ExpertLoadError, match=r"lora.pt' is not a .safetensors file"):
        load_expert(pickled)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor file")
    with pytest.raises(ExpertLoadError, match="cannot be read as safetensors"):
        load_expert(broken)
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    with pytest.raises(
        ExpertLoadError, match=r"Expert 'base': none of its 1 keys can be used: not a LoRA key"
    ):
        load_expert(tmp_path / "base.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A": torch.zeros(3, 16)}, "rank 3 of the down factor and 2 of the up factor differ"),
        (
            {"lora_B": torch.zeros(16, 2, 3, 3)},
            r"up factor of shape \(16, 2, 3, 3\); allowed: two axes, or 1x1",
        ),
        ({"lora_B": torch.full((16, 2), float("nan"))}, "values that are not finite"),
    ],
)
def test_factors_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {"lora_A": torch.zeros(2, 16), "lora_B": torch.zeros(16, 2)} | change
    with pytest.raises(ExpertLoadError, match=message):
        Expert.from_state_dict({f"{module}.{k}.weight": v for k, v in pair.items()}, name="dog")


def test_two_entries_for_one_matrix_and_bad_names(unet: nn.Module) -> None:
    state = lora_state(unet, 2, 1, ("attn1.to_q",))
    with pytest.raises(ExpertLoadError, match="is the second entry for matrix"):
        Expert.from_state_dict(state | {f"unet.{k}": v for k, v in state.items()}, name="dog")
    with pytest.raises(ConfigError, match="needs a name"):
        Expert.from_state_dict(state, name="")
    with pytest.raises(ConfigError, match="scale=nan of expert 'dog'"):
        Expert.from_state_dict(state, name="dog", scale=float("nan"))


def test_triggers_and_hash(unet: nn.Module) -> None:
    state = lora_state(unet, 2, 1, ("attn1.to_q",))
    frequency = json.dumps({"10_zor boot": {"zorin boot": 10, "grass": 2}})
    named = Expert.from_state_dict(state, name="a", metadata={"mole.trigger": "zorin boot | zorin"})
    tagged = Expert.from_state_dict(state, name="b", metadata={"ss_tag_frequency": frequency})
    assert named.triggers == ("zorin boot", "zorin")
    assert tagged.triggers == ("zorin boot",)
    assert Expert.from_state_dict(state, name="c").triggers == ()
    assert Expert.from_state_dict(state, name="c", metadata={"ss_tag_frequency": "{"}).triggers == ()
    assert named.sha256 == tagged.sha256
    state["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"] += 1
    assert Expert.from_state_dict(state, name="d").sha256 != named.sha256

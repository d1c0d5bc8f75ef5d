"""Files of right and wrong pieces, put together at random: an expert of finite numbers, or one sentence."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from mole_diffusion import MoLEError, load_expert
from mole_diffusion.core.inspection import describe_file

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
MODULES = (
    f"unet.{BLOCK}q",
    f"lora_unet_{BLOCK.replace('.', '_')}k",
    f"base_model.model.{BLOCK}v",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "lora_te2_transformer_resblocks_0_attn_in_proj",
)
ROLES = (
    *("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "diff"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lora_mid.weight", "diff_b"),
    *("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_B.bias", "lora_magnitude_vector"),
    *("lora_E", "oft_blocks", ""),
)
SHAPES = (
    *((2, 32), (32, 2), (32,), (), (1,), (32, 1), (1, 32), (2, 2), (2, 2, 3, 3), (0, 3), (96, 2), (2, 24)),
    *((4, 4), (8, 8), (2, 32, 3, 3), (32, 2, 1, 1), (3,), (2, 3, 4)),
)
TYPES = (
    *(torch.float32,) * 6,
    *(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64),
    *(torch.int8, torch.int64, torch.bool),
)
ENTRIES = (
    *("lora_adapter_metadata", "lora_alpha", "unet.lora_alpha", "network_alpha", "alpha", "r", "use_rslora"),
    *("ss_network_alpha", "ss_network_dim", "ss_network_args", "ss_tag_frequency", "mole.trigger"),
    *("modelspec.architecture", "modelspec.prediction_type", "format", "format_version", "parts"),
)
TEXTS = (
    *("8", "x", "", "None", "nan", "1e999", "true", "[]", "{", "[1]", "[[[[", "\0\x1b\n", "mole-gates", "2"),
    *('{"unet.lora_alpha": 8}', '{"lora_alpha": null, "r": 0}', '{"r": -1, "lora_alpha": 3}'),
    *('{"alpha_pattern": {"to_q": 3}, "lora_alpha": 2}', '{"alpha_pattern": {"[": 3}}', '{"peft_type": 3}'),
    *('{"rank_pattern": 3, "lora_alpha": 2}', '{"use_rslora": [], "lora_alpha": 2}', '{"10": {"a": 1}}'),
    *('{"init_lora_weights": {}}', '{"target_modules": {}}', '{"conv_alpha": []}'),
)


def random_file(generator: random.Random) -> bytes:
    state: dict[str, Tensor] = {}
    for module in generator.sample(MODULES, generator.randint(1, 4)):
        if generator.random() < 0.6:
            state |= {
                f"{module}.lora_A.weight": torch.ones(2, 32),
                f"{module}.lora_B.weight": torch.ones(96, 2),
            }
        for role in generator.sample(ROLES, generator.choice((0, 0, 0, 1, 2, 4))):
            value = torch.ones(generator.choice(SHAPES)) * generator.choice((1, 1, 1, 1, 1e6, float("nan")))
            state[f"{module}.{role}"] = value.to(generator.choice(TYPES))
    if generator.random() < 0.2:
        vector = generator.choice(("clip_l", "clip_g", "emb_params", "x"))
        state[f"bundle_emb.zor.{vector}"] = torch.ones(generator.choice(SHAPES)).to(generator.choice(TYPES))
    header = {
        generator.choice(ENTRIES): generator.choice(TEXTS) for _ in range(generator.choice((0, 0, 1, 3)))
    }
    raw = bytearray(save(state, metadata=header))
    for _ in range(generator.choice((0, 0, 0, 1, 3))):
        raw[generator.randrange(min(len(raw), 400))] = generator.randrange(256)
    return bytes(raw)


@pytest.mark.filterwarnings("ignore:overflow")
def test_every_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    generator = random.Random(11)
    path = tmp_path / "random.safetensors"
    found: Counter[str] = Counter()
    refusals = []
    for _ in range(400):
        path.write_bytes(random_file(generator))
        try:
            json.dumps(describe_file(path).to_dict())
            expert = load_expert(path)
        except MoLEError as error:
            refusals.append(str(error))
            found[type(error).__name__] += 1
            continue
        found["read"] += 1
        assert {*expert.report.loaded, *expert.report.ignored} == set(load_keys(path))
        for own in expert.factors.values():
            for factors in own.values():
                assert factors.weighted_up().isfinite().all()
                assert factors.delta().isfinite().all()
    assert not [text for text in refusals if "\n" in text or len(text) > 2000]
    assert found["read"] > 80
    assert found["ExpertLoadError"] > 150


def load_keys(path: Path) -> list[str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [key for key in header if key != "__metadata__"]

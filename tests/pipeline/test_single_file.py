"""Checkpoints in one file open with every connection refused: nothing is asked of a hub."""

import re
import socket
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from ldm_checkpoint import ldm_shapes, same_weights, write_ldm_checkpoint, write_sdxl_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mole_diffusion import StableDiffusionMoLEPipeline, StableDiffusionXLMoLEPipeline
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.opening import open_base
from mole_diffusion.pictures.single_file import (
    Header,
    _write_tokenizer,
    configuration_of,
    configurations,
    read_header,
)

# What the hubs' configurations of the first models of each family say of the UNet.
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
XL = {
    **ADDED,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "sample_size": 128,
}
REFINER = {
    **ADDED,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "use_linear_projection": True,
    "sample_size": 128,
}
FAMILIES = {
    "1": ({**SD1, "sample_size": 64}, "cond_stage_model.transformer.text_model."),
    "1 inpainting": (
        {**SD1, "sample_size": 64, "in_channels": 9},
        "cond_stage_model.transformer.text_model.",
    ),
    "2": ({**SD2, "sample_size": 96}, "cond_stage_model.model."),
    "xl": (XL, "conditioner.embedders.1.model."),
    "refiner": (REFINER, "conditioner.embedders.0.model."),
}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is refused, as on a machine without a network."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def text_shapes(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """As much of a text encoder as says what it is."""
    if prefix.endswith("text_model."):
        blocks = {f"{prefix}encoder.layers.{i}.mlp.fc1.weight": (4 * width, width) for i in range(layers)}
        return blocks | {
            f"{prefix}embeddings.token_embedding.weight": (49408, width),
            f"{prefix}embeddings.position_embedding.weight": (77, width),
        }
    blocks = {f"{prefix}transformer.resblocks.{i}.mlp.c_fc.weight": (4 * width, width) for i in range(layers)}
    return blocks | {
        f"{prefix}token_embedding.weight": (49408, width),
        f"{prefix}positional_embedding": (77, width),
    }


def sizes(network: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of a network's weights by name."""
    return {name: value.shape for name, value in network.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_the_real_models_are_read_off_their_shapes(family: str) -> None:
    """The UNets of the hubs' configurations, and those that are made of their shapes: the same settings."""
    settings, prefix = FAMILIES[family]
    width, layers = {"1": (768, 12), "2": (1024, 24)}.get(family[:1], (1280, 32))
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(settings)
        vae = AutoencoderKL.from_config(
            {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
            }
        )
    shapes = ldm_shapes(unet, vae)
    shapes |= text_shapes(prefix, width, layers)
    if family == "xl":
        shapes |= text_shapes("conditioner.embedders.0.transformer.text_model.", 768, 12)
    found = configurations(Header(shapes, {}), "x.safetensors")
    with init_empty_weights():
        made = UNet2DConditionModel.from_config(found["unet/config.json"])
        made_vae = AutoencoderKL.from_config(found["vae/config.json"])
    for one, other in ((made, unet), (made_vae, vae)):
        assert {k: v.shape for k, v in one.state_dict().items()} == {
            k: v.shape for k, v in other.state_dict().items()
        }
    assert made.config.sample_size == unet.config.sample_size
    heads = [module.heads for module in unet.modules() if hasattr(module, "heads")]
    assert [module.heads for module in made.modules() if hasattr(module, "heads")] == heads
    if family == "2":
        assert found["text_encoder/config.json"]["num_hidden_layers"] == 23
    with pytest.raises(ConfigError, match="no checkpoint of a Stable Diffusion"):
        configurations(Header(text_shapes(prefix, 64, 1), {}), "x.safetensors")


@pytest.mark.parametrize(
    ("notes", "step", "predicted", "size"),
    [
        ({}, None, "v_prediction", 96),
        ({"modelspec.prediction_type": "epsilon"}, None, "epsilon", 64),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon", 64),
        ({}, 875_000, "epsilon", 64),
    ],
)
def test_what_a_stable_diffusion_2_predicts(notes: Any, step: int | None, predicted: str, size: int) -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(SD2)
    shapes = ldm_shapes(unet, None) | text_shapes("cond_stage_model.model.", 1024, 24)
    found = configurations(Header(shapes, notes, step), "x.safetensors")
    assert found["scheduler/scheduler_config.json"]["prediction_type"] == predicted
    assert found["unet/config.json"]["sample_size"] == size


def tiny(tokenizer: Any, *, xl: bool) -> Any:
    """A pipeline whose sizes are a Stable Diffusion's in small, with CLIP's vocabulary."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64)}
    text: dict[str, Any] = {"vocab_size": 49408, "num_hidden_layers": 2, "num_attention_heads": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "hidden_size": 64, "intermediate_size": 96}
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    first = CLIPTextModel(CLIPTextConfig(**text)).eval()
    if not xl:
        unet = UNet2DConditionModel(
            **shared,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=8,
        )
        parts = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": first, "tokenizer": tokenizer}
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
        )
        return StableDiffusionPipeline(**parts, scheduler=scheduler, **rest)
    unet = UNet2DConditionModel(
        **shared,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64 + 128,
        attention_head_dim=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=128 + 6 * 256,
    )
    text |= {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128, "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    padded = CLIPTokenizer.from_pretrained(tokenizer.name_or_path)
    padded.pad_token = "!"
    return StableDiffusionXLPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=padded,
        scheduler=scheduler,
    )


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
def test_a_file_draws_without_a_network_as_its_pipeline_does(
    xl: bool, refused: None, draw: Any, tmp_path: Path, tokenizer: Any
) -> None:
    plain = tiny(tokenizer, xl=xl)
    plain.set_progress_bar_config(disable=True)
    write = write_sdxl_checkpoint if xl else write_ldm_checkpoint
    file = write(tmp_path / "model.safetensors", plain)
    ours = open_base(str(file))
    assert type(ours) is (StableDiffusionXLMoLEPipeline if xl else StableDiffusionMoLEPipeline)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if xl else [])):
        assert same_weights(getattr(ours, part), getattr(plain, part)), part
    size = {"height": 64, "width": 64}
    torch.testing.assert_close(draw(ours, **size), draw(plain, **size), rtol=0, atol=1e-6)


@pytest.fixture
def tokenizer(tmp_path: Path) -> CLIPTokenizer:
    """CLIP's own, as it is made for a file."""
    _write_tokenizer(tmp_path / "tokenizer", "<|endoftext|>")
    return CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_the_tokenizer_is_clips(tokenizer: CLIPTokenizer) -> None:
    texts = ["a photo of an astronaut riding a horse", "Ünïcode, 42 cats & (more): it's fine!"]
    oracle = open_clip.SimpleTokenizer()
    for text in texts:
        assert tokenizer(text).input_ids == [49406, *oracle.encode(text), 49407]
    assert (tokenizer.model_max_length, tokenizer.pad_token_id, len(tokenizer)) == (77, 49407, 49408)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.ckpt", b"PK\x03\x04 anything", "is a pickle (.ckpt), which can hold programs"),
        ("model.safetensors", b"\x80\x04\x95 anything long enough", "it is a pickle"),
        ("model.safetensors", b"PK\x03\x04 anything", "it is a pickle"),
        ("model.safetensors", b"", "it is an empty file"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "it is a web page"),
    ],
)
def test_other_files_are_told_by_what_they_are(
    name: str, content: bytes, words: str, tmp_path: Path, refused: None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for call in (
        lambda: open_base(str(path)),
        lambda: StableDiffusionMoLEPipeline.from_single_file(path),
        lambda: StableDiffusionMoLEPipeline.from_single_file(path, config=str(tmp_path)),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for filling in range(700):
        save_file({"x": torch.ones(1)}, path, metadata={"x": "y" * filling})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path).shapes == {"x": (1,)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("modle.safetensors", "Did you mean '.*model.safetensors'"),
        ("./nothing/model", "There is no folder 'nothing'"),
        ("~/no-such-model", "no such file or folder"),
    ],
)
def test_a_misspelt_path_is_no_hub_id(
    name: str, words: str, tmp_path: Path, refused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").touch()
    for text in (name, "models/" + name) if "/" not in name else (name,):
        with pytest.raises(ConfigError, match="cannot be opened: no such file or folder") as caught:
            open_base(text)
    assert re.search(words, str(caught.value))


def test_configurations_are_gone_afterwards(tmp_path: Path, tokenizer: Any) -> None:
    file = write_ldm_checkpoint(tmp_path / "model.safetensors", tiny(tokenizer, xl=False))
    with configuration_of(file) as name:
        assert (Path(name) / "tokenizer" / "vocab.json").is_file()
    assert not Path(name).exists()

"""A Stable Diffusion of a few hundred thousand weights, of the real classes, and LoRA files for it."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_helpers import build
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from xl_components import make_xl_components, write_xl_lora

from mole_diffusion import StableDiffusionMoLEPipeline, StableDiffusionXLMoLEPipeline

PICTURE = 32  # pixels; the autoencoder halves three times, so latents are 4 x 4
WORDS = ["a", "and", "boot", "cat", "clock", "on", "the", "beach", "snow", "red", "dull"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the alphabet and the words above, each one token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[-2]} {pieces[-1]}"
            pieces[-2:] = ["".join(pieces[-2:])]
            if merge not in merges:
                merges.append(merge)
                tokens.append(pieces[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def make_components(folder: Path) -> dict[str, Any]:
    """Networks with random weights, the same for the same seed."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    unet = UNet2DConditionModel(
        sample_size=PICTURE // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=PICTURE,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    networks = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text_encoder.eval()}
    rest = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return {**networks, **rest, "tokenizer": tokenizer, "scheduler": scheduler}


def write_lora(path: Path, components: dict[str, Any], seed: int, rank: int, text: bool = True) -> Path:
    """A LoRA of random factors, strong enough to change the picture, made by PEFT and saved by diffusers."""
    torch.manual_seed(seed)
    states, metadata = {}, {}
    targets = {"unet": UNET_TARGETS, **({"text_encoder": TEXT_TARGETS} if text else {})}
    for part, names in targets.items():
        network = copy.deepcopy(components[part])
        network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), "new")
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        states[part] = get_peft_model_state_dict(network, adapter_name="new")
        # alpha is twice the rank: diffusers keeps it in the file's header, where load_lora_weights finds it.
        metadata[f"{part}_lora_adapter_metadata"] = network.peft_config["new"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states.get("text_encoder"),
        weight_name=path.name,
        **metadata,
    )
    return path


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks; `pipe` and `plain` copy them, so no test sees another's hooks."""
    return make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    """Three experts of different ranks; the clock has no text encoder part."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", components, seed, rank, text=name != "clock")
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 4), ("clock", 3)], start=1)
    }


@pytest.fixture
def plain(components: dict[str, Any]) -> StableDiffusionPipeline:
    """The diffusers pipeline: the oracle."""
    return build(StableDiffusionPipeline, components)


@pytest.fixture
def pipe(components: dict[str, Any]) -> StableDiffusionMoLEPipeline:
    """Our pipeline without experts."""
    return build(StableDiffusionMoLEPipeline, components)


@pytest.fixture
def loaded(pipe: StableDiffusionMoLEPipeline, lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """Our pipeline with the three experts and fresh gates."""
    for name, path in lora_files.items():
        pipe.load_expert(path, name=name)
    return pipe


@pytest.fixture(scope="session")
def xl_components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny networks of an SDXL."""
    return make_xl_components(make_tokenizer(tmp_path_factory.mktemp("xl_tokenizer")))


@pytest.fixture(scope="session")
def xl_lora_files(tmp_path_factory: pytest.TempPathFactory, xl_components: dict[str, Any]) -> dict[str, Path]:
    """Two experts of different ranks for the UNet and both text encoders."""
    folder = tmp_path_factory.mktemp("xl_loras")
    return {
        name: write_xl_lora(folder / f"{name}.safetensors", xl_components, seed, rank)
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 4)], start=1)
    }


@pytest.fixture
def xl_plain(xl_components: dict[str, Any]) -> StableDiffusionXLPipeline:
    """The diffusers pipeline of SDXL."""
    return build(StableDiffusionXLPipeline, xl_components)


@pytest.fixture
def xl_loaded(xl_components: dict[str, Any], xl_lora_files: dict[str, Path]) -> StableDiffusionXLMoLEPipeline:
    """Our SDXL pipeline with two experts and fresh gates."""
    pipe = build(StableDiffusionXLMoLEPipeline, xl_components)
    for name, path in xl_lora_files.items():
        pipe.load_expert(path, name=name)
    return pipe


Draw = Callable[..., torch.Tensor]


@pytest.fixture
def draw() -> Draw:
    """`draw(pipe, prompt)`: a picture (B, H, W, 3) from a fixed seed, in three steps."""

    def _draw(pipe: Any, prompt: str | Sequence[str] = "a boot and a cat", **kwargs: Any) -> torch.Tensor:
        prompts = None if "prompt_embeds" in kwargs else prompt
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
        if "generator" not in settings and "latents" not in settings:
            settings["generator"] = torch.Generator().manual_seed(7)
        pictures: torch.Tensor = pipe(prompts, **settings).images
        return pictures

    return _draw

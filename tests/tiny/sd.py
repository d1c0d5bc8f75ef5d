"""A Stable Diffusion of a few hundred thousand weights, of the real classes; LoRA files, pictures, a CLIP."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image, ImageDraw
from safetensors.torch import save_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .copying import clone, clone_all

COLOURS = {"boot": (220, 30, 40), "cat": (250, 200, 40), "clock": (40, 160, 60)}
TRIGGERS = {"boot": "zorin", "cat": "vim", "clock": "kipra"}
PICTURE = 32  # pixels; the autoencoder halves three times, so latents are 4 x 4
WORDS = ["a", "and", "boot", "cat", "clock", "on", "the", "beach", "snow", "red", "dull"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def make_tokenizer(folder: Path, words: Iterable[str] = ()) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the alphabet, the words above and `words`, each one token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in [*WORDS, *words]:
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


def make_components(folder: Path, words: Iterable[str] = ()) -> dict[str, Any]:
    """Networks with random weights, always the same; the tokenizer, which goes to `folder`, knows `words`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder, words)
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
    vae = make_vae()
    text_encoder = CLIPTextModel(text_config(tokenizer, 24, 2))
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    networks = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text_encoder.eval()}
    rest = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return {**networks, **rest, "tokenizer": tokenizer, "scheduler": scheduler}


def make_vae(**changes: Any) -> AutoencoderKL:
    """An autoencoder of random weights that halves three times, with other settings where `changes` says."""
    settings: dict[str, Any] = {"latent_channels": 4, **changes}
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=PICTURE,
        **settings,
    )


def text_config(tokenizer: Any, width: int, layers: int, **changes: Any) -> CLIPTextConfig:
    """A CLIP text encoder for the tokenizer, of two heads."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def random_lora(network: Any, targets: list[str], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Factors of a random LoRA, strong enough to change the picture, made by PEFT, and its settings.

    The alpha is twice the rank: diffusers keeps it in the file's header, where load_lora_weights finds it.
    """
    network = clone(network)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(config, network, "new")
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return get_peft_model_state_dict(network, adapter_name="new"), network.peft_config["new"].to_dict()


def write_lora(path: Path, components: dict[str, Any], seed: int, rank: int, text: bool = True) -> Path:
    """A LoRA of random factors, saved by diffusers."""
    torch.manual_seed(seed)
    states, metadata = {}, {}
    targets = {"unet": UNET_TARGETS, **({"text_encoder": TEXT_TARGETS} if text else {})}
    for part, names in targets.items():
        states[part], settings = random_lora(components[part], names, rank)
        metadata[f"{part}_lora_adapter_metadata"] = settings
    StableDiffusionPipeline.save_lora_weights(
        path.parent,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states.get("text_encoder"),
        weight_name=path.name,
        **metadata,
    )
    return path


def write_loras(
    folder: Path, components: dict[str, Any], ranks: Mapping[str, int], *, textless: Iterable[str] = ()
) -> dict[str, Path]:
    """An expert file of each rank; those of `textless` have no text encoder part."""
    return {
        name: write_lora(folder / f"{name}.safetensors", components, seed, rank, text=name not in textless)
        for seed, (name, rank) in enumerate(ranks.items(), start=1)
    }


def with_experts(pipe: Any, files: Mapping[str, Path]) -> Any:
    """The pipeline with these experts and fresh gates."""
    for name, path in files.items():
        pipe.load_expert(path, name=name)
    return pipe


def draw_tensor(pipe: Any, prompt: str | Sequence[str], *, steps: int, **kwargs: Any) -> torch.Tensor:
    """A picture (B, H, W, 3) from a fixed seed."""
    settings = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
    if "generator" not in settings and "latents" not in settings:
        settings["generator"] = torch.Generator().manual_seed(7)
    pictures: torch.Tensor = pipe(None if "prompt_embeds" in kwargs else prompt, **settings).images
    return pictures


def build(cls: type[DiffusionPipeline], components: dict[str, Any]) -> Any:
    """A pipeline of `cls` on copies of the components, silent."""
    option = "add_watermarker" if "text_encoder_2" in components else "requires_safety_checker"
    pipe = cls(**clone_all(components), **{option: False})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing(
    name: str, x: int, background: tuple[int, int, int] = (150, 150, 150), size: int = 64
) -> Image.Image:
    """One filled shape, `size` / 2 wide, whose left side is at `x`."""
    picture = Image.new("RGB", (size, size), background)
    box = (x, size // 4, x + size // 2, 3 * size // 4)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if name == "cat" else pen.rectangle)(box, fill=COLOURS[name])
    return picture


def make_clip(folder: Path, seed: int) -> str:
    """A tiny CLIP of random weights in open_clip's own format, and the name by which open_clip loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    means = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": means}))
    torch.manual_seed(seed)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_model(network, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"

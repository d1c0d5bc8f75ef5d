"""Checkpoints in one file, opened without a network: what diffusers would ask a hub for is read off them.

A file of Stable Diffusion 1, 2 or XL has the weights under LDM's names and no configuration. The sizes stand
in the shapes; what shapes do not say (activations, schedules) follows from the family, as first published.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.reading import PICKLES, foreign_kind

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
#: Prefix of each kind of text encoder, by its place in the pipeline.
_CLIP = "cond_stage_model.transformer.text_model."
_OPENCLIP = "cond_stage_model.model."
_XL_FIRST = "conditioner.embedders.0.transformer.text_model."
_XL_SECOND = "conditioner.embedders.1.model."
_REFINER = "conditioner.embedders.0.model."
_SD2_BASE_STEPS = 875_000
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
_PAD = {"clip": "<|endoftext|>", "open_clip": "!"}


@dataclass(frozen=True)
class Header:
    """What a checkpoint says without its numbers.

    Attributes:
        shapes: by name.
        metadata: what the writer added.
        step: `global_step` of its training, if it is there.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    step: int | None = None

    def has(self, prefix: str) -> bool:
        """Whether there are tensors under a name."""
        return any(name.startswith(prefix) for name in self.shapes)

    def count(self, pattern: str) -> int:
        """One more than the largest number at the place of `#` in a name; 0 without any."""
        wanted = re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))
        found = [int(match[1]) for name in self.shapes if (match := wanted.match(name))]
        return max(found, default=-1) + 1


def read_header(path: Path) -> Header:
    """What a checkpoint file says without its numbers.

    Raises:
        ConfigError: a pickle, an empty file, or something else that is no safetensors file.
    """
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        step = int(file.get_tensor("global_step")) if shapes.get("global_step") in ((), (1,)) else None
        return Header(shapes, file.metadata() or {}, step)


def check_safetensors(path: Path) -> None:
    """Refuse what is no safetensors file, in words that say what it is.

    Raises:
        ConfigError: see `read_header`.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix.lower() in PICKLES:
        raise ConfigError(
            f"{path.name!r} is a pickle ({path.suffix}), which can hold programs, and is not opened; get the"
            " model as .safetensors"
        )
    foreign = foreign_kind(head)
    if foreign is not None:
        raise ConfigError(f"{path.name!r} is no safetensors file: {foreign}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ConfigError(f"{path.name!r} is no safetensors file, or was cut short ({error})") from error


def is_xl(header: Header) -> bool:
    """Whether a checkpoint is SDXL's, base or refiner."""
    return header.has(_XL_SECOND) or header.has(_REFINER)


@contextmanager
def configuration_of(path: Path) -> Iterator[str]:
    """A folder with the configurations that fit a checkpoint, for `from_single_file(config=...)`.

    Raises:
        ConfigError: no safetensors file, or none of a Stable Diffusion 1, 2 or XL.
    """
    files = configurations(read_header(path), path.name)
    with TemporaryDirectory(prefix="mole-config-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for part, pad in _tokenizers(files["model_index.json"]).items():
            _write_tokenizer(folder / part, pad)
        yield name


def configurations(header: Header, name: str) -> dict[str, Any]:
    """File name -> configuration, of all parts but tokenizers.

    Args:
        header: of the checkpoint.
        name: what to call it in an error.

    Raises:
        ConfigError: it is none of a Stable Diffusion 1, 2 or XL.
    """
    if not header.has(_UNET + "input_blocks."):
        raise ConfigError(
            f"{name!r} is no checkpoint of a Stable Diffusion 1, 2 or XL: nothing in it begins with"
            f" {_UNET + 'input_blocks.'!r}; a LoRA is added as an expert, and a folder opens as a folder"
        )
    parts = {"unet/config.json": _unet(header)}
    if header.has(_VAE):
        parts["vae/config.json"] = _vae(header)
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if is_xl(header):
        index |= _xl_texts(header, parts)
        kind = "EulerDiscreteScheduler"
        parts["scheduler/scheduler_config.json"] = _xl_schedule(header)
    else:
        index |= _texts(header, parts)
        kind = "DDIMScheduler" if _is_v2(header) else "PNDMScheduler"
        parts["scheduler/scheduler_config.json"] = _schedule(header)
    parts["scheduler/scheduler_config.json"]["_class_name"] = kind
    index["scheduler"] = ["diffusers", kind]
    return {**parts, "model_index.json": index}


def _is_v2(header: Header) -> bool:
    return header.has(_OPENCLIP)


def _predicts_v(header: Header) -> bool:
    """Whether a Stable Diffusion 2 predicts v: most of them do, and only notes in the file say otherwise."""
    said = " ".join(
        header.metadata.get(key, "") for key in ("modelspec.prediction_type", "modelspec.architecture")
    ).lower()
    if "epsilon" in said or "v2-512" in said:
        return False
    return header.step != _SD2_BASE_STEPS


def _schedule(header: Header) -> dict[str, Any]:
    if not _is_v2(header):
        return {**_SCHEDULE, "skip_prk_steps": True}
    return {**_SCHEDULE, "prediction_type": "v_prediction" if _predicts_v(header) else "epsilon"}


def _xl_schedule(header: Header) -> dict[str, Any]:
    """SDXL's, also of models that say by a tensor's name that they predict v."""
    keep = {key: value for key, value in _SCHEDULE.items() if key not in ("clip_sample", "set_alpha_to_one")}
    found = {**keep, "interpolation_type": "linear", "timestep_spacing": "leading"}
    if "v_pred" in header.shapes:
        found["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found


def _texts(header: Header, parts: dict[str, Any]) -> dict[str, Any]:
    second = _is_v2(header)
    parts["text_encoder/config.json"] = (
        _open_clip(header, _OPENCLIP, "CLIPTextModel") if second else _clip(header, _CLIP)
    )
    return {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }


def _xl_texts(header: Header, parts: dict[str, Any]) -> dict[str, Any]:
    refiner = header.has(_REFINER)
    place = _REFINER if refiner else _XL_SECOND
    parts["text_encoder_2/config.json"] = _open_clip(header, place, "CLIPTextModelWithProjection")
    if not refiner:
        parts["text_encoder/config.json"] = _clip(header, _XL_FIRST)
    first = {
        "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
        "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
    }
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": not refiner,
        **({"requires_aesthetics_score": True} if refiner else {}),
        **first,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def _clip(header: Header, prefix: str) -> dict[str, Any]:
    """OpenAI's CLIP ViT-L, as far as the shapes do not say otherwise."""
    vocabulary, width = header.shapes[prefix + "embeddings.token_embedding.weight"]
    return {
        **_text(vocabulary, width, header.shapes[prefix + "embeddings.position_embedding.weight"][0]),
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "intermediate_size": header.shapes[prefix + "encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": header.count(prefix + "encoder.layers.#."),
        "pad_token_id": 1,
        "projection_dim": width,
    }


def _open_clip(header: Header, prefix: str, model: str) -> dict[str, Any]:
    """OpenCLIP's ViT-H and ViT-bigG; Stable Diffusion 2 leaves the last layer out."""
    vocabulary, width = header.shapes[prefix + "token_embedding.weight"]
    layers = header.count(prefix + "transformer.resblocks.#.")
    projected = header.shapes.get(prefix + "text_projection", (width, width))[1]
    # Diffusers passes over the 24th layer of a ViT-H by its name.
    left_out = prefix == _OPENCLIP and layers == 24
    return {
        **_text(vocabulary, width, header.shapes[prefix + "positional_embedding"][0]),
        "architectures": [model],
        "hidden_act": "gelu",
        "intermediate_size": header.shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": layers - left_out,
        "pad_token_id": 1,
        "projection_dim": projected,
    }


def _text(vocabulary: int, width: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": length,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _unet(header: Header) -> dict[str, Any]:
    """Levels, widths and depths of a UNet, by the shapes of its input blocks."""
    levels = _levels(header)
    shapes = header.shapes
    middle = header.count(f"{_UNET}middle_block.1.transformer_blocks.#.")
    attends = [bool(level.depth) for level in levels]
    keys = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    linear = len(next(shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight"))) == 2
    widths = [level.width for level in levels]
    # Where a level has no attention its depth counts for nothing but the middle block's, after the last one.
    depths = [level.depth or middle for level in levels]
    found: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if is_xl(header) else 96 if _is_v2(header) and _predicts_v(header) else 64,
        "in_channels": shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{_UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": levels[0].layers,
        "down_block_types": [("CrossAttn" if on else "") + "DownBlock2D" for on in attends],
        "up_block_types": [("CrossAttn" if on else "") + "UpBlock2D" for on in reversed(attends)],
        "cross_attention_dim": keys[1],
        "use_linear_projection": linear,
        "transformer_layers_per_block": depths,
        # Stable Diffusion 1 has eight heads, the later ones as many as fit with 64 channels each.
        "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,
    }
    added = shapes.get(f"{_UNET}label_emb.0.0.weight")
    if added is not None:
        found |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added[1],
        }
    return found


@dataclass
class _Level:
    width: int
    layers: int = 0
    depth: int = 0


def _levels(header: Header) -> list[_Level]:
    """The levels of a UNet from the picture inwards: width, residual blocks, depth of transformers."""
    shapes = header.shapes
    found = [_Level(shapes[f"{_UNET}input_blocks.0.0.weight"][0])]
    for i in range(1, header.count(f"{_UNET}input_blocks.#.")):
        block = f"{_UNET}input_blocks.{i}."
        if f"{block}0.op.weight" in shapes:
            found.append(_Level(0))
            continue
        level = found[-1]
        level.width = shapes[f"{block}0.in_layers.2.weight"][0]
        level.layers += 1
        level.depth = max(level.depth, header.count(f"{block}1.transformer_blocks.#."))
    return found


def _vae(header: Header) -> dict[str, Any]:
    levels = header.count(f"{_VAE}encoder.down.#.")
    widths = [header.shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    xl = is_xl(header)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": header.shapes[f"{_VAE}encoder.conv_in.weight"][1],
        "out_channels": header.shapes[f"{_VAE}decoder.conv_out.weight"][0],
        "latent_channels": header.shapes[f"{_VAE}quant_conv.weight"][0] // 2,
        "block_out_channels": widths,
        "layers_per_block": header.count(f"{_VAE}encoder.down.0.block.#."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 1024 if xl else 768 if _is_v2(header) else 512,
        "scaling_factor": 0.13025 if xl else 0.18215,
        "force_upcast": xl,
    }


def _tokenizers(index: Mapping[str, Any]) -> dict[str, str]:
    """Folder -> padding token of each tokenizer."""
    xl = "tokenizer_2" in index
    first = _PAD["clip"] if xl or index["scheduler"][1] == "PNDMScheduler" else _PAD["open_clip"]
    pads = {"tokenizer": first, "tokenizer_2": _PAD["open_clip"]}
    return {part: pad for part, pad in pads.items() if index.get(part, [None])[0] is not None}


def _write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer, whose merges come with open_clip; the vocabulary follows from them."""
    merges = _merges()
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [0x100 + i for i in range(256 - len(letters))]
    alphabet = [chr(code) for code in (*letters, *rest)]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _merges() -> list[str]:
    """The 48,894 merges of CLIP, in their order."""
    # Found without importing it: open_clip takes seconds, and nothing else of it is needed.
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError("CLIP's vocabulary is missing: pip install open_clip_torch")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 49152 - 256 - 2 + 1]

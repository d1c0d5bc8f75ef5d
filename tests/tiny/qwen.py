"""Tiny pipelines whose texts go through a language model, of the real classes."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .flux import filled
from .sd import WORDS, make_vae

WIDTH = 16
_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }} "
    "{{ message.content if message.content is string else message.content[0].text }} <|im_end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the tests, and one token for all others; knows how to write a chat."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = dict.fromkeys([*special, "user", "assistant", *WORDS, "zorin", "vim"])
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special[2:],
        chat_template=_TEMPLATE,
    )


def qwen_settings(vocabulary: int, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }


def make_z_image_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[600, 64, 64],
    )
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1, latent_channels=16).eval(),
        "text_encoder": filled(Qwen3Model(Qwen3Config(**qwen_settings(len(tokenizer))))),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def make_flux2_components(*, guidance: bool = False) -> dict[str, Any]:
    """A FLUX.2 klein, or with `guidance` a dev; that one's text encoder is another, but of the same use."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    # Pipelines read what its ninth to thirtieth layers say.
    encoder = Qwen3ForCausalLM(Qwen3Config(**qwen_settings(len(tokenizer), layers=31)))
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    with torch.no_grad():
        vae.bn.running_mean.add_(torch.randn(16) * 0.1)
        vae.bn.running_var.mul_(torch.rand(16) + 0.5)
    return {
        "transformer": filled(transformer),
        "vae": vae.eval(),
        "text_encoder": filled(encoder),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }

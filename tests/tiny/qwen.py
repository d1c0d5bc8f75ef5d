"""Tiny pipelines whose texts go through a language model, of the real classes."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from .flux import filled
from .sd import WORDS, make_vae

WIDTH = 16
_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }} {{ message.content }} <|im_end|> "
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
        axes_lens=[600, 32, 32],
    )
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1, latent_channels=16).eval(),
        "text_encoder": filled(Qwen3Model(Qwen3Config(**qwen_settings(len(tokenizer))))),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }

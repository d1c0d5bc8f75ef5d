"""A tiny T5, a tokenizer of whole words, and experts that PEFT itself saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.text import MoLEForSeq2SeqLM

WORDS = "the cat dog sees finds red blue big a b c d e f g h".split()
TARGETS = ["q", "v", "wi_0", "wi_1", "wo"]


def tiny_t5(seed: int = 0, **options: Any) -> T5ForConditionalGeneration:
    """A T5 whose answers depend on what it reads, with everything at random."""
    torch.manual_seed(seed)
    config = T5Config(
        **{
            **{"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
            **{"feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "decoder_start_token_id": 0},
            **options,
        }
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(0, 0.5)
    return model


def save_adapter(model: Any, folder: Path, seed: int, *, loudest: float = 1.0, **options: Any) -> Path:
    """A LoRA at random, as PEFT saves it; one of its ranks may be louder than the others."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        **{**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": 0.1}, **options},
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.4)
            if "lora_B" in name:
                parameter[:, 0].mul_(loudest)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> T5ForConditionalGeneration:
    return tiny_t5()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def adapters(base: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, folder / name, seed) for seed, name in enumerate(("one", "two", "three"), 1)]


Make = Callable[..., MoLEForSeq2SeqLM]


@pytest.fixture
def make(base: Any, tokenizer: Any, adapters: list[Path]) -> Make:
    """Makes a model with experts; gates are at random where `trained`."""

    def build(
        count: int = 2, config: MoLEConfig | None = None, *, trained: bool = True, **options: Any
    ) -> Any:
        model = MoLEForSeq2SeqLM(copy.deepcopy(base), tokenizer, config=config, **options)
        if count:
            model.load_experts(adapters[:count])
        if trained:
            torch.manual_seed(5)
            with torch.no_grad():
                for mixture in model.mixtures.values():
                    for parameter in mixture.parameters():
                        if parameter.numel() > 1:
                            parameter.normal_(0, 2.0)
        return model

    return build

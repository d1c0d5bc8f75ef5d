"""The starter's tokenizer and text encoder: CLIP's classes, with a vocabulary of the size the world needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import world

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32
"""Tokens of a prompt, start and end included; captions of three subjects with triggers need twenty."""

# Words users are likely to type beside the captions'; they get a token, not a meaning.
_EXTRA = (
    "a an the of and in on at with to photo picture drawing three two one left right middle red green blue "
    "yellow orange purple pink brown black white grey big small bright dark cute glossy flat 3d shiny style "
    "sks ohwx"
).split()


def words() -> list[str]:
    """Every word of the captions, triggers included, and a few more."""
    found = {*_EXTRA, *world.CLASSES, *world.TRIGGERS, *world.STYLES, *world.STYLES.values(), "pair"}
    for phrase in (*world.BACKGROUNDS.values(), *world.STYLE_WORDS.values()):
        found |= set(phrase.split())
    return sorted(found)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's format (vocab.json, merges.txt); each known word is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=[],
    )
    bpe.train_from_iterator([" ".join(words())] * 2, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [token for token in ("".join(pair) for pair in merges) if token not in tokens]
    tokens += [START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=MAX_TOKENS, bos_token=START, eos_token=END, pad_token=END, unk_token=END
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Four CLIP layers, 192 wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        projection_dim=192,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (N, 32), padded as the pipeline pads."""
    ids: torch.Tensor = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids

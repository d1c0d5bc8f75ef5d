"""The tokenizer: every word of the world is one token, and letters spell the rest."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mole_diffusion.starter.text.languages import TAUGHT, language
from mole_diffusion.starter.text.schooling import some_lesson
from mole_diffusion.starter.text.tasks import EXPERTS, UNSEEN
from mole_diffusion.starter.text.words import Example

#: Tokens of the longest source and target.
SOURCE, TARGET = 40, 16
PAD, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
# A word costs less than its letters.
_WORD, _LETTER = -1.0, -10.0
# Words of tasks as they once were: the base that comes along has rows for them.
_FORMER = "true false not"


def build_tokenizer() -> Tokenizer:
    """A unigram tokenizer (as T5's) whose words are those that the generators write."""
    rng = Random("tokenizer")
    texts = [text for _ in range(20000) for one in (some_lesson(rng),) for text in (one.source, one.target)]
    for task in (*EXPERTS.values(), *UNSEEN.values()):
        examples = [task.make(rng) for _ in range(3000)]
        texts += [text for one in examples for text in (one.source, one.target, *one.also)]
    for name in TAUGHT:
        texts.append(" ".join(language(name).words.values()))
    texts.append(_FORMER)
    counted = Counter(
        word for text in texts for word in re.findall(r"[a-z]+", text.replace("<extra_id_0>", ""))
    )
    words = sorted(word for word in counted if len(word) > 1)
    single = [*string.ascii_lowercase, *string.digits, *sorted(set(string.punctuation) - set("<>_`~@$^"))]
    vocabulary = [(token, 0.0) for token in _SPECIAL]
    vocabulary += [(f"▁{word}", _WORD) for word in words]
    vocabulary += (
        [(f"▁{one}", _WORD) for one in single] + [(one, _LETTER) for one in single] + [("▁", _LETTER)]
    )
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """(sources (n, SOURCE), targets (n, TARGET)) int16, padded; examples that are too long are left out."""
    sources = [one.ids for one in tokenizer.encode_batch([example.source for example in examples])]
    targets = [one.ids for one in tokenizer.encode_batch([example.target for example in examples])]
    kept = [
        pair
        for pair in zip(sources, targets, strict=True)
        if len(pair[0]) <= SOURCE and len(pair[1]) <= TARGET
    ]
    arrays = np.zeros((len(kept), SOURCE), np.int16), np.zeros((len(kept), TARGET), np.int16)
    for row, pair in enumerate(kept):
        for array, ids in zip(arrays, pair, strict=True):
            array[row, : len(ids)] = ids
    return arrays


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that `AutoTokenizer` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # The name that transformers 4 and 5 both know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<extra_id_0>"],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")

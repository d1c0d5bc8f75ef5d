"""What the texts say that a CLIP encodes: who listens, and which experts no prompt of a run names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

from torch import Tensor, nn

from mole_diffusion.core.experts import Expert
from mole_diffusion.core.phrases import unnamed

logger = logging.getLogger(__name__)

_ENCODE = "encode_token_weights"
#: Entry of a CONDITIONING, beside its text.
_MARK = "mole_unnamed"
_NEGATIVE = "negative"


class TextListener(Protocol):
    """Hears what a CLIP encodes."""

    def attach(self, clip_model: nn.Module) -> None:
        """The experts come onto ComfyUI's object of all text encoders together."""

    def detach(self, clip_model: nn.Module) -> None:
        """They go again."""

    def note(self, tokens: Mapping[str, Any], encoded: Tensor) -> Mapping[str, Any]:
        """A text was encoded.

        Args:
            tokens: name of a tokenizer -> sections of (token, weight, ...).
            encoded: (1, L, d).
        Returns:
            What goes into its CONDITIONING.
        """


def listen(clip_model: nn.Module, listeners: Sequence[TextListener]) -> None:
    """Tell listeners of every text from now on, until `stop_listening`."""
    whole: Any = clip_model
    stop_listening(clip_model)
    encode = whole.encode_token_weights

    def noting(tokens: Mapping[str, Any]) -> tuple[Any, ...]:
        encoded, pooled, *more = encode(tokens)
        entries: dict[str, Any] = dict(*more)
        for listener in listeners:
            entries.update(listener.note(tokens, encoded))
        return encoded, pooled, entries

    whole.__dict__[_ENCODE] = noting


def stop_listening(clip_model: nn.Module) -> None:
    """The reverse of `listen`; doing it twice does no harm."""
    clip_model.__dict__.pop(_ENCODE, None)


@dataclass(frozen=True, eq=False)
class _Unnamed:
    """What a check found in a text.

    Attributes:
        check: who looked.
        encoded: the text as it was encoded; nodes that mix texts make another one.
        names: experts that it does not name; None where it could not be read.
    """

    check: PromptCheck
    encoded: Tensor
    names: frozenset[str] | None


class PromptCheck:
    """Says which experts no prompt of a run names: without their words they are drawn without their subject.

    ComfyUI's text encoders get tokens, and samplers get texts that any node may have made. So each text is
    read when it is encoded, and what was found goes along with it, in the same CONDITIONING, to the sampler.

    Args:
        clip: ComfyUI's CLIP.
        experts: those that count.
        tell: called when a run begins with what is missing, in one line for each expert; and once with an
            empty text when nothing is any more.
    """

    def __init__(self, clip: Any, experts: Iterable[Expert], tell: Callable[[str], None]) -> None:
        self._tokenizers = clip.tokenizer
        self._triggers = {expert.name: expert.triggers for expert in experts if expert.triggers}
        self._tell = tell
        self._told = ""

    def attach(self, clip_model: nn.Module) -> None:
        """See `TextListener`; nothing is needed."""

    def detach(self, clip_model: nn.Module) -> None:
        """See `TextListener`."""

    def note(self, tokens: Mapping[str, Any], encoded: Tensor) -> Mapping[str, Any]:
        """See `TextListener`."""
        return {_MARK: _Unnamed(self, encoded, self._missing(tokens))}

    def begin_sampling(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """A wrapper of ComfyUI's `OUTER_SAMPLE`: look at the texts of a sampler before it runs."""
        missing = self._in_no_text(executor.class_obj.conds)
        lines = [f"No prompt names {name}: write '{self._triggers[name][0]}'." for name in missing]
        for line in lines:
            logger.warning("MoLE: %s", line)
        text = "\n".join(lines)
        if text or self._told:
            self._tell(text)
        self._told = text
        return executor(*arguments, **named)

    def _in_no_text(self, conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """Names of the experts that no text names, in order; none where a text is not known."""
        texts = [cond for kind, own in conds.items() if kind != _NEGATIVE for cond in own or ()]
        found = [self._found(cond) for cond in texts]
        known = [names for names in found if names is not None]
        if not known or len(known) < len(found):
            return []
        return [name for name in self._triggers if all(name in names for names in known)]

    def _found(self, cond: Mapping[str, Any]) -> frozenset[str] | None:
        mark = cond.get(_MARK)
        if not isinstance(mark, _Unnamed) or mark.check is not self:
            return None
        return mark.names if cond.get("cross_attn") is mark.encoded else None

    def _missing(self, tokens: Mapping[str, Any]) -> frozenset[str] | None:
        """The experts that none of the texts for the encoders names."""
        found = [self._unnamed(key, sections) for key, sections in tokens.items()]
        known = [names for names in found if names is not None]
        return frozenset.intersection(*known) if known else None

    def _unnamed(self, key: str, sections: Any) -> frozenset[str] | None:
        """Of one encoder's text; None where its tokenizer cannot say what was written."""
        tokenizer = tokenizer_of(self._tokenizers, key)
        if tokenizer is None:
            return None
        # Phrases go the same way, so that both have the tokenizer's own spaces and letters.
        text = _words(tokenizer, [token[0] for section in sections for token in section])
        phrases = {
            name: [_words(tokenizer, tokenizer(phrase)["input_ids"]) for phrase in own_phrases]
            for name, own_phrases in self._triggers.items()
        }
        return frozenset(unnamed(text, phrases))


def encoder_of(whole: Any, key: str) -> Any:
    """What ComfyUI's object of all text encoders, or of their tokenizers, has for one entry of the tokens."""
    return getattr(whole, f"clip_{key}", None) or getattr(whole, key, None)


def tokenizer_of(tokenizers: Any, key: str) -> Any:
    """The tokenizer itself of one entry of the tokens; None where it cannot say what was written."""
    tokenizer = getattr(encoder_of(tokenizers, key), "tokenizer", None)
    return tokenizer if hasattr(tokenizer, "decode") else None


def _words(tokenizer: Any, tokens: Iterable[Any]) -> str:
    """Tokens as text, without embeddings that stand for tokens."""
    numbers = [int(token) for token in tokens if isinstance(token, Integral)]
    words: str = tokenizer.decode(numbers, skip_special_tokens=True)
    return words

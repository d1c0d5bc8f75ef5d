"""Gates without training in ComfyUI: whose words a CLIP encodes, and what of them a MODEL reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mole_diffusion.core.auto import Auto
from mole_diffusion.core.calling import Calling
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.words import TokenPhrases, places_of

#: No token has this number: an embedding stands in its place.
_NO_TOKEN = -1


class ClipReader(Auto):
    """What the texts that a CLIP encodes say of the experts.

    ComfyUI gives its text encoders embeddings, and samplers texts that any node may have made. So it watches
    the CLIP while its experts are on it: the tokens of each encoder before it runs, and what comes out of all
    of them together, by which a denoiser's text is known again. Each text is read by itself: a style counts
    in the texts that name it and in the pictures of these.

    Args:
        clip: ComfyUI's CLIP.
        experts: those that count.
        encoders: part -> ComfyUI's name of the text encoder.
        order: names of all experts of the mixture, as its rows have them.
    """

    def __init__(
        self, clip: Any, experts: Iterable[Expert], encoders: Mapping[str, str], order: Sequence[str]
    ) -> None:
        self._experts = {expert.name: expert for expert in experts}
        self._order = tuple(order)
        self._calling = Calling()
        self._encoders = encoders
        self._handles: list[RemovableHandle] = []
        super().__init__({part: self._phrases(clip, name) for part, name in encoders.items()})

    def _phrases(self, clip: Any, name: str) -> TokenPhrases:
        """The experts' phrases in the tokens of one encoder."""
        tokenizer = getattr(clip.tokenizer, name).tokenizer
        return {
            expert: [
                tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in self._calling.of(one)
            ]
            for expert, one in self._experts.items()
        }

    def meet(self, named: frozenset[str]) -> None:
        """See `Auto`: a text that names nobody, such as a negative prompt, leaves things as they are."""
        if named:
            self.everywhere = self._calling.everywhere(named, self._experts)

    def attach(self, clip_model: nn.Module) -> None:
        """Watch what ComfyUI's text encoders read; its object of all of them together."""
        self.detach(clip_model)
        for part, name in self._encoders.items():
            encoder = getattr(clip_model, name)
            self._handles.append(encoder.register_forward_pre_hook(self._before(part)))

    def detach(self, clip_model: nn.Module) -> None:
        """Stop that; doing it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, part: str) -> Any:
        def before(encoder: nn.Module, args: tuple[Any, ...]) -> None:
            self.ids[part] = _numbers(args[0])

        return before

    def note(self, tokens: Mapping[str, Any], encoded: torch.Tensor) -> Mapping[str, Any]:
        """Note whose words the text is made of, whose sections come one after the other."""
        # Encoders write the same words into the same places.
        part, name = next(iter(self._encoders.items()))
        sections = tokens[name.removeprefix("clip_")]
        ids = _numbers([[token[0] for token in section] for section in sections]).reshape(1, -1)
        if encoded.shape[1] == ids.shape[1]:
            with torch.inference_mode(False):
                own = self.phrases[part]
                # Also for experts that do not count: the denoiser knows them by their rows.
                places = places_of(ids, {name: own.get(name, ()) for name in self._order})
                self.remember(encoded.clone(), places)
        return {}


def _numbers(sections: Sequence[Sequence[Any]]) -> torch.Tensor:
    """(B, L) numbers of tokens."""
    rows = [[int(one) if isinstance(one, Integral) else _NO_TOKEN for one in section] for section in sections]
    return torch.tensor(rows)

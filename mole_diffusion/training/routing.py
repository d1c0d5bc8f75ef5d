"""Which expert a token belongs to, where a collage and its caption say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mole_diffusion.architectures import TEXT_ENCODER, TOKENS, UNET
from mole_diffusion.training.losses import routing_loss
from mole_diffusion.training.workbench import Workbench, encoded_once


class Router:
    """The routing loss of the last forward: tokens of a concept are asked to choose the concept's expert.

    An image token belongs to the experts whose objects cover it, a text token to the concept whose words it
    is part of. All other tokens are left alone, and so are gates that pool the tokens.

    Args:
        bench: The shared workbench.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._known: dict[tuple[str, str, int], Tensor] = {}

    def loss(self, owners: Tensor, captions: Sequence[str]) -> Tensor | None:
        """The mean over all trained gates that tell tokens apart; None where there are none.

        Args:
            owners: (batch, experts, h, w), the share of each place that belongs to each expert.
            captions: The batch's captions; empty ones belong to nobody.
        """
        terms = []
        for part, mixture in self._bench.pipe.mixtures.items():
            for stream, weights in mixture.token_weights():
                tokens = weights.shape[1]
                if tokens == 1 or not weights.requires_grad:
                    continue
                if part != UNET:
                    belongs = self._words(encoded_once(captions), part, tokens)
                elif stream == TOKENS:
                    size = mixture.token_grid(tokens)
                    belongs = F.interpolate(owners, size=size, mode="area").flatten(2).transpose(1, 2)
                else:
                    belongs = self._words(captions, TEXT_ENCODER, tokens)
                if len(belongs) != len(weights):
                    continue  # Long texts are several rows of a text encoder's batch.
                terms.append(routing_loss(weights, belongs.to(weights.device)))
        return torch.stack(terms).mean() if terms else None

    def _words(self, captions: Sequence[str], part: str, tokens: int) -> Tensor:
        """(captions, tokens, experts): 1 where a token is part of the words of the expert's concept."""
        return torch.stack([self._row(caption, part, tokens) for caption in captions])

    def _row(self, caption: str, part: str, tokens: int) -> Tensor:
        key = caption, part, tokens
        if key not in self._known:
            self._known[key] = self._read(*key)
        return self._known[key]

    def _read(self, caption: str, part: str, tokens: int) -> Tensor:
        names = list(self._bench.concepts)
        row = torch.zeros(tokens, len(names))
        mentions = [m for prompt in self._bench.prompts if prompt.text == caption for m in prompt.mentions]
        for mention in mentions:
            # The first token marks the start of the text.
            first, last = (
                1 + self._bench.pipe.count_tokens(caption[:end], part) for end in (mention.start, mention.end)
            )
            row[first:last, names.index(mention.name)] = 1
        return row

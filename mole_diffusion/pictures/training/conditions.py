"""What the UNet is told of texts: token embeddings, and for SDXL the pooled text and the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.core.errors import TrainingError


@dataclass(frozen=True)
class TextCondition:
    """A batch of encoded texts.

    Attributes:
        tokens: (batch, tokens, d).
        pooled: (batch, p), of SDXL's second text encoder; None for Stable Diffusion 1 and 2.
        sizes: (1, 6): original height and width, top and left of the crop, target height and width; SDXL.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: list[int] | slice) -> TextCondition:
        """These rows as a batch of their own."""
        return TextCondition(
            self.tokens[rows], None if self.pooled is None else self.pooled[rows], self.sizes
        )

    def detach(self) -> TextCondition:
        """The same without gradient."""
        pooled = None if self.pooled is None else self.pooled.detach()
        return TextCondition(self.tokens.detach(), pooled, self.sizes)

    def after(self, empty: TextCondition) -> TextCondition:
        """Twice the batch: first the empty prompt (a single row, or as many), then this."""
        rows = len(self)
        tokens = torch.cat([empty.tokens.expand(rows, -1, -1), self.tokens])
        if self.pooled is None or empty.pooled is None:
            return TextCondition(tokens)
        return TextCondition(tokens, torch.cat([empty.pooled.expand(rows, -1), self.pooled]), self.sizes)

    def arguments(self) -> dict[str, Any]:
        """Arguments of a UNet's forward."""
        if self.pooled is None or self.sizes is None:
            return {"encoder_hidden_states": self.tokens}
        added = {"text_embeds": self.pooled, "time_ids": self.sizes.expand(len(self), -1)}
        return {"encoder_hidden_states": self.tokens, "added_cond_kwargs": added}


def encode(pipe: Any, texts: Sequence[str], size: tuple[int, int], device: torch.device) -> TextCondition:
    """Encode texts as the pipeline does, with gradient.

    Args:
        pipe: A pipeline of Stable Diffusion 1, 2 or XL.
        texts: Texts; the empty one is the prompt that classifier-free guidance moves away from.
        size: Height and width of the picture in pixels: SDXL is told so.
        device: Where to compute.

    Raises:
        TrainingError: if the UNet wants to know more than that (SDXL's refiner: an aesthetic score).
    """
    encoded = pipe.encode_prompt(
        list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if getattr(pipe.unet.config, "addition_embed_type", None) is None:
        return TextCondition(encoded[0])
    tokens, _, pooled, _ = encoded
    if pipe.config.force_zeros_for_empty_prompt:
        kept = torch.tensor([bool(text) for text in texts], device=tokens.device)
        tokens, pooled = tokens * kept[:, None, None], pooled * kept[:, None]
    sizes = torch.tensor([[*size, 0, 0, *size]], device=tokens.device, dtype=tokens.dtype)
    expected = pipe.unet.config.projection_class_embeddings_input_dim
    found = pooled.shape[1] + sizes.shape[1] * pipe.unet.config.addition_time_embed_dim
    if found != expected:
        raise TrainingError(
            f"gates of this UNet cannot be trained: its added conditions are {expected} wide, pooled text"
            f" and picture sizes are {found}; SDXL's refiner wants an aesthetic score, which no prompt has"
        )
    return TextCondition(tokens, pooled, sizes)

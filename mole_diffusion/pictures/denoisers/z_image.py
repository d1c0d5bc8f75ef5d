"""Z-Image as a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers.flow import FlowDenoiser

# Side of the pictures that the pipeline draws by itself.
_SIDE = 1024
# Tokens of a text at most, as the pipeline cuts it.
_TOKENS = 512


class ZImageDenoiser(FlowDenoiser):
    """A pipeline of Z-Image as a `Denoiser`.

    The network reads a list of texts as long as they are, counts time from noise to picture, and predicts the
    velocity in that direction.
    """

    @property
    def picture_size(self) -> tuple[int, int]:
        """See `FlowDenoiser`."""
        return self._size or (_SIDE, _SIDE)

    def guided(self, scale: float) -> float:
        """See `Denoiser.guided`; this family counts from 0 for none, others from 1."""
        return 1 + max(scale, 0.0)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts as the pipeline does; padded, with a mask, so that they are rows of one tensor."""
        encoded, _ = self._pipe.encode_prompt(list(texts), self.device, do_classifier_free_guidance=False)
        text: Tensor = encoded[0].new_zeros(len(encoded), _TOKENS, encoded[0].shape[-1])
        mask = torch.zeros(len(encoded), _TOKENS, dtype=torch.bool, device=text.device)
        for row, one in enumerate(encoded):
            text[row, : len(one)], mask[row, : len(one)] = one, True
        return Condition({"text": text, "mask": mask})

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """See `Denoiser.predict`."""
        told = zip(condition.tensors["text"], condition.tensors["mask"], strict=True)
        pictures = list(latents.to(self.dtype).unsqueeze(2))
        reversed_times = (1 - times.to(latents)).expand(len(latents))
        found: Any = self._pipe.transformer(
            pictures, reversed_times, [text[mask] for text, mask in told], return_dict=False
        )[0]
        return -torch.stack(found).squeeze(2)

"""Pure loss functions of gate training on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

#: Sharpness of the soft maximum over crops, in units of cosine similarity.
CROP_TEMPERATURE = 0.05
#: Temperature of the contrast between concepts, as CLIP was trained (a logit scale of about 1 / 0.07).
CONTRAST_TEMPERATURE = 0.07


def global_loss(views: Tensor, text: Tensor) -> Tensor:
    """`1 - cos` between views of pictures and the text of the whole prompt.

    Args:
        views: (batch, views, d), unit length.
        text: (batch, d), unit length.
    """
    return 1 - (views * text[:, None]).sum(dim=-1).mean()


def crop_similarities(
    crops: Tensor, texts: Tensor, references: Sequence[Tensor], against: str = "both"
) -> Tensor:
    """How well each crop shows each concept: its cosine with the nearest reference, with the text, or the
    mean of both.

    Args:
        crops: (batch, crops, d), unit length.
        texts: (concepts, d), unit length.
        references: For each concept (pictures, d), unit length; where there are none, the text counts.
        against: "references", "text" or "both".

    Returns:
        (batch, crops, concepts).
    """
    columns = []
    for text, pictures in zip(texts, references, strict=True):
        terms = []
        if against != "references" or not len(pictures):
            terms.append(crops @ text)
        if against != "text" and len(pictures):
            terms.append((crops @ pictures.T).amax(dim=-1))
        columns.append(torch.stack(terms).mean(dim=0))
    return torch.stack(columns, dim=-1)


def local_loss(similarities: Tensor, contrast_weight: float) -> tuple[Tensor, Tensor]:
    """Local guidance: every concept must be in some crop, and no crop may serve two concepts.

    For concept c, `w_c = softmax(s_c / 0.05)` over crops picks its crops softly. The first term is `1 -
    w_c . s_c`. The contrast is the cross entropy of `w_c . s_k` over the concepts k at temperature 0.07
    with c as the answer: where the crops of c look like k, features have bled, or one object is taken for
    both.

    Args:
        similarities: (batch, crops, concepts) from `crop_similarities`.
        contrast_weight: Weight of the contrast; it vanishes for a single concept.

    Returns:
        The weighted sum, and the contrast alone; scalars.
    """
    chosen = (similarities / CROP_TEMPERATURE).softmax(dim=1)
    seen = torch.einsum("bcn,bck->bnk", chosen, similarities)
    attraction = 1 - seen.diagonal(dim1=1, dim2=2).mean()
    count = seen.shape[-1]
    answers = torch.arange(count, device=seen.device).repeat(len(seen))
    contrast = F.cross_entropy(seen.reshape(-1, count) / CONTRAST_TEMPERATURE, answers)
    return attraction + contrast_weight * contrast, contrast


def released_loss(pictures: Tensor, prompt: Tensor, references: Sequence[Tensor], names: Tensor) -> Tensor:
    """CLIP formula of the authors' released code.

    `g = 1 - cos(I(y), T(prompt))`, `d_j = 1 - cos(I(y) - I(ref_j), T(prompt) - T(name_j))`, and the loss
    is `sum_j -log((2.5 - g - d_j) / 2)`. The text direction is taken for each concept (the released code
    keeps the first concept's, a bug). `g + d_j` can reach 4, where the logarithm has no value; its
    argument stops at 1e-3.

    Args:
        pictures: (batch, d), unit length.
        prompt: (batch, d), unit length.
        references: For each concept (pictures, d), unit length; their mean stands for `ref_j`.
        names: (concepts, d), unit length.

    Returns:
        A scalar, the mean over the batch.
    """
    distance = 1 - (pictures * prompt).sum(dim=-1)
    total = torch.zeros_like(distance)
    for reference, name in zip(references, names, strict=True):
        toward = F.cosine_similarity(pictures - reference.mean(dim=0), prompt - name, dim=-1)
        total = total - ((2.5 - distance - (1 - toward)) / 2).clamp_min(1e-3).log()
    return total.mean()

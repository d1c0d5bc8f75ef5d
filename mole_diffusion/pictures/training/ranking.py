"""Which of the pictures that experts drew are worth training on: judged by CLIP, and by how they cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_diffusion.pictures.training.clip_guidance import ClipGuide
from mole_diffusion.pictures.training.collage import Cutout

#: Grey behind objects that are cut out.
_GROUND = 0.5


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, in their own order."""
    return sorted(torch.topk(scores, min(count, len(scores))).indices.tolist())


def standing(terms: Sequence[Tensor]) -> Tensor:
    """The sum of several scores (n,), each in units of its own deviation, so that none outweighs another."""
    return torch.stack([(term - term.mean()) / term.std().clamp_min(1e-6) for term in terms]).sum(dim=0)


def agreement(objects: Tensor) -> Tensor:
    """Mean cosine of each object with all others, (n,), from features (n, d) of unit length."""
    return ((objects @ objects.T).sum(dim=1) - 1) / max(1, len(objects) - 1)


def rank_candidates(
    guide: ClipGuide, pictures: Tensor, cutouts: Sequence[Cutout], text: str, class_text: str
) -> Tensor:
    """How good pictures of one subject are, compared with one another.

    The sum of three standings by CLIP: the whole picture against the prompt (global), the object alone
    against its class (local), and the object against those of the other candidates (agreement): what an
    expert draws again and again is its subject. Objects that could not be cut out come last.

    Args:
        guide: the CLIP.
        pictures: (n, 3, H, W) in 0..1.
        cutouts: the objects of the pictures.
        text: the prompt in class words.
        class_text: the subject in class words.

    Returns:
        (n,), higher is better.
    """
    with torch.no_grad():
        whole = guide.pictures(pictures.to(guide.device))
        objects = torch.cat([guide.pictures(_alone(cutout)[None].to(guide.device)) for cutout in cutouts])
        asked, named = guide.texts([text, class_text])
        scores = standing([whole @ asked, objects @ named, agreement(objects)]).cpu()
    trusted = torch.tensor([cutout.trusted for cutout in cutouts])
    return torch.where(trusted, scores, scores - 100.0)


def _alone(cutout: Cutout) -> Tensor:
    """An object in the middle of a grey square, (3, side, side)."""
    height, width = cutout.pixels.shape[-2:]
    side = max(height, width)
    square = torch.full((3, side, side), _GROUND)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = cutout.pixels * cutout.alpha + _GROUND * (
        1 - cutout.alpha
    )
    return square

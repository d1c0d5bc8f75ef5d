"""Never score with the network that guided the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.pictures.protocol import Clip, Protocol
from mole_diffusion.evaluation.pictures.scorers import load_clip, tower_hashes
from mole_diffusion.starter.location import starter_dir

#: Methods that are prepared on the objective of `TrainingConfig`, which may ask CLIP.
_GUIDED = ("gates", "searched")


def guidance_clips(protocol: Protocol) -> dict[Clip, list[str]]:
    """The CLIPs that guide the preparation of this protocol's methods, and the methods each one guides."""
    found: dict[Clip, list[str]] = {}
    for method in protocol.methods:
        guidance = protocol.training_config(method).clip_guidance
        if method.kind in _GUIDED and guidance is not None:
            clip: Clip = guidance.model or f"local-dir:{starter_dir() / 'clip'}"
            found.setdefault(clip, []).append(method.name)
    return found


def refuse_guides(protocol: Protocol, scoring: Mapping[Clip, Iterable[str]]) -> None:
    """Compare the networks by their numbers, so that no other name or folder hides one.

    Args:
        protocol: the evaluation.
        scoring: the CLIPs that will score, with `scorers.tower_hashes` of each.

    Raises:
        ConfigError: one of them guided the training of one of the methods.
    """
    if not scoring:
        return
    for guide, methods in guidance_clips(protocol).items():
        towers = tower_hashes(load_clip(guide, torch.device("cpu"))[0])
        for clip, own in scoring.items():
            if towers & set(own):
                raise ConfigError(
                    f"metrics.clip {clip!r} holds the network that guides {methods} "
                    f"(training.clip {guide!r}): pictures that were optimised against a network fool it "
                    "first; score with another one"
                )

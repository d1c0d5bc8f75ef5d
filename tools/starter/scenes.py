"""Random scenes in batches: of the base, of each expert, of everything the codec and the judges must know."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from . import world
from .stage import BACKGROUNDS, HUES, SIDES, STYLES, SUBJECT, Placed, Stage

_TRIES = 10
_SUBJECT_KINDS = [world.CLASSES.index(kind) for kind in world.SUBJECTS]


class Dice:
    """Random numbers of one step, from its seed alone."""

    def __init__(self, device: torch.device, *seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device)
        value = 0
        for part in seed:
            value = (value * 1_000_003 + part + 1) % (2**63 - 1)
        self.generator.manual_seed(value)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in 0..1."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def below(self, high: int, *shape: int) -> Tensor:
        """Whole numbers in 0..high - 1."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def share(self, part: float, *shape: int) -> Tensor:
        """True with probability `part`."""
        return self.uniform(*shape) < part


class Director:
    """Draws lots for scenes of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, stage.device

    @cached_property
    def _held_out(self) -> Tensor:
        """Whether a set of kinds is held out, (K + 1, K + 1, K + 1); the last index is "no object"."""
        kinds = len(world.CLASSES)
        table = torch.zeros(kinds + 1, kinds + 1, kinds + 1, dtype=torch.bool)
        for a in range(kinds):
            for b in range(kinds):
                table[a, b, kinds] = a != b and world.held_out([world.CLASSES[a], world.CLASSES[b]])
                for c in range(b):
                    if len({a, b, c}) == 3:
                        held = world.held_out([world.CLASSES[k] for k in (a, b, c)])
                        table[a, b, c] = table[a, c, b] = held
        return table.to(self.device)

    def _kinds(self, dice: Dice, count: Tensor, own: Tensor | None, *, free: bool) -> tuple[Tensor, Tensor]:
        """Kinds (B, 3) and counts; `own` (B,) is put into a random slot; no held-out sets unless `free`."""
        batch, kinds = len(count), len(world.CLASSES)
        tries = dice.uniform(batch, _TRIES, kinds).argsort(-1)[..., :3]
        allowed = torch.ones(batch, _TRIES, dtype=torch.bool, device=self.device)
        if own is not None:
            slot = (dice.uniform(batch) * count).long()
            present = (tries == own[:, None, None]).any(-1)
            allowed &= ~present
            here = torch.arange(3, device=self.device)[None] == slot[:, None]
            tries = torch.where(here[:, None], own[:, None, None], tries)
        if not free:
            known = [torch.where(count[:, None] > s, tries[..., s], kinds) for s in range(3)]
            allowed &= ~self._held_out[known[0], known[1], known[2]]
        best = allowed.to(torch.uint8).argmax(1)
        chosen = tries[torch.arange(batch, device=self.device), best]
        # Where no try was allowed one object is left, which is always allowed.
        count = torch.where(allowed.any(1), count, 1)
        if own is not None:
            chosen[:, 0] = torch.where(count == 1, own, chosen[:, 0])
        return chosen, count

    def _place(self, dice: Dice, count: Tensor, kind: Tensor, drawing: Tensor, hue: Tensor) -> Placed:
        batch = len(count)
        layout = torch.zeros(4, 3, 4, device=self.device)
        jitter = torch.zeros(4, 2, device=self.device)
        for number, boxes in world.LAYOUTS.items():
            layout[number, : len(boxes)] = torch.tensor(boxes, device=self.device).float()
            jitter[number] = torch.tensor(world.JITTER[number], device=self.device).float()
        x, y, small, large = layout[count].unbind(-1)
        side = (small + dice.uniform(batch, 3) * (large - small + 1)).clamp(SIDES[0], SIDES[-1])
        shift = (dice.uniform(2, batch, 3) * 2 - 1) * jitter[count].T[..., None]
        scenes = Placed(
            count=count,
            kind=kind,
            drawing=drawing,
            hue=hue,
            side=(side / 2).long() * 2,
            x=(x + shift[0]).round().long(),
            y=(y + shift[1]).round().long(),
            background=dice.below(len(BACKGROUNDS), batch),
            style=torch.zeros_like(count),
        )
        return self.stage.clipped(scenes)

    def _count(self, dice: Dice, batch: int, shares: Sequence[float]) -> Tensor:
        bounds = torch.tensor(shares, device=self.device).cumsum(0)[:-1]
        return torch.bucketize(dice.uniform(batch), bounds, right=True) + 1

    def ordinary(self, dice: Dice, batch: int) -> Placed:
        """What the base learns: one to three objects in one flat style, no held-out set."""
        count = self._count(dice, batch, (0.3, 0.28, 0.42))
        kind, count = self._kinds(dice, count, None, free=False)
        drawing = dice.below(SUBJECT, batch, 1).expand(-1, 3)
        return self._place(dice, count, kind, drawing, torch.zeros_like(kind))

    def of_subject(self, dice: Dice, own: Tensor) -> Placed:
        """Each scene shows the subject of class `own` (B,), alone or beside flat objects."""
        count = self._count(dice, len(own), (0.4, 0.3, 0.3))
        kind, count = self._kinds(dice, count, own, free=False)
        flat = dice.below(SUBJECT, len(own), 1).expand(-1, 3)
        drawing = torch.where(kind == own[:, None], SUBJECT, flat)
        return self._place(dice, count, kind, drawing, torch.zeros_like(kind))

    def mixed(self, dice: Dice, batch: int, *, recoloured: float = 0.0, styled: float = 0.0) -> Placed:
        """Any objects: all flat, all three-dimensional, or both; any set.

        Args:
            recoloured: share of scenes whose objects' hues are turned.
            styled: share of scenes drawn in one of STYLES.
        """
        count = self._count(dice, batch, (0.25, 0.25, 0.5))
        kind, count = self._kinds(dice, count, None, free=True)
        mood = dice.uniform(batch, 1)
        share = torch.where(mood < 0.3, 0.0, torch.where(mood > 0.7, 1.0, 0.5))
        drawing = torch.where(dice.uniform(batch, 3) < share, SUBJECT, dice.below(SUBJECT, batch, 3))
        turned = dice.share(recoloured, batch, 1) if self.stage.hues == HUES else dice.share(0.0, batch, 1)
        hue = torch.where(turned, dice.below(HUES, batch, 3), 0)
        scenes = self._place(dice, count, kind, drawing, hue)
        in_style = dice.share(styled, batch)
        scenes.style = torch.where(in_style, 1 + dice.below(len(STYLES), batch), 0)
        return scenes

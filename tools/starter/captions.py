"""Captions of batches of scenes, put together from phrases as numbers, on the device that trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from . import text, world
from .stage import BACKGROUNDS, COLOURS, STYLES, Placed

NOTHING = 0


class Captions:
    """Phrases of one tokenizer; a caption is a row of their numbers, 0 being no phrase."""

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        self.phrases: list[str] = [""]
        self._number = {"": NOTHING}
        self.article = self._table(
            ["a pair of" if kind == "sunglasses" else "a" for kind in world.CLASSES], device
        )
        self.noun = self._table(world.CLASSES, device)
        self.trigger = self._table(world.TRIGGERS, device)
        subjects = list(world.SUBJECTS)
        own = [world.SUBJECTS[kind][0] if kind in subjects else "" for kind in world.CLASSES]
        self.own_trigger = self._table(own, device)
        self.colour = self._table([*COLOURS, ""], device)  # the last is NO_COLOUR
        self.background = self._table([world.BACKGROUNDS[name] for name in BACKGROUNDS], device)
        self.style = self._table(["", *(f"in {world.STYLES[name]} style" for name in STYLES)], device)
        self.style_words = self._table(["", *(world.STYLE_WORDS[name] for name in STYLES)], device)
        self.words = self._table([",", "and", "glossy 3d"], device)
        ids = [tokenizer(phrase, add_special_tokens=False).input_ids for phrase in self.phrases]
        longest = max(len(row) for row in ids)
        self.ids = torch.full((len(ids), longest), -1, device=device)
        for number, row in enumerate(ids):
            self.ids[number, : len(row)] = torch.tensor(row)
        self.start, self.end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)

    def _table(self, phrases: Sequence[str], device: torch.device) -> Tensor:
        for phrase in phrases:
            if phrase not in self._number:
                self._number[phrase] = len(self.phrases)
                self.phrases.append(phrase)
        return torch.tensor([self._number[phrase] for phrase in phrases], device=device)

    def compose(
        self,
        scenes: Placed,
        *,
        before: Tensor,
        colour: Tensor | None = None,
        glossy: Tensor | None = None,
        place: Tensor,
        style: Tensor,
        described: bool = False,
    ) -> Tensor:
        """Phrase numbers (B, P) of "a WORD cat, a boot and a clock on the beach in X style".

        Args:
            before: phrase before each noun, a trigger or none, (B, 3).
            colour: index into COLOURS of each object that is called by one, (B, 3).
            glossy: objects called "glossy 3d", (B, 3).
            place: whether the background is named, (B,).
            style: the style that is named, as `Placed.style`, (B,).
            described: name it in words a CLIP knows, not by its trigger.
        """
        columns = []
        for slot in range(3):
            there = slot < scenes.count
            if slot:
                last = scenes.count == slot + 1
                between = torch.where(last, self.words[1], self.words[0])
                columns.append(torch.where(there, between, NOTHING))
            kind = scenes.kind[:, slot]
            parts = [self.article[kind]]
            if glossy is not None:
                parts.append(torch.where(glossy[:, slot], self.words[2], NOTHING))
            if colour is not None:
                parts.append(self.colour[colour[:, slot]])
            parts += [before[:, slot], self.noun[kind]]
            columns += [torch.where(there, part, NOTHING) for part in parts]
        columns.append(torch.where(place, self.background[scenes.background], NOTHING))
        columns.append((self.style_words if described else self.style)[style])
        return torch.stack(columns, 1)

    def tokens(self, numbers: Tensor, empty: Tensor | None = None) -> Tensor:
        """Token ids (B, MAX_TOKENS) as the tokenizer gives them, padded; `empty` (B,) are empty captions."""
        ids = self.ids[numbers].flatten(1)
        if empty is not None:
            ids = torch.where(empty[:, None], -1, ids)
        order = (ids < 0).to(torch.uint8).argsort(dim=1, stable=True)
        ids = ids.gather(1, order)[:, : text.MAX_TOKENS - 2]
        ids = torch.where(ids < 0, self.end, ids)
        ids = F.pad(ids, (1, text.MAX_TOKENS - 1 - ids.shape[1]), value=self.end)
        ids[:, 0] = self.start
        return ids

    def text(self, numbers: Tensor) -> list[str]:
        """The captions in words."""
        rows = [" ".join(self.phrases[n] for n in row if n) for row in numbers.tolist()]
        return [row.replace(" ,", ",") for row in rows]

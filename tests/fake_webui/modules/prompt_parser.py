"""Prompts as the hosts take them apart: AND, and texts that change while a picture is drawn."""

import re
from functools import partial

_EDIT = re.compile(r"\[([^\[\]:]*):([^\[\]:]*):([0-9.]+)\]")


class SdConditioning(list):
    """Texts to be encoded together."""

    def __init__(self, texts, is_negative_prompt=False, copy_from=None):
        super().__init__(texts)
        kept = texts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(kept, "is_negative_prompt", False)


def get_multicond_prompt_list(prompts):
    """(for each prompt (number of its part, weight), the parts, part -> its number)"""
    numbers, indexes = {}, []
    for prompt in prompts:
        parts = [part.strip() for part in re.split(r"\bAND\b", prompt)]
        indexes.append([(numbers.setdefault(part, len(numbers)), 1.0) for part in parts])
    return indexes, SdConditioning(list(numbers), copy_from=prompts), numbers


def get_learned_conditioning_prompt_schedules(prompts, base_steps, hires_steps=None):
    """For each prompt: [last step, text], [last step, text], ...; "[from:to:0.5]" changes in the middle."""
    steps = hires_steps or base_steps
    schedules = []
    for prompt in prompts:
        ends = sorted({int(float(edit[2]) * steps) for edit in _EDIT.findall(prompt)} | {steps})
        schedules.append([[end, _EDIT.sub(partial(_edited, end, steps), prompt)] for end in ends])
    return schedules


def _edited(step, steps, edit):
    return edit[1 if step <= int(float(edit[3]) * steps) else 2]


def encode(model, prompts, steps):
    """For each prompt: its [last step, what the model made of the text], ..."""
    found = []
    for schedule in get_learned_conditioning_prompt_schedules(prompts, steps):
        texts = SdConditioning([text for _, text in schedule], copy_from=prompts)
        rows = model.get_learned_conditioning(texts)
        found.append([(end, row) for (end, _), row in zip(schedule, rows, strict=True)])
    return found


def encode_parts(model, prompts, steps):
    """The same for each part of each prompt."""
    indexes, parts, _ = get_multicond_prompt_list(prompts)
    encoded = encode(model, parts, steps)
    return [[encoded[number] for number, _ in own] for own in indexes]


def at_step(schedule, step):
    """What a schedule says at a step, counted from 0."""
    return next(row for end, row in schedule if step < end or end == schedule[-1][0])

"""Experts that no prompt of a run names are said when it begins."""

from typing import Any

import pytest
import torch
from conftest import part

from mole_diffusion.core.phrases import unnamed
from tools import encoded, sample

ALL = "a zorin boot, a vekka monster and a kipra clock on the beach"


def applied(starter: tuple[Any, Any, Any], experts: Any, without: str) -> tuple[Any, Any, list[str]]:
    """MODEL, CLIP and what is told."""
    told: list[str] = []
    return *part("apply").apply_experts(*starter[:2], experts, None, without, told.append), told


def prompts(clip: Any, *texts: str) -> Any:
    """As Conditioning (Combine) joins them."""
    return [one for text in texts for one in clip.encode_from_tokens_scheduled(clip.tokenize(text))]


@pytest.mark.parametrize("without", ["auto", "equal shares"])
def test_experts_that_no_prompt_names_are_said(
    without: str, starter: tuple[Any, Any, Any], experts: Any
) -> None:
    model, clip, told = applied(starter, experts, without)
    sample(model, encoded(clip, ALL), steps=1)
    assert told == []
    sample(model, encoded(clip, "a boot, a (Vekka monster:1.2) and zorin boots"), steps=1)
    assert told == ["No prompt names boot: write 'zorin boot'.\nNo prompt names clock: write 'kipra clock'."]
    # What counts is what a run reads, not what is encoded before it.
    sample(model, encoded(clip, ALL), steps=1)
    assert told[1:] == [""]
    sample(model, encoded(clip, ALL), steps=1)
    assert len(told) == 2


def test_every_text_of_a_prompt_counts_and_no_negative_one(
    starter: tuple[Any, Any, Any], experts: Any
) -> None:
    model, clip, told = applied(starter, experts, "equal shares")
    several = prompts(clip, "a zorin boot", "the kipra clock, a vekka monster")
    sample(model, (several, prompts(clip, "")), steps=1)
    assert told == []
    sample(model, (prompts(clip, "a zorin boot"), prompts(clip, ALL)), steps=1)
    assert "monster" in told[0]
    assert "clock" in told[0]


def test_experts_that_are_left_out_are_not_asked_for(starter: tuple[Any, Any, Any], experts: Any) -> None:
    model, clip, told = applied(starter, experts.masked(["boot", "clock"], {}), "equal shares")
    sample(model, encoded(clip, "a zorin boot"), steps=1)
    assert told == ["No prompt names clock: write 'kipra clock'."]


def test_nothing_is_said_of_texts_that_other_nodes_made(starter: tuple[Any, Any, Any], experts: Any) -> None:
    model, clip, told = applied(starter, experts, "equal shares")
    ((text, more),) = prompts(clip, "a castle")
    sample(model, ([[text * 0.5, dict(more)]], prompts(clip, "")), steps=1)
    bare = [[torch.clone(text), {"pooled_output": more["pooled_output"]}]]
    sample(model, (bare, prompts(clip, "")), steps=1)
    assert told == []


def test_clones_of_a_clip_know_it_too_and_others_do_not(starter: tuple[Any, Any, Any], experts: Any) -> None:
    model, clip, told = applied(starter, experts, "equal shares")
    sample(model.clone(), encoded(clip.clone(), "a castle"), steps=1)
    assert len(told) == 1
    assert "boot" in told[0]
    sample(starter[0], encoded(starter[1], "a castle"), steps=1)
    assert len(told) == 1


@pytest.mark.parametrize(
    "text", [ALL, "ZORIN BOOT", "zorin-boot", "zorin boots", "a zorin  boot!", "", "the boot"]
)
def test_the_check_is_that_of_the_command_line(
    text: str, starter: tuple[Any, Any, Any], experts: Any
) -> None:
    _, clip, _ = applied(starter, experts, "equal shares")
    ((_, more),) = prompts(clip, text)
    phrases = {expert.name: expert.triggers for expert in experts.experts}
    assert more["mole_unnamed"].names == frozenset(unnamed(" ".join(text.split()), phrases))

"""What must hold of `mixture="auto"` in the pipelines of every family whose denoiser is a transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pipeline_helpers import CLOSE, with_adapters
from torch import Tensor

from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.pictures.auto import AutoMixture, PromptReader

PHRASES = AutoMixture(phrases={"boot": "boot", "cat": "cat"})
BOTH = "a boot and a cat"

#: Draws with a pipeline: prompt, and options of the call.
Draws = Callable[..., Tensor]


def check_auto(
    pipe: Any, plain: Any, files: Mapping[str, Any], draw: Draws, guided: Mapping[str, Any], caplog: Any
) -> None:
    """All of it, with a pipeline that has the experts "boot" and "cat" and no trained gates."""
    assert pipe.usual_mixture == "auto"
    base = draw(pipe, BOTH, mixture="none")
    with caplog.at_level(logging.WARNING, logger="mole_diffusion"):
        _named(pipe, plain, files, draw, guided)
        _batches(pipe, draw, guided)
        _places(pipe, draw, guided)
    assert not [record for record in caplog.records if "attention" in record.message]
    torch.testing.assert_close(draw(pipe, BOTH, mixture="none"), base, rtol=0, atol=0)
    pipe.eject()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules()
    )
    torch.testing.assert_close(draw(pipe, BOTH), base, rtol=0, atol=0)


def _named(pipe: Any, plain: Any, files: Mapping[str, Any], draw: Draws, guided: Mapping[str, Any]) -> None:
    """The only expert that is named is that LoRA; nobody named is the base."""
    with_adapters(plain, dict(files), {"cat": 1.0})
    alone = draw(plain, "a cat on the beach", **guided)
    ours = draw(pipe, "a cat on the beach", mixture=PHRASES, **guided)
    torch.testing.assert_close(ours, alone, **CLOSE)
    nobody = draw(pipe, "the beach", mixture=PHRASES)
    torch.testing.assert_close(nobody, draw(pipe, "the beach", mixture="none"), **CLOSE)
    assert (ours - draw(pipe, "a cat on the beach", mixture="none", **guided)).abs().max() > 1e-3


def _batches(pipe: Any, draw: Draws, guided: Mapping[str, Any]) -> None:
    """A batch is its singles, also where the texts differ in length, and of several pictures each."""

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    styled = AutoMixture(phrases=PHRASES.phrases, styles=("cat",))
    for second, mixture in (("a cat on the red boot of the clock", PHRASES), ("a red boot", styled)):
        prompts = [BOTH, second]
        both = draw(pipe, prompts, mixture=mixture, generator=generators(1, 2), **_per_prompt(guided))
        for index, prompt in enumerate(prompts):
            single = draw(pipe, prompt, mixture=mixture, generator=generators(index + 1), **guided)
            torch.testing.assert_close(both[index : index + 1], single, **CLOSE)
    options = {"num_images_per_prompt": 2, "generator": generators(1, 3), **guided}
    several = draw(pipe, BOTH, mixture=PHRASES, **options)
    both = draw(pipe, BOTH, mixture=PHRASES, generator=generators(1), **guided)
    torch.testing.assert_close(several[:1], both, **CLOSE)


def _per_prompt(options: Mapping[str, Any]) -> dict[str, Any]:
    negative = options.get("negative_prompt")
    return {**options, **({} if negative is None else {"negative_prompt": [negative, negative]})}


def _places(pipe: Any, draw: Draws, guided: Mapping[str, Any]) -> None:
    """Once the layout is there, each expert has places of its own; a style has them all."""
    draw(pipe, BOTH, mixture=PHRASES, record_maps=True, **guided)
    rows = pipe.gate_weights().where(network="transformer", branch="prompt")
    image = [row for row in rows if not row.group.endswith(".context")]
    last = max(row.step for row in rows)
    assert last > 0
    weights = {row.weight for row in image if row.step == last}
    assert all(weight != 1.0 for weight in weights)
    assert {row.expert for row in image if row.weight > 0} == {"boot", "cat"}
    even = AutoSettings(style=1.0, style_inside=1.0, style_words=1.0, style_text=1.0)
    styled = AutoMixture(even, phrases=PHRASES.phrases, styles=("cat",))
    draw(pipe, BOTH, mixture=styled)
    rows = pipe.gate_weights().where(network="transformer", branch="prompt", expert="cat")
    assert rows
    assert all(row.weight == 1.0 for row in rows)


def words_of(pipe: Any, prompt: str, **options: Any) -> list[Tensor]:
    """(L, experts) whose words the tokens of an encoded prompt are."""
    with pipe.composing(mixture=PHRASES):
        pipe.encode_prompt(prompt=prompt, **options)
        reader = pipe.ensemble.choice.auto
        assert isinstance(reader, PromptReader)
        return [known.places for known in reader.texts]

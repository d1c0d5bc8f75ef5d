"""Evaluations on a FLUX.1: drawn with its own guidance, one negative prompt for all pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny.flux import FLUX_TARGETS, make_flux_components, write_transformer_lora
from tiny.sd import TRIGGERS

from mole_diffusion import ConfigError, FluxMoLEPipeline
from mole_diffusion.evaluation.pictures import run
from mole_diffusion.evaluation.pictures.protocol import load_protocol
from mole_diffusion.evaluation.results import read_rows

Write = Callable[..., Path]
METHODS = ["alone", {"name": "plain", "seeds": 1}, "nla", {"name": "few", "base": "gates"}]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The folder of a tiny FLUX.1, and a LoRA per expert."""
    folder = tmp_path_factory.mktemp("flux")
    components = make_flux_components(folder / "tokenizer", guidance=False)
    FluxPipeline(**components).save_pretrained(folder / "model")
    files = {
        name: write_transformer_lora(folder / f"{name}.safetensors", components, seed, 2, FLUX_TARGETS)
        for seed, name in enumerate(TRIGGERS, start=1)
    }
    return folder / "model", files


def of_flux(
    protocol_values: Callable[..., dict[str, Any]], flux: tuple[Path, dict[str, Path]]
) -> dict[str, Any]:
    model, files = flux
    values = protocol_values()
    experts = {name: {**one, "file": str(files[name])} for name, one in values["experts"].items()}
    return {"model": str(model), "experts": experts, "sets": [["boot", "cat"]], "size": 32}


def test_a_flux_is_evaluated(
    flux: tuple[Path, dict[str, Path]],
    write_protocol: Write,
    protocol_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    told = {**of_flux(protocol_values, flux), "methods": METHODS, "masks": [], "guidance": 2.0}
    protocol = load_protocol(write_protocol(**told))
    run.evaluate(protocol, tmp_path / "out", device=torch.device("cpu"), say=lambda line: None, shown=False)
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    counts = {name: sum(row["method"] == name for row in rows) for name in ("alone", "plain", "nla", "few")}
    assert counts == {"alone": 12, "plain": 4, "nla": 6, "few": 6}


def test_what_the_family_does_not_know_is_refused(
    flux: tuple[Path, dict[str, Path]],
    write_protocol: Write,
    protocol_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    told = {**of_flux(protocol_values, flux), "methods": ["nla"], "masks": [], "guidance_rescale": 0.7}
    protocol = load_protocol(write_protocol(**told))
    with pytest.raises(ConfigError, match=r"guidance_rescale is 0\.7, and FluxMoLEPipeline knows none"):
        run.evaluate(protocol, tmp_path, device=torch.device("cpu"), say=lambda line: None, shown=False)


def test_one_negative_prompt_serves_several_prompts(flux: tuple[Path, dict[str, Path]]) -> None:
    pipe = FluxMoLEPipeline.from_pretrained(flux[0])
    pipe.set_progress_bar_config(disable=True)

    def draw(negative: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        size = {"height": 32, "width": 32, "num_inference_steps": 2}
        asked = {"negative_prompt": negative, "true_cfg_scale": 3.0, "max_sequence_length": 16}
        drawn: torch.Tensor = pipe(
            ["a boot", "a cat"], generator=seeds, output_type="pt", **size, **asked
        ).images
        return drawn

    together = draw("dull")
    assert torch.equal(together, draw(["dull", "dull"]))
    assert not torch.equal(together, draw(["dull", "red"]))

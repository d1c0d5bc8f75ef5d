"""Gates and experts with a wrong fact are refused with the error of the diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import EXPERT, FOLDER, RIGHT, copy_experts, error_of, refusals, write_refusals
from safetensors.torch import save_file
from tiny.networks import LDMUNet
from torch import nn

from mole_diffusion import StableDiffusionMoLEPipeline
from mole_diffusion.starter import starter_experts

from .conftest import World

NAMES = ("boot", "monster", "clock")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What the pipeline refuses, and the pipeline's networks as AUTOMATIC1111 has them."""
    folder = tmp_path_factory.mktemp("refusals")
    pipe = StableDiffusionMoLEPipeline.from_starter(experts=list(NAMES))
    known = starter_experts()
    write_refusals(pipe, {name: known[name].path for name in NAMES}, folder)
    pipe.eject()
    copy_experts({name: known[name].path for name in NAMES}, folder / "Lora")
    predicted = pipe.scheduler.config.prediction_type
    unet = LDMUNet(pipe.unet)
    embedding = unet.time_embed
    unet.time_embed = nn.Sequential(embedding.linear_1, embedding.act, embedding.linear_2)
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=unet),
        cond_stage_model=SimpleNamespace(wrapped=SimpleNamespace(transformer=pipe.text_encoder)),
        parameterization={"epsilon": "eps", "v_prediction": "v"}[predicted],
    )
    return folder, model


def attach(model: Any, gates: str, lora_folder: Path, gates_folder: Path, **options: Any) -> Any:
    from mole_webui.attachment import Attachment
    from mole_webui.library import Library
    from mole_webui.settings import Settings

    settings = Settings.from_args([{"experts": dict.fromkeys(NAMES, 1.0), "gates": gates}])
    return Attachment(model, settings, Library(lora_folder, gates_folder), **options)


def test_the_same_error_as_in_the_diffusers_pipeline(world: World, oracle: tuple[Path, Any]) -> None:
    folder, model = oracle
    said, expert = refusals(folder)
    networks = (model.model.diffusion_model, model.cond_stage_model.wrapped.transformer)
    attach(model, RIGHT, folder / "Lora", folder / FOLDER).detach()
    for case, expected in said.items():
        if case != EXPERT:
            assert error_of(attach, model, case, folder / "Lora", folder / FOLDER) == expected, case
    changed = folder / "changed"
    copy_experts({name: folder / "Lora" / f"{name}.safetensors" for name in NAMES}, changed)
    copy_experts({expert: folder / FOLDER / f"{expert}.safetensors"}, changed)
    assert error_of(attach, model, "uniform", changed, folder / FOLDER) == said[EXPERT]
    # Headers may be wrong: the user's settings can say so.
    trusting = attach(model, "uniform", changed, folder / FOLDER, check_base=False)
    assert len(trusting.mixtures) == 2
    trusting.detach()
    stem = "lora_unet_double_blocks_0_img_mlp_fc1"
    foreign = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    save_file(foreign, changed / f"{expert}.safetensors")
    message = error_of(attach, model, "uniform", changed, folder / FOLDER)["message"]
    assert "was made for HunyuanVideo" in message
    assert "the base here is " in message
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in networks for m in n.modules())


@pytest.mark.parametrize(
    ("model", "predicted"),
    [
        (SimpleNamespace(parameterization="v"), "v_prediction"),
        (SimpleNamespace(parameterization="eps"), "epsilon"),
        (SimpleNamespace(), None),
        ("predictor.prediction_type=v_prediction", "v_prediction"),
        ("predictor.prediction_type=epsilon", "epsilon"),
        ("predictor.prediction_type=const", None),
        ("model_type.name=V_PREDICTION", "v_prediction"),
        ("model_type.name=EPS", "epsilon"),
    ],
    ids=str,
)
def test_what_a_host_says_of_its_prediction_type(world: World, model: Any, predicted: str | None) -> None:
    """AUTOMATIC1111, and Forge with its own backend and before."""
    from mole_webui.host import facts_of

    if isinstance(model, str):
        path, value = model.split("=")
        holder, name = path.split(".")
        inner = SimpleNamespace(**{holder: SimpleNamespace(**{name: value})})
        model = SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace(model=inner)))
    assert facts_of(model) == ({} if predicted is None else {"prediction_type": predicted})

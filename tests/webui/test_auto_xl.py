"""Experts without gates on an SDXL in Forge: both text encoders and the UNet are the pipeline's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny.sd import build, make_tokenizer, with_experts
from tiny.sdxl import make_xl_components, write_xl_lora
from torch import Tensor

from mole_diffusion import StableDiffusionXLMoLEPipeline
from webui_extension.library import Library
from webui_extension.session import Session

from .host_models import ForgeTinyXL

PROMPT, NEGATIVE = "a boot and a cat on the beach", "a dull beach"
IDS = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Texts(list[str]):
    """What hosts encode."""

    is_negative_prompt = False


def test_an_sdxl_draws_what_auto_draws_in_diffusers(tmp_path: Path) -> None:
    components = make_xl_components(make_tokenizer(tmp_path))
    files = {
        name: write_xl_lora(tmp_path / "Lora" / f"{name}.safetensors", components, seed, rank)
        for seed, (name, rank) in enumerate([("boot", 2), ("cat", 4)], start=1)
    }
    pipe = with_experts(build(StableDiffusionXLMoLEPipeline, components), files)
    model = ForgeTinyXL(build(StableDiffusionXLMoLEPipeline, components))
    session = Session(
        Library(tmp_path / "Lora", tmp_path), SimpleNamespace(), lambda: model, lambda p: [[[[PROMPT]]]]
    )
    p = SimpleNamespace(sd_model=model, all_prompts=[PROMPT], extra_generation_params={})
    args = [{"experts": ["boot", "cat"]}]
    session.process(p, args)
    session.process_batch(p, args)
    assert set(session.attachment.mixtures) == {"unet", "text_encoder", "text_encoder_2"}
    negative, prompt = Texts([NEGATIVE]), Texts([PROMPT])
    negative.is_negative_prompt = True
    with torch.no_grad():
        conds = [model.get_learned_conditioning(texts) for texts in (negative, prompt)]
        ours = _sampled(
            lambda x, time, text, y: model.unet(x, time.expand(2), context=text, y=y), pipe, conds
        )
        session.postprocess(p)
        with pipe.composing(mixture="auto"):
            cond, uncond, *pooled = pipe.encode_prompt(PROMPT, None, "cpu", 1, True, NEGATIVE)
            texts = [{"crossattn": uncond, "vector": pooled[1]}, {"crossattn": cond, "vector": pooled[0]}]
            expected = _sampled(lambda *given: _of_diffusers(pipe, *given), pipe, texts)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert "MoLE mixed by" not in p.extra_generation_params


def _sampled(unet: Any, pipe: Any, conds: list[dict[str, Tensor]]) -> Tensor:
    text, pooled = (torch.cat([cond[name] for cond in conds]) for name in ("crossattn", "vector"))
    sizes = pipe.unet.add_time_proj(IDS.flatten()).reshape(1, -1).expand(2, -1)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for time in (960.0, 660.0, 360.0):
        uncond, cond = unet(
            x.repeat(2, 1, 1, 1), torch.tensor(time), text, torch.cat([pooled, sizes], 1)
        ).chunk(2)
        x = x - 0.2 * (uncond + 5.0 * (cond - uncond))
    return x


def _of_diffusers(pipe: Any, x: Tensor, time: Tensor, text: Tensor, y: Tensor) -> Tensor:
    pooled = y[:, : y.shape[1] - 6 * pipe.unet.config.addition_time_embed_dim]
    added = {"text_embeds": pooled, "time_ids": IDS.expand(2, -1)}
    return pipe.unet(x, time, encoder_hidden_states=text, added_cond_kwargs=added).sample

"""Runs in a process of its own: a host's own text engine, prompt parser and sampler around a tiny UNet.

    python drive_host_code.py CHECKOUT

CHECKOUT is AUTOMATIC1111's or Forge's. Only what would load a web UI (settings, memory, hijacks) is stood in
for. Prints, for each prompt, how far its picture is from the pipeline's with `mixture="auto"`, and what the
extension said.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from tiny.sd import build, make_components, with_experts, write_loras
from torch import Tensor, nn

from mole_diffusion import StableDiffusionMoLEPipeline

EXTENSION = Path(__file__).resolve().parents[2] / "webui_extension"
TIMES = (960.0, 660.0, 360.0)
#: name -> (prompts, negative prompt)
CASES = {
    "plain": (["a boot and a cat on the beach"], ""),
    "negative": (["a boot and a cat on the beach"], "a dull red beach"),
    "one": (["a cat on the beach"], "dull"),
    "weighed": (["a (boot:1.3) and a [cat] on the beach"], "(dull:1.2)"),
    "long": (["a boot on the red beach and the dull snow on the beach and a cat"], "dull"),
    "long negative": (["a boot and a cat"], "a dull red beach and the dull snow on the dull beach"),
    "break": (["a boot BREAK a cat"], ""),
    "edited": (["a [boot:clock:0.4] and a cat"], ""),
    "alternating": (["a [boot|clock] and a cat"], ""),
    "and": (["a boot and a clock AND a cat"], ""),
    "long and": (["a boot and a clock AND a cat on the beach and the snow on the red beach"], "dull"),
    "batch": (["a boot and a cat", "a clock and a boot"], "dull"),
    "batch and": (["a boot AND a cat", "a boot AND a cat"], ""),
}


class Stub(ModuleType):
    """A module of which everything can be had."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def stub(name: str, **content: Any) -> ModuleType:
    module = Stub(name)
    vars(module).update(content)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), leaf, module)
    return module


class Older(nn.Module):
    """A text encoder as older transformers, which the hosts have, arrange it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


class Params:
    """What callbacks are given; only what the denoiser reads back."""

    def __init__(self, x: Any, image: Any, sigma: Any, step: int, steps: int, *texts: Any) -> None:
        self.x, self.image_cond, self.sigma = x, image, sigma
        self.text_cond, self.text_uncond, *_ = texts


class After:
    def __init__(self, x: Any, *_: Any) -> None:
        self.x = x


def prepare(checkout: Path) -> Any:
    """The host's package on the path, without what would load a web UI; its settings."""
    sys.path.insert(0, str(checkout))
    opts = SimpleNamespace(
        emphasis="Original", use_old_emphasis_implementation=False, comma_padding_backtrack=20,
        CLIP_stop_at_last_layers=1, textual_inversion_add_hashes_to_infotext=False, pad_cond_uncond=False,
        pad_cond_uncond_v0=False, batch_cond_uncond=True, s_min_uncond_all=False, skip_early_cond=-1.0,
        live_preview_content="Prompt", use_old_scheduling=False,
    )  # fmt: skip
    state = SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, sampling_steps=len(TIMES))
    stub("modules.shared", opts=opts, state=state)
    stub("modules.devices", device=torch.device("cpu"), test_for_nans=lambda *_: None)
    given = {"CFGDenoiserParams": Params, "CFGDenoisedParams": After, "AfterCFGCallbackParams": After}
    stub("modules.script_callbacks", **given)
    stub("modules.sd_samplers_common", apply_refiner=lambda *_: False)
    stub("modules.sd_hijack")
    if (checkout / "backend").is_dir():
        memory = {"text_encoder_device": lambda: torch.device("cpu"), "get_free_memory": lambda *_: 1e12}
        stub("backend.memory_management", signal_empty_cache=False, **memory)
        stub("backend.operations")
        stub("backend.utils")
        stub("backend.args", args=SimpleNamespace(disable_gpu_warning=True), dynamic_args={})
    return opts


class Host:
    """A host's model around copies of the pipeline's networks."""

    def __init__(self, pipe: Any, checkout: Path) -> None:
        from webui.host_models import CHUNK, A1111Tiny, ForgeTiny

        self.forge = (checkout / "backend").is_dir()
        self.model = ForgeTiny(pipe) if self.forge else A1111Tiny(pipe)
        encoder = self.model.encoder
        if self.forge:
            engines = importlib.import_module("backend.text_processing.classic_engine")
            holder = self.model._clip.clip_l
            if not hasattr(holder.transformer, "text_model"):
                holder.transformer = Older(holder.transformer)
            self.engine = engines.ClassicTextProcessingEngine(holder, pipe.tokenizer, chunk_length=CHUNK)
            self.model.text_processing_engine = self.engine
        else:
            engines = importlib.import_module("modules.sd_hijack_clip")
            wrapped = self.model.cond_stage_model.wrapped
            wrapped.tokenizer = pipe.tokenizer
            nobody = SimpleNamespace(find_embedding_at_position=lambda *_: (None, None))
            hijack = SimpleNamespace(embedding_db=nobody, fixes=None, extra_generation_params={})
            self.engine = engines.FrozenCLIPEmbedderWithCustomWords(wrapped, hijack)
            self.engine.chunk_length = CHUNK
            self.model.cond_stage_model = self.engine
            assert self.model.encoder is encoder
        type(self.model).get_learned_conditioning = lambda model, texts: self.engine(texts)

    def predict(self, p: Any, x: Tensor, time: float, step: int) -> Tensor:
        """What the host's own code makes of conditional and unconditional texts."""
        parser = importlib.import_module("modules.prompt_parser")
        times = torch.full((len(x),), time)
        if self.forge:
            sampling = importlib.import_module("backend.sampling.sampling_function")
            conditions = importlib.import_module("backend.sampling.condition")
            composition, cond = parser.reconstruct_multicond_batch(p.c, step)
            uncond = conditions.compile_conditions(parser.reconstruct_cond_batch(p.uc, step))
            cond = conditions.compile_weighted_conditions(cond, composition)
            model = SimpleNamespace(
                memory_required=lambda shape: 1.0,
                apply_model=lambda x, t, c_crossattn, **_: self.model.unet(x, t, context=c_crossattn),
            )
            return sampling.sampling_function_inner(model, x, times, uncond, cond, 5.0)
        denoisers = importlib.import_module("modules.sd_samplers_cfg_denoiser")
        shared = importlib.import_module("modules.shared")
        shared.sd_model = SimpleNamespace(
            cond_stage_key="txt",
            model=SimpleNamespace(conditioning_key="crossattn"),
            cond_stage_model_empty_prompt=self.empty,
        )

        class Denoiser(denoisers.CFGDenoiser):
            inner_model = staticmethod(
                lambda x, sigma, cond: self.model.unet(x, sigma, context=cond["c_crossattn"][0])
            )

        denoiser = Denoiser(SimpleNamespace(sampler_extra_args={}))
        denoiser.step, denoiser.total_steps, denoiser.p = step, len(TIMES), p
        return denoiser(x, times, p.uc, p.c, 5.0, 0.0, torch.zeros(len(x), 5, 1, 1))


class Generation:
    """A host's `p`, of which the extension sees only this."""

    cached_c: ClassVar[list[Any]] = [None, None]
    cached_uc: ClassVar[list[Any]] = [None, None]

    def __init__(self, model: Any, prompts: list[str], negative: str) -> None:
        self.sd_model, self.prompts, self.all_prompts = model, prompts, prompts
        self.negative_prompts = [negative] * len(prompts)
        self.steps, self.comments = len(TIMES), []
        self.extra_generation_params: dict[str, Any] = {}

    def comment(self, text: str) -> None:
        self.comments.append(text)


def main(checkout: Path) -> None:
    opts = prepare(checkout)
    stub("modules.paths", models_path="", data_path="")
    stub("modules.scripts", Script=object, AlwaysVisible=object())
    stub("modules.sd_models")
    stub("modules.ui_components", InputAccordion=None, ToolButton=None)
    importlib.import_module("modules.shared").cmd_opts = SimpleNamespace(lora_dir="")
    folder = Path(tempfile.mkdtemp())
    components = make_components(folder)
    # Random weights have a mean of zero there, by which the hosts' emphasis divides.
    torch.nn.init.constant_(components["text_encoder"].final_layer_norm.bias, 0.2)
    files = write_loras(folder / "Lora", components, {"boot": 2, "cat": 4, "clock": 3}, textless=["clock"])
    pipe = with_experts(build(StableDiffusionMoLEPipeline, components), files)
    host = Host(build(StableDiffusionMoLEPipeline, components), checkout)
    with torch.no_grad():
        host.empty = host.engine([""])
        spec = importlib.util.spec_from_file_location("script", EXTENSION / "scripts" / "mole.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        library = script.Library(folder / "Lora", folder / "gates")
        session = script.Session(library, opts, lambda: host.model, script._passes)
        found = {}
        for pad in (False, True):
            opts.pad_cond_uncond = pad
            for name, (prompts, negative) in CASES.items():
                found[f"{name}{', padded' if pad else ''}"] = _case(session, host, pipe, prompts, negative)
    print(json.dumps(found))


def _case(session: Any, host: Host, pipe: Any, prompts: list[str], negative: str) -> dict[str, Any]:
    from webui.test_auto import drawn

    parser = importlib.import_module("modules.prompt_parser")
    p = Generation(host.model, prompts, negative)
    args = [{"experts": ["boot", "cat", "clock"]}]
    session.process(p, args)
    session.process_batch(p, args)
    acting: list[Any] = []
    network: nn.Module = host.model.unet
    handle = network.register_forward_hook(lambda *_: acting.append(_acting(session)))
    negatives = parser.SdConditioning(p.negative_prompts, is_negative_prompt=True)
    p.uc = parser.get_learned_conditioning(host.model, negatives, p.steps)
    p.c = parser.get_multicond_learned_conditioning(host.model, parser.SdConditioning(prompts), p.steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(len(prompts), 1, 1, 1)
    for step, time in enumerate(TIMES):
        x = x - 0.2 * host.predict(p, x, time, step)
    handle.remove()
    session.postprocess(p)
    expected = torch.cat([drawn(pipe, prompt, negative) for prompt in prompts])
    return {
        "gap": float((x - expected).abs().max()),
        "said": [one for one in p.comments if "shares" in one],
        "mixed": p.extra_generation_params.get("MoLE mixed by"),
        "acting": acting,
        "clean": not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()),
    }


def _acting(session: Any) -> list[str]:
    """Which experts have image tokens, row by row."""
    weights = session.attachment.mixtures["unet"].live_weights()
    mean = torch.stack([one for name, one in weights.items() if not name.endswith(".context")]).mean(0)
    names = ("boot", "cat", "clock")
    return [" ".join(name for name, one in zip(names, row, strict=True) if one > 0) for row in mean.tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

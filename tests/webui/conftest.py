"""The extension inside the fake host, in both flavours, with LoRA and gates files on disk."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_diffusion import MoLEConfig, inject, load_expert, save_gates
from mole_diffusion.core.networks import map_network

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "fake_webui"
EXTENSION = ROOT / "webui_extension"
EXPERTS = ("dog", "cat", "animals/fox")

sys.path.insert(0, str(FAKE))


@dataclasses.dataclass
class World:
    """A running fake host with the extension.

    Attributes:
        flavour: "a1111" or "forge".
        host: its modules.
        script: the extension's script module as the host loaded it.
        models: name -> checkpoint.
        folder: holds `Lora` and `mole`.
    """

    flavour: str
    host: SimpleNamespace
    script: Any
    models: dict[str, Any]
    folder: Path

    @property
    def session(self) -> Any:
        return self.script._session

    def draw(self, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        """One generation; settings as the API takes them, None for the panel switched off."""
        args = [False] if settings is None else [settings]
        p = self.processing(args, **options)
        return self.host.processing.process_images(p)

    def processing(self, args: list[Any], *, img2img: bool = False, **options: Any) -> Any:
        kinds = self.host.processing
        kind = kinds.StableDiffusionProcessingImg2Img if img2img else kinds.StableDiffusionProcessingTxt2Img
        return kind(scripts=self.host.scripts.ScriptRunner(img2img), script_args={"mole": args}, **options)

    def picture(self, settings: dict[str, Any] | None = None, **options: Any) -> Tensor:
        """The first picture; fails if a callback failed."""
        processed = self.draw(settings, **options)
        assert not self.host.script_callbacks.failures
        return processed.images[0]

    def networks(self) -> list[nn.Module]:
        return [network for model in self.models.values() for network in (model.unet, model.encoder)]

    def is_clean(self) -> bool:
        """No hook of any kind on any module of any checkpoint."""
        return not any(
            module._forward_hooks or module._forward_pre_hooks
            for network in self.networks()
            for module in network.modules()
        )


def make_lora(model: Any, seed: int, *, text: bool = True) -> dict[str, Tensor]:
    """A LoRA that visibly changes both networks, in diffusers names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for part, network in (("unet", model.unet), ("text_encoder", getattr(model.encoder, "text_model", None))):
        if network is None or (part != "unet" and not text):
            continue
        for site in map_network(network, part).sites:
            if site.kind != "attention" or "proj_" in site.name.rpartition(".")[2]:
                continue
            out, inputs = network.get_submodule(site.path).weight.shape[:2]
            state[f"{part}.{site.name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * 0.3
            state[f"{part}.{site.name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    return state


def train(model: Any, loras: Path, names: tuple[str, ...], target: Path, config: MoLEConfig) -> None:
    """A gates file as training writes it, with random gates."""
    mixtures = {}
    with torch.inference_mode(False):
        experts = [load_expert(loras / f"{name}.safetensors") for name in names]
        for part, network in (("unet", model.unet), ("text_encoder", model.encoder.text_model)):
            mixture = inject(network, experts, config, part=part)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in mixture.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
            mixtures[part] = mixture
        save_gates(target, mixtures)
    for mixture in mixtures.values():
        mixture.eject()


@functools.cache
def files(flavour: str) -> dict[Path, bytes]:
    """LoRA and gates files for the other model of a flavour; they are made once for all worlds."""
    model = importlib.import_module("toys").FLAVOURS[flavour](2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Lora" / "animals").mkdir(parents=True)
        for seed, expert in enumerate(EXPERTS):
            save_file(make_lora(model, 10 + seed), folder / "Lora" / f"{expert}.safetensors")
        for gates, config in (("both", MoLEConfig()), ("pooled", MoLEConfig(pooling="mean"))):
            train(model, folder / "Lora", ("cat", "dog"), folder / "mole" / f"{gates}.safetensors", config)
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=["a1111", "forge"])
def flavour(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def world(flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(flavour, tmp_path, monkeypatch)


def make_world(
    flavour: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, gates: bool = True, **model: Any
) -> World:
    toys = importlib.import_module("toys")
    names = ("shared", "scripts", "script_callbacks", "processing", "sd_models", "paths")
    host = SimpleNamespace(**{name: importlib.import_module(f"modules.{name}") for name in names})
    host.sd_models.clear()
    host.scripts.scripts_data.clear()
    host.script_callbacks.clear()
    for kind in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
        for name, value in vars(getattr(host.processing, kind)).items():
            if name.startswith("cached_"):
                value[:] = [None, None]
    host.shared.state.interrupted = False
    host.shared.opts.data.clear()
    host.shared.cmd_opts.lora_dir = str(folder / "Lora")
    monkeypatch.setattr(host.paths, "models_path", str(folder))
    monkeypatch.setattr(host.paths, "data_path", str(folder / "data"))
    models = {"base": toys.FLAVOURS[flavour](1, **model), "other": toys.FLAVOURS[flavour](2)}
    host.sd_models.checkpoints.update(models)
    host.shared.sd_model = models["base"]
    for path, content in files(flavour).items():
        if gates or path.parts[0] == "Lora":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    script = host.scripts.load_script(str(EXTENSION / "scripts" / "mole.py"))
    host.script_callbacks.call("before_ui")
    return World(flavour, host, script, models, folder)

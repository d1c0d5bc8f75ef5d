"""Transformers: fused, in another order of names and of tokens, and the same numbers as diffusers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models
import pytest
import torch
from conftest import part
from safetensors.torch import load_file
from torch import Tensor
from transformer_models import (
    load_anima,
    load_flux,
    load_flux2,
    load_krea2,
    load_qwen_image,
    load_sd3,
    load_z_image,
)

from mole_diffusion.core.errors import GateMismatchError, InjectionError
from mole_diffusion.core.experts import Expert, load_expert
from mole_diffusion.core.export import lora_tensors
from mole_diffusion.core.networks import map_network
from tools import hooks

TOLERANCE = 1e-4


LOADERS = {
    "flux": lambda folder: load_flux(folder, "flux"),
    "chroma": lambda folder: load_flux(folder, "chroma"),
    "flux2": load_flux2,
    "qwen_image": load_qwen_image,
    "sd3": load_sd3,
    "z_image": load_z_image,
    # Newer cores have them.
    **({"krea2": load_krea2} if hasattr(comfy.supported_models, "Krea2") else {}),
    **({"anima": load_anima} if hasattr(comfy.supported_models, "Anima") else {}),
}


@pytest.fixture(scope="module", params=LOADERS)
def family(request: pytest.FixtureRequest, oracle: Path) -> tuple[Path, Any]:
    folder = oracle / "transformers" / request.param
    with torch.inference_mode():
        return folder, LOADERS[request.param](folder)


def skip_what_the_core_cannot_read(model: Any, stored: dict[str, Tensor]) -> None:
    """Files of FLUX.2 under the names of diffusers, of which cores read a part."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    matrices = {key.rsplit(".", 2)[0] for key in stored if ".lora_" in key}
    if isinstance(model.model, getattr(comfy.model_base, "Flux2", ())) and matrices - set(known):
        pytest.skip(f"this ComfyUI does not know {min(matrices - set(known))}")


def experts_of(folder: Path) -> Any:
    found = part("experts").ExpertSet()
    for name in "abc":
        found = found.with_expert(load_expert(folder / f"{name}.safetensors"))
    return found


def run(model: Any, answers: dict[str, Tensor], **others: Any) -> Tensor:
    comfy.model_management.load_models_gpu([model])
    told: dict[str, Any] = {"y": answers["pooled"]} if "pooled" in answers else {}
    told["num_tokens"] = answers["text"].shape[1]
    network, latents = model.model.diffusion_model, answers["latents"]
    if hasattr(network, "distilled_guidance_layer"):
        told["guidance"] = torch.zeros(2)
    elif "guidance" in answers:
        told["guidance"] = answers["guidance"]
    if getattr(model.model.latent_format, "latent_dimensions", 2) == 3:  # those of videos
        latents = latents.unsqueeze(2)
    times = model.model.model_sampling.timestep(answers["timesteps"])
    found: Tensor = network(latents, times, context=answers["text"], **told, **others)
    return found.squeeze(2)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < TOLERANCE * expected.abs().max())


def test_numbers_are_those_of_diffusers(family: tuple[Path, Any], starter: tuple[Any, Any, Any]) -> None:
    folder, model = family
    answers = load_file(folder / "answers.safetensors")
    assert close(run(model, answers), answers["base"])
    experts, gates = experts_of(folder), part("experts").GatesFile(folder / "gates.safetensors")
    apply = part("apply").apply_experts
    left = torch.zeros(64, 96)
    left[:, :48] = 1
    chosen = {
        "gated": experts,
        "regions": experts.masked(["a", "c"], {"c": 0.5}).in_regions({"a": left}),
        "alone": experts.masked(["b"], {}),
    }
    for name, some in chosen.items():
        mixed, _ = apply(model, starter[1], some, gates)
        assert not close(answers[name], answers["base"])
        assert close(run(mixed, answers), answers[name]), name
        applied = part("binding").Applied
        assert isinstance(mixed.get_attachment("mole"), applied)
        assert set(part("apply").applied_to(mixed).ensemble.mixtures) == {"transformer"}
    # Without gates all count alike, and the bare model is what it was, twice in a row.
    for _ in range(2):
        mixed, _ = apply(model, starter[1], experts, None)
        assert not close(run(mixed, answers), answers["base"])
        assert torch.equal(run(model, answers), run(model, answers))
        assert close(run(model, answers), answers["base"])
        assert hooks(model.model.diffusion_model) == 0


def test_words_find_the_places_that_they_find_in_diffusers(
    family: tuple[Path, Any], starter: tuple[Any, Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Without gates: while the layout forms attention is read, behind it each place is somebody's."""
    folder, model = family
    answers = load_file(folder / "answers.safetensors")
    mixed, _ = part("apply").apply_experts(model, starter[1], experts_of(folder), None, "auto")
    reader = part("apply").applied_to(mixed).ensemble.choice.auto
    if folder.name == "anima":
        assert reader is None
        assert "attention of this MODEL is not read here" in caplog.text
        return
    reader.remember(answers["text"], answers["words"])
    ours = mixed.model_options["transformer_options"]

    def drawn(some: Any, options: Any) -> list[Tensor]:
        told = [{**answers, "timesteps": time.expand(2)} for time in answers["times"]]
        return [run(some, one, transformer_options=options) for one in told]

    expected = [answers[f"auto_{step}"] for step in range(len(answers["times"]))]
    assert all(map(close, drawn(mixed, ours), expected))
    assert not any(map(close, drawn(model, ours), expected))
    assert not caplog.records
    # Where another node's attention takes the place of ours, nobody has a place of its own, and that is said.
    assert not close(drawn(mixed, {})[-1], expected[-1])
    assert "cannot be read" in caplog.text
    assert all(map(close, drawn(mixed, ours), expected))


def test_gates_made_here_are_those_for_diffusers(family: tuple[Path, Any]) -> None:
    """The header says the same of the base: names and shapes of its matrices, whoever fuses them."""
    folder, model = family
    from mole_diffusion.core.checkpoint import read_gates_header
    from mole_diffusion.core.fitting import fingerprint

    network = model.model.diffusion_model
    ours = fingerprint(network, map_network(network))
    theirs = read_gates_header(folder / "gates.safetensors").parts["transformer"]["base"]
    assert ours["matrices"] == theirs["matrices"]
    assert ours["shapes"] == theirs["shapes"]


def test_other_experts_are_refused(family: tuple[Path, Any], starter: tuple[Any, Any, Any]) -> None:
    folder, model = family
    two = part("experts").ExpertSet()
    for name in "ab":
        two = two.with_expert(load_expert(folder / f"{name}.safetensors"))
    gates = part("experts").GatesFile(folder / "gates.safetensors")
    with pytest.raises(GateMismatchError):
        part("apply").apply_experts(model, starter[1], two, gates)


def test_a_core_lora_beside_ours(family: tuple[Path, Any], starter: tuple[Any, Any, Any]) -> None:
    """The core's loader patches weights, ours adds to outputs: together the sum."""
    folder, model = family
    answers = load_file(folder / "answers.safetensors")
    lora = lora_for_the_core(folder, model)
    skip_what_the_core_cannot_read(model, lora)
    apply = part("apply").apply_experts
    only = part("experts").ExpertSet().with_expert(load_expert(folder / "b.safetensors"))
    doubled = only.masked(None, {"b": 2.0})
    twice = run(apply(model, starter[1], doubled, None)[0], answers)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert close(run(patched, answers), answers["alone"])
    both = run(apply(patched, starter[1], only, None)[0], answers)
    assert close(both, twice)
    assert close(run(model, answers), answers["base"])


@pytest.mark.skipif(not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="newer cores have it")
def test_a_lora_in_bypass_beside_ours(family: tuple[Path, Any], starter: tuple[Any, Any, Any]) -> None:
    """The core's bypass adds to outputs as ours does; it leaves out what is a part of a fused matrix."""
    folder, model = family
    answers = load_file(folder / "answers.safetensors")
    lora = lora_for_the_core(folder, model)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    whole = {
        key: value for key, value in lora.items() if isinstance(known.get(key.rsplit(".", 2)[0]), str)
    } or {key: value for key, value in lora.items() if isinstance(known.get(key.rsplit(".", 1)[0]), str)}
    assert whole
    only = part("experts").ExpertSet().with_expert(load_expert(folder / "b.safetensors"))
    seen = []
    for load in (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models):
        loaded, _ = load(model, None, whole, 1.0, 0.0)
        alone, both = (
            run(one, answers)
            for one in (loaded, part("apply").apply_experts(loaded, starter[1], only, None)[0])
        )
        assert not close(both, alone)
        assert not close(both, answers["alone"])
        seen.append(both)
    assert close(*seen)
    assert close(run(model, answers), answers["base"])


def lora_for_the_core(folder: Path, model: Any) -> dict[str, Tensor]:
    """The expert "b" under names that all cores know."""
    if folder.name == "anima":  # its makers' alone
        expert = load_expert(folder / "b.safetensors")
        whole = {
            name: replace(one, up=one.up * one.scaling, alpha=float(one.rank))
            for name, one in expert.factors["transformer"].items()
        }
        kinds = {"transformer": map_network(model.model.diffusion_model).architecture}
        return lora_tensors({"transformer": whole}, "kohya", torch.float32, kinds=kinds)
    home = "diffusion_model." if folder.name == "z_image" else "transformer."
    stored = load_file(folder / "b.safetensors")
    return {key.replace("transformer.", home, 1): value for key, value in stored.items()}


def test_what_a_controlnet_adds_goes_beside_ours(
    family: tuple[Path, Any], starter: tuple[Any, Any, Any]
) -> None:
    """An expert and a ControlNet's residuals are the core's LoRA and the same residuals."""
    folder, model = family
    network = model.model.diffusion_model
    if not hasattr(network, "double_blocks"):
        pytest.skip("its ControlNets add in other places")
    answers = load_file(folder / "answers.safetensors")
    shapes: list[torch.Size] = []
    hook = network.double_blocks[0].register_forward_hook(lambda *given: shapes.append(given[-1][0].shape))
    run(model, answers)
    hook.remove()
    draws = torch.Generator().manual_seed(5)
    added = [torch.randn(shapes[0], generator=draws) for _ in network.double_blocks]

    def drawn(some: Any) -> Tensor:
        return run(some, answers, control={"input": list(added), "output": []})

    lora = lora_for_the_core(folder, model)
    skip_what_the_core_cannot_read(model, lora)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    expected, bare = drawn(patched), drawn(model)
    assert not close(expected, bare)
    assert not close(bare, answers["base"])
    only = part("experts").ExpertSet().with_expert(load_expert(folder / "b.safetensors"))
    assert close(drawn(part("apply").apply_experts(model, starter[1], only, None)[0]), expected)


def test_an_export_is_read_by_the_core(
    family: tuple[Path, Any], starter: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    folder, model = family
    answers = load_file(folder / "answers.safetensors")
    mixed, _ = part("apply").apply_experts(model, starter[1], experts_of(folder), None)
    part("apply").applied_to(mixed).ensemble.recorder.begin()
    expected = run(mixed, answers)
    said = part("export").export_lora(part("apply").applied_to(mixed), tmp_path / "static.safetensors", None)
    assert said.startswith("static.safetensors: ")
    lora = load_file(tmp_path / "static.safetensors")
    skip_what_the_core_cannot_read(model, lora)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    assert {key.rsplit(".", 2 if "lora_" in key.split(".")[-2] else 1)[0] for key in lora} <= set(names)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    # The file is in half precision.
    assert (run(patched, answers) - expected).abs().max() < 2e-3 * expected.abs().max()
    assert json.loads(json.dumps(said))


def test_a_matrix_that_only_diffusers_has_is_refused(oracle: Path, starter: tuple[Any, Any, Any]) -> None:
    """Stability AI's name of it does not say in which order its halves stand."""
    with torch.inference_mode():
        model = load_sd3(oracle / "transformers" / "sd3")
    name = "transformer.transformer_blocks.0.norm1_context.linear"
    state = {f"{name}.lora_A.weight": torch.ones(2, 128), f"{name}.lora_B.weight": torch.ones(768, 2)}
    experts = part("experts").ExpertSet().with_expert(Expert.from_state_dict(state, name="ink"))
    with pytest.raises(InjectionError, match="norm1_context"):
        part("apply").apply_experts(model, starter[1], experts, None)

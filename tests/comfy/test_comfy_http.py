"""The nodes in a running ComfyUI, driven over HTTP."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_environment import ComfyInstallation
from comfy_server import ROOT, ComfyServer, Prompt, Run
from diffusers import FluxTransformer2DModel
from PIL import Image
from prompts import TEXT, node, sampling, starter
from safetensors.torch import load_file, save_file
from tiny_loras import write_flux_lora, write_xl_lora, write_z_image_lora
from transformers import CLIPTextConfig, CLIPTextModel
from workflows import EXAMPLES, RUNNABLE, WORKFLOWS

from mole_diffusion import load_expert, read_gates_header
from mole_diffusion.core.ensemble import Ensemble

NODES = """
MoLEStarterLoader MoLEStarterPictures MoLELoadExpert MoLELoadGates MoLESaveGates MoLEApply MoLEMaskExperts
MoLERegionMasks
MoLETrainGates MoLEGateHeatMap MoLEExportLoRA
""".split()
THREE = ("boot", "monster", "clock")


def pixels(server: ComfyServer, run: Run, number: str) -> np.ndarray:
    assert run.status == "success", run.error
    shown = run.outputs[number]["images"][0]
    return np.asarray(Image.open(io.BytesIO(server.picture(shown))).convert("RGB"), dtype=np.int16)


def training(iterations: int, **inputs: Any) -> Prompt:
    """A small training of three experts (node 10), saved (node 11)."""
    prompt = starter(*THREE)
    values = {
        "prompt": TEXT,
        "concepts": "",
        "objective": "collage",
        "iterations": iterations,
        "batch": 2,
        "seed": 0,
        "size": 64,
        "pictures": 1,
        "preview_every": 0,
        "clip_model": "starter",
    }
    links: dict[str, Any] = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "experts": ["4", 0]}
    prompt["10"] = node("MoLETrainGates", **links, **{**values, **inputs})
    prompt["11"] = node("MoLESaveGates", gates=["10", 0], filename_prefix="mole_gates/small")
    return prompt


def applied(*names: str, **inputs: Any) -> Prompt:
    """Experts applied (node 10)."""
    prompt = starter(*names)
    last = str(1 + len(names))
    prompt["10"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=[last, 0], **inputs)
    return prompt


def test_nodes_widgets_and_tooltips_are_offered_and_translated(server: ComfyServer) -> None:
    info = server.get("/object_info")
    assert sorted(name for name in info if name.startswith("MoLE")) == sorted(NODES)
    definitions = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())
    assert sorted(definitions) == sorted(NODES)
    for name in NODES:
        found = info[name]
        assert found["category"] == "MoLE"
        assert found["description"]
        words = definitions[name]
        assert words["display_name"] == found["display_name"]
        assert words["description"] == found["description"]
        inputs = {**found["input"].get("required", {}), **found["input"].get("optional", {})}
        assert list(words.get("inputs", {})) == list(inputs)
        for key, (_, options) in inputs.items():
            assert words["inputs"][key].get("tooltip") == options.get("tooltip"), (name, key)
        assert [output["name"] for output in words["outputs"].values()] == found["output_name"]
    assert server.get("/i18n")["en"]["nodeDefs"].keys() >= set(NODES)
    assert sorted(server.get("/workflow_templates")["mole"]) == sorted(WORKFLOWS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_example_workflows_run(server: ComfyServer, name: str) -> None:
    """The files in the repository are these prompts (test_comfy_browser.py); here with fewer steps."""
    prompt = WORKFLOWS[name]()
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 2
        if entry["class_type"] == "MoLETrainGates":
            entry["inputs"] |= {
                "iterations": 3,
                "size": 64,
                "pictures": 1,
                "preview_every": 2,
                "batch": 2,
            }
    run = server.run(prompt)
    assert run.status == "success", run.error
    kinds = ("SaveImage", "PreviewImage", "LossGraphNode")
    pictures = [number for number, entry in prompt.items() if entry["class_type"] in kinds]
    assert pictures
    for number in pictures:
        assert pixels(server, run, number).std() > 5
    if name == "1_masked_inference":
        assert np.abs(pixels(server, run, "25") - pixels(server, run, "35")).mean() > 2
    if name == "2_train_and_save":
        exported = server.base / "output" / "loras" / "boot+monster+clock_00001_.safetensors"
        expert = load_expert(exported)
        assert set(expert.factors) == {"unet", "text_encoder"}
        assert {pair.rank for pair in expert.factors["unet"].values()} == {24}
        assert {"zorin boot", "kipra clock"} <= set(expert.triggers)


def test_training_of_twenty_iterations_is_saved_loaded_and_applied(server: ComfyServer) -> None:
    run = server.run(training(20))
    assert run.status == "success", run.error
    path = Path(run.outputs["11"]["text"][0])
    assert path.parent == server.base / "output" / "mole_gates"
    header = read_gates_header(path)
    assert header.expert_names("unet") == THREE
    assert any(float(gate.abs().max()) > 0 for name, gate in load_file(path).items() if "projection" in name)
    prompt = applied(*THREE)
    uniform = pixels(server, server.run(sampling(prompt, ["10", 0], ["10", 1])), "55")
    prompt["9"] = node("MoLELoadGates", gates=path.name)
    prompt["10"]["inputs"]["gates"] = ["9", 0]
    prompt["70"] = node("MoLEGateHeatMap", gates=["9", 0])
    prompt["71"] = node("PreviewImage", images=["70", 0])
    run = server.run(sampling(prompt, ["10", 0], ["10", 1]))
    assert np.abs(pixels(server, run, "55") - uniform).mean() > 1
    assert pixels(server, run, "71").std() > 5


def test_more_iterations_go_on_with_a_training_and_fewer_are_another(server: ComfyServer) -> None:
    folder = server.base / "output" / "mole_gates" / "training"
    before = set(folder.glob("*"))

    def trained(iterations: int) -> Path:
        run = server.run(training(iterations, seed=21))
        assert run.status == "success", run.error
        return Path(run.outputs["11"]["text"][0])

    def histories() -> dict[str, list[float]]:
        found = (path / "history.jsonl" for path in set(folder.glob("*")) - before)
        return {
            path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
            for path in found
        }

    first = trained(2)
    ((name, losses),) = histories().items()
    longer = trained(4)
    ((again, more),) = histories().items()
    assert (again, more[:2], len(more)) == (name, losses, 4)
    # What the first Run gave is what it was.
    assert first.read_bytes() == (folder / name / "gates-2.safetensors").read_bytes() != longer.read_bytes()
    assert read_gates_header(longer).metadata["iterations"] == "4"
    trained(3)
    assert {key: len(rows) for key, rows in histories().items()} == {name: 4, f"{name}-3": 3}


def trained_and_drawn(server: ComfyServer, loader: dict[str, Any], write: Any, family: str) -> Run:
    """Gates of a tiny model's two experts are trained, saved (node 11) and drawn with."""
    prompt: Prompt = {"2": loader}
    before: dict[str, Any] = {}
    for number, name in enumerate(("dog", "cat")):
        file = write(server.base / "models" / "loras", f"{family}_{name}", number)
        lora = {"lora": file.name, "strength": 1.0, "name": name}
        prompt[str(3 + number)] = node("MoLELoadExpert", **lora, **before)
        before = {"experts": [str(3 + number), 0]}
    phrases = "dog = a sks dog | a dog\ncat = a sks cat | a cat"
    text = "a sks dog and a sks cat"
    values = training(3, prompt=text, concepts=phrases)["10"]["inputs"] | {
        "model": ["2", 0],
        "clip": ["2", 1],
        "vae": ["2", 2],
        "guidance": 1.0,
    }
    prompt["10"] = node("MoLETrainGates", **values)
    prompt["11"] = node("MoLESaveGates", gates=["10", 0], filename_prefix=f"mole_gates/{family}")
    links = {"model": ["2", 0], "clip": ["2", 1], "experts": ["4", 0], "gates": ["10", 0]}
    prompt["12"] = node("MoLEApply", **links)
    run = server.run(sampling(prompt, ["12", 0], ["12", 1], text=text, vae=("2", 2)))
    assert run.status == "success", run.error
    return run


def test_gates_for_both_text_encoders_of_an_sdxl_are_trained_and_applied(server: ComfyServer) -> None:
    run = trained_and_drawn(server, node("TinyXLLoader"), write_xl_lora, "xl")
    header = read_gates_header(Path(run.outputs["11"]["text"][0]))
    assert set(header.parts) == {"unet", "text_encoder", "text_encoder_2"}
    assert header.expert_names("text_encoder_2") == ("dog", "cat")


def test_gates_for_a_flux_are_trained_and_applied_and_load_in_diffusers(server: ComfyServer) -> None:
    loader = node("TinyTransformerLoader", family="flux")
    run = trained_and_drawn(server, loader, write_flux_lora, "flux")
    path = Path(run.outputs["11"]["text"][0])
    ensemble = Ensemble(tiny_flux_of_diffusers(), facts={})
    loras = [server.base / "models" / "loras" / f"flux_{name}.safetensors" for name in ("dog", "cat")]
    experts = [load_expert(file, name) for file, name in zip(loras, ("dog", "cat"), strict=True)]
    ensemble.set_experts(experts)
    ensemble.load_gates(path)
    assert set(ensemble.mixtures) == {"transformer", "text_encoder"}
    assert all(mixture.is_trained for mixture in ensemble.mixtures.values())
    again = path.with_name("again.safetensors")
    ensemble.save_gates(again)
    stored, written = load_file(path), load_file(again)
    assert stored.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in stored.items())


@pytest.mark.slow  # layers as wide as ComfyUI's Z-Image must be
def test_gates_for_a_z_image_are_trained_and_applied(server: ComfyServer) -> None:
    loader = node("TinyTransformerLoader", family="z_image")
    run = trained_and_drawn(server, loader, write_z_image_lora, "z_image")
    header = read_gates_header(Path(run.outputs["11"]["text"][0]))
    # Its text encoder is a language model, which nobody's LoRA changes.
    assert set(header.parts) == {"transformer"}
    assert header.expert_names("transformer") == ("dog", "cat")


def tiny_flux_of_diffusers() -> dict[str, Any]:
    """The networks of `tiny_models.transformers.FLUX`."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    return {"transformer": transformer, "text_encoder": CLIPTextModel(text)}


def test_two_applications_in_a_row_are_refused(server: ComfyServer) -> None:
    prompt = applied("boot", "clock")
    prompt["11"] = node("MoLEApply", model=["10", 0], clip=["10", 1], experts=["2", 0])
    error = server.run(sampling(prompt, ["11", 0], ["11", 1])).error
    assert "This MODEL has the experts boot, clock already, from a MoLE Apply before this one." in error


def test_exported_lora_goes_into_the_core_loader(server: ComfyServer) -> None:
    """With gates that weigh alike, the frozen mixture is the mixture."""
    prompt = applied("boot", "clock", without_gates="equal shares")
    target = {"filename_prefix": "loras/both", "rank": 0}
    prompt["60"] = node("MoLEExportLoRA", model=["10", 0], after=["53", 0], **target)
    run = server.run(sampling(prompt, ["10", 0], ["10", 1], steps=3))
    drawn = pixels(server, run, "55")
    assert "unet rank 16" in run.outputs["60"]["text"][0]
    plain: Prompt = {"1": node("MoLEStarterLoader")}
    name = "both_00001_.safetensors"
    plain["2"] = node(
        "LoraLoader", model=["1", 0], clip=["1", 1], lora_name=name, strength_model=1.0, strength_clip=1.0
    )
    loaded = pixels(server, server.run(sampling(plain, ["2", 0], ["2", 1], steps=3)), "55")
    bare = pixels(server, server.run(sampling(plain, ["1", 0], ["1", 1], steps=3)), "55")
    assert np.abs(loaded - drawn).mean() < 1
    assert np.abs(bare - drawn).mean() > 3


def test_interrupt_stops_a_training_at_once_and_keeps_its_gates(server: ComfyServer) -> None:
    prompt = training(5000, seed=7)
    number = server.queue(prompt)
    folder = server.base / "output" / "mole_gates" / "training"
    before = set(folder.glob("*/history.jsonl"))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        new = set(folder.glob("*/history.jsonl")) - before
        if new and len(min(new).read_text().splitlines()) >= 2:
            break
        time.sleep(0.2)
    asked = time.monotonic()
    server.post("/interrupt", {})
    run = server.wait(number)
    assert time.monotonic() - asked < 20
    assert "execution_interrupted" in run.messages
    (history,) = set(folder.glob("*/history.jsonl")) - before
    assert read_gates_header(history.parent / "gates.safetensors").expert_names("unet") == THREE
    # The queue goes on.
    bare: Prompt = {"1": node("MoLEStarterLoader")}
    assert server.run(sampling(bare, ["1", 0], ["1", 1])).status == "success"


def test_two_clones_with_different_experts_in_one_graph(server: ComfyServer) -> None:
    def both(first: str, second: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        prompt = starter(first)
        prompt["3"] = node("MoLELoadExpert", lora=f"starter: {second}", strength=1.0, name="")
        for at, expert in ((10, "2"), (11, "3")):
            prompt[str(at)] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=[expert, 0])
        prompt = sampling(prompt, ["10", 0], ["10", 1], seed=seed, at=20)
        prompt = sampling(prompt, ["11", 0], ["11", 1], seed=seed, at=30)
        run = server.run(prompt)
        return pixels(server, run, "25"), pixels(server, run, "35")

    boot, clock = both("boot", "clock", 3)
    assert np.abs(boot - clock).mean() > 2
    alone = pixels(server, server.run(sampling(applied("clock"), ["10", 0], ["10", 1], seed=3)), "55")
    assert np.array_equal(alone, clock)


def test_unloading_models_between_prompts_changes_nothing(server: ComfyServer) -> None:
    prompt = sampling(applied("boot", "clock"), ["10", 0], ["10", 1], seed=5)
    first = pixels(server, server.run(prompt), "55")
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    assert np.array_equal(pixels(server, server.run(prompt), "55"), first)


def _wrong_files(loras: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shapes = {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4)}
    tensors = {f"{name}.{role}": torch.ones(*shape) for role, shape in shapes.items()}
    save_file(tensors, loras / "sd15_style.safetensors")
    save_file({"conv.weight": torch.ones(2, 2)}, loras / "no_lora.safetensors")
    (loras / "broken.safetensors").write_bytes(b"not safetensors at all")
    shutil.copy(ROOT / "assets" / "starter" / "experts" / "boot.safetensors", loras / "shoe.safetensors")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("sd15_style.safetensors", "'sd15_style' does not fit"),
        ("no_lora.safetensors", "none of its 1 keys can be used"),
        ("broken.safetensors", "cannot be read as safetensors"),
    ],
)
def test_wrong_lora_files_are_errors_that_say_why(server: ComfyServer, lora: str, message: str) -> None:
    _wrong_files(server.base / "models" / "loras")
    prompt: Prompt = {"1": node("MoLEStarterLoader")}
    prompt["2"] = node("MoLELoadExpert", lora=lora, strength=1.0, name="")
    prompt["10"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["2", 0])
    run = server.run(sampling(prompt, ["10", 0], ["10", 1]))
    assert run.status == "error"
    assert message in run.error
    assert run.messages["execution_error"]["node_type"] in ("MoLELoadExpert", "MoLEApply")


def test_wrong_gates_names_and_masks_are_errors_that_say_why(
    server: ComfyServer, oracle_folder: Path
) -> None:
    folder = server.base / "models" / "mole_gates"
    folder.mkdir(exist_ok=True)
    shutil.copy(oracle_folder / "gates.safetensors", folder / "three.safetensors")
    prompt = applied("boot", "clock", gates=["9", 0])
    prompt["9"] = node("MoLELoadGates", gates="three.safetensors")
    error = server.run(sampling(prompt, ["10", 0], ["10", 1])).error
    # The core's own error, as in every host: it names the file by its path.
    assert "three.safetensors' do not fit" in error
    assert "expert 'monster' is in the file, not here" in error

    prompt = applied("boot", "clock")
    prompt["8"] = node("MoLEMaskExperts", experts=["3", 0], active="boots", strengths="")
    prompt["10"]["inputs"]["experts"] = ["8", 0]
    assert "Did you mean 'boot'?" in server.run(sampling(prompt, ["10", 0], ["10", 1])).error

    prompt["8"] = node("MoLERegionMasks", experts=["3", 0], names="", mask_1=["7", 0])
    prompt["7"] = node("SolidMask", value=1.0, width=128, height=64)
    error = server.run(sampling(prompt, ["10", 0], ["10", 1])).error
    assert "64 x 128 (height x width) does not have the proportions" in error

    outside = training(1)
    outside["11"]["inputs"]["filename_prefix"] = "../outside/gates"
    assert "leads out of ComfyUI's output folder" in server.run(outside).error
    assert not (server.base / "outside").exists()


def test_experts_that_no_prompt_names_are_said_when_a_run_begins(server: ComfyServer) -> None:
    """For programs too, which see nothing of the nodes."""
    before = len(server.log.read_text(errors="replace"))
    prompt = applied("boot", "clock")
    run = server.run(sampling(prompt, ["10", 0], ["10", 1], text="a kipra clock", steps=1))
    assert run.status == "success", run.error
    said = server.log.read_text(errors="replace")[before:]
    assert "MoLE: No prompt names boot: write 'zorin boot'." in said
    assert "No prompt names clock" not in said


def test_clip_objective_without_open_clip_says_what_to_install(server: ComfyServer) -> None:
    assert "needs open_clip" in server.run(training(1, objective="clip")).error


def test_named_experts_from_comfyui_folders_chain(server: ComfyServer) -> None:
    _wrong_files(server.base / "models" / "loras")
    prompt = starter("clock")
    prompt["3"] = node(
        "MoLELoadExpert", lora="shoe.safetensors", strength=0.9, name="my shoe", experts=["2", 0]
    )
    prompt["4"] = node("PreviewAny", source=["3", 1])
    prompt["8"] = node("MoLEMaskExperts", experts=["3", 0], active="my shoe", strengths="my shoe = 1.2")
    prompt["10"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["8", 0])
    run = server.run(sampling(prompt, ["10", 0], ["10", 1]))
    assert run.status == "success", run.error
    report = run.outputs["4"]["text"][0]
    assert report.startswith("my shoe: 188 keys loaded, 0 ignored, 0 missing")
    assert "zorin boot" in report


def test_clone_of_the_whole_repository_is_a_node_pack_too(comfyui: ComfyInstallation, tmp_path: Path) -> None:
    with ComfyServer(comfyui, tmp_path, ROOT) as whole:
        assert set(NODES) <= set(whole.get("/object_info"))
        assert sorted(whole.get("/workflow_templates")["mole"]) == sorted(WORKFLOWS)
        assert set(NODES) <= set(whole.get("/i18n")["en"]["nodeDefs"])


def test_metadata_for_the_registry_and_requirements_that_replace_nothing(comfyui: ComfyInstallation) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pack = metadata["tool"]["comfy"]
    assert pack["PublisherId"]
    assert pack["DisplayName"]
    assert pack["requires-comfyui"].startswith(">=")
    assert metadata["project"]["dynamic"] == ["version"]
    assert "__version__ = " in (ROOT / pack["version"]["path"]).read_text()
    core = {line.split(">")[0].split("=")[0].strip() for line in comfyui.requirements()}
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("#")]
    assert wanted
    for line in wanted:
        name, _, lowest = line.partition(">=")
        assert name in core
        assert lowest  # no pins, no upper bounds
        assert "<" not in line


def test_examples_in_the_repository_are_complete() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.json")) == sorted(WORKFLOWS)


@pytest.mark.slow
def test_sd15_shaped_checkpoint_with_core_lora_and_controlnet(server: ComfyServer, sd15_folder: Path) -> None:
    """The fourth example workflow, at 64 pixels and one step, on files with random weights."""
    models = server.base / "models"
    for folder, name in (
        ("checkpoints", "sd15"),
        ("controlnet", "control"),
        *(("loras", name) for name in ("dog", "cat", "style")),
        ("mole_gates", "dog+cat"),
    ):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / f"{name}.safetensors").symlink_to(sd15_folder / f"{name}.safetensors")
    Image.effect_noise((64, 64), 90).convert("RGB").save(server.base / "input" / "control.png")
    prompt = WORKFLOWS["4_sd15_lora_controlnet"](size=64, steps=1)  # type: ignore[call-arg]
    mixed = pixels(server, server.run(prompt), "14")
    assert mixed.shape == (64, 64, 3)
    without = {**prompt, "3": {**prompt["3"]}, "4": {**prompt["4"]}}
    for number in ("3", "4"):
        without[number]["inputs"] = {**prompt[number]["inputs"], "strength": 0.0}
    assert not np.array_equal(pixels(server, server.run(without), "14"), mixed)
    server.post("/free", {"unload_models": True, "free_memory": True})

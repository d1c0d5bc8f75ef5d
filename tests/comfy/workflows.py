"""The example workflows as API prompts; `PYTHONPATH=tests python tests/comfy/workflows.py` writes them.

The files are what the front end makes of the prompts: a browser lays them out, what there is to change in
numbered groups and all else in one that can be left alone. It draws thumbnails and the README's pictures too.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from comfy_browser import Layout
from comfy_environment import install
from comfy_server import ROOT, ComfyServer, Prompt
from PIL import Image, ImageOps
from prompts import TEXT, node, sampling, starter

_PAIR = "a zorin boot and a kipra clock on the beach"
#: The node with the prompt, which several samplers share.
_PROMPT = "9"


def _words(text: str) -> dict[str, Any]:
    return node("PrimitiveStringMultiline", value=text)


def masked_inference() -> Prompt:
    """Three experts with trained gates, and the same seed with one of them left out."""
    prompt = starter("boot", "monster", "clock")
    prompt[_PROMPT] = _words(TEXT)
    prompt["8"] = node("MoLELoadGates", gates="starter: boot + monster + clock")
    gates = {"gates": ["8", 0]}
    prompt["10"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["4", 0], **gates)
    prompt["11"] = node("MoLEMaskExperts", experts=["4", 0], active="boot, clock", strengths="")
    prompt["12"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["11", 0], **gates)
    prompt = sampling(prompt, ["10", 0], ["10", 1], steps=20, text=[_PROMPT, 0], at=20)
    return sampling(prompt, ["12", 0], ["12", 1], steps=20, text=[_PROMPT, 0], at=30)


def train_and_save(iterations: int = 200) -> Prompt:
    """Gates for three experts, their picture, the heat map of its run, the loss, and a plain LoRA."""
    names = ("boot", "monster", "clock")
    prompt = starter(*names)
    references = {}
    for number, name in enumerate(names, start=1):
        prompt[str(4 + number)] = node("MoLEStarterPictures", expert=name)
        references[f"reference_{number}"] = [str(4 + number), 0]
    prompt[_PROMPT] = _words(TEXT)
    prompt["10"] = node(
        "MoLETrainGates",
        model=["1", 0],
        clip=["1", 1],
        vae=["1", 2],
        experts=["4", 0],
        prompt=[_PROMPT, 0],
        concepts="",
        objective="collage",
        iterations=iterations,
        batch=6,
        seed=0,
        size=0,
        pictures=12,
        preview_every=50,
        clip_model="starter",
        guidance=0,
        **references,
    )
    prompt["11"] = node("MoLESaveGates", gates=["10", 0], filename_prefix="mole_gates/boot+monster+clock")
    prompt["12"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["4", 0], gates=["10", 0])
    prompt = sampling(prompt, ["12", 0], ["12", 1], steps=20, text=[_PROMPT, 0], at=20)
    prompt["30"] = node("MoLEGateHeatMap", model=["12", 0], after=["23", 0])
    prompt["31"] = node("PreviewImage", images=["30", 0])
    prompt["32"] = node("LossGraphNode", loss=["10", 1], filename_prefix="loss_graph")
    prompt["33"] = node(
        "MoLEExportLoRA", model=["12", 0], after=["23", 0], filename_prefix="loras/boot+monster+clock", rank=0
    )
    return prompt


def region_masks() -> Prompt:
    """Two experts, each in its half of the picture."""
    prompt = starter("boot", "clock")
    prompt[_PROMPT] = _words(_PAIR)
    prompt["10"] = node("SolidMask", value=0.0, width=128, height=128)
    prompt["11"] = node("SolidMask", value=1.0, width=64, height=128)
    prompt["12"] = _half(0)
    prompt["13"] = _half(64)
    prompt["14"] = node("MoLERegionMasks", experts=["3", 0], names="", mask_1=["12", 0], mask_2=["13", 0])
    prompt["15"] = node("MoLEApply", model=["1", 0], clip=["1", 1], experts=["14", 0])
    return sampling(prompt, ["15", 0], ["15", 1], steps=20, text=[_PROMPT, 0], at=20)


def _half(x: int) -> dict[str, Any]:
    return node("MaskComposite", destination=["10", 0], source=["11", 0], x=x, y=0, operation="add")


def sd15_lora_controlnet(size: int = 512, steps: int = 20) -> Prompt:
    """Stable Diffusion 1.5 with two experts, a LoRA of the core loader and a ControlNet."""
    prompt: Prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "2": node(
            "LoraLoader",
            model=["1", 0],
            clip=["1", 1],
            lora_name="style.safetensors",
            strength_model=0.8,
            strength_clip=0.8,
        ),
        "3": node("MoLELoadExpert", lora="dog.safetensors", strength=1.0, name=""),
        "4": node("MoLELoadExpert", lora="cat.safetensors", strength=1.0, name="", experts=["3", 0]),
        "15": node("MoLELoadGates", gates="dog+cat.safetensors"),
        "5": node("MoLEApply", model=["2", 0], clip=["2", 1], experts=["4", 0], gates=["15", 0]),
        "6": node("CLIPTextEncode", text="a sks dog and a ohwx cat on the beach", clip=["5", 1]),
        "7": node("CLIPTextEncode", text="", clip=["5", 1]),
        "8": node("ControlNetLoader", control_net_name="control.safetensors"),
        "9": node("LoadImage", image="control.png"),
        "10": node(
            "ControlNetApplyAdvanced",
            positive=["6", 0],
            negative=["7", 0],
            control_net=["8", 0],
            image=["9", 0],
            strength=0.8,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "11": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "12": node(
            "KSampler",
            model=["5", 0],
            positive=["10", 0],
            negative=["10", 1],
            latent_image=["11", 0],
            seed=1,
            steps=steps,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "13": node("VAEDecode", samples=["12", 0], vae=["1", 2]),
        "14": node("SaveImage", images=["13", 0], filename_prefix="mole_sd15"),
    }
    return prompt


#: File name -> the prompt.
WORKFLOWS = {
    "1_masked_inference": masked_inference,
    "2_train_and_save": train_and_save,
    "3_region_masks": region_masks,
    "4_sd15_lora_controlnet": sd15_lora_controlnet,
}
#: What a newcomer changes, by the title of its group; and what the workflow does.
LAYOUTS: dict[str, Layout] = {
    "1_masked_inference": Layout(
        {"1  Experts and their gates": ["2", "3", "4", "8"], "2  Prompt": ["9"], "3  Who counts": ["11"]},
        "**Three experts in one picture, and the same without one of them.**\n\n"
        "Runs at once on the small model that comes with the nodes. Above: all experts. Below: those that "
        "*Mask Experts* lets count, with the same seed. Gates belong to the experts they were trained for; "
        "with other experts choose other gates, or disconnect them: then all count alike.",
    ),
    "2_train_and_save": Layout(
        {
            "1  Experts and pictures of them": ["2", "3", "4", "5", "6", "7"],
            "2  Prompt": ["9"],
            "3  Training": ["10"],
        },
        "**Gates are trained, saved, used, drawn as a heat map, and exported as one plain LoRA.**\n\n"
        "Takes a few minutes on a CPU. For your own experts connect *Load Image* to the references, or "
        "nothing: then each expert draws some first. Cancel keeps what there is; Run goes on, with more "
        "iterations too.",
    ),
    "3_region_masks": Layout(
        {"1  Experts": ["2", "3"], "2  Prompt": ["9"], "3  Whose mask is whose": ["14"]},
        "**Each expert in its half of the picture.**\n\n"
        "Runs at once. Any MASK of the picture's proportions does, a painted one too. A mask says where an "
        "expert may act, not that its subject is drawn: the prompt has to name it.",
    ),
    "4_sd15_lora_controlnet": Layout(
        {
            "1  Your files": ["1", "3", "4", "15", "2"],
            "2  Prompt": ["6"],
            "3  Picture that guides": ["8", "9"],
        },
        "**Stable Diffusion 1.5 with two experts and their gates, a LoRA of ComfyUI's own loader and a "
        "ControlNet.**\n\n"
        "Choose your files first. Gates for your experts: train them with workflow 2 (with *Load Checkpoint* "
        "in place of the starter), or disconnect *Load Gates*.",
    ),
}
#: Those that need nothing but the starter.
RUNNABLE = ("1_masked_inference", "2_train_and_save", "3_region_masks")
EXAMPLES = ROOT / "example_workflows"
PICTURES = ROOT / "assets" / "comfyui"
#: Width and height of a thumbnail.
_THUMBNAIL = (320, 200)


def write_examples() -> None:
    """Write the workflows, run those that need no download, and keep pictures of them."""
    from comfy_browser import front_end, graph_picture, load_workflow, queue_and_wait, workflow_of

    EXAMPLES.mkdir(exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(install(), Path(folder), ROOT / "comfy_nodes") as server,
    ):
        with front_end(server.url) as page:
            for name, make in WORKFLOWS.items():
                workflow = workflow_of(page, make(), name, LAYOUTS[name])
                workflow.get("extra", {}).pop("ds", None)
                (EXAMPLES / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
        for name in WORKFLOWS:
            with front_end(server.url, pixels_per_point=1.5) as page:
                load_workflow(page, EXAMPLES / f"{name}.json")
                if name in RUNNABLE:
                    queue_and_wait(page, seconds=3600)
                shown = Image.open(io.BytesIO(graph_picture(page))).convert("RGB")
                shown.save(PICTURES / f"{name}.webp", quality=55, method=6)
                drawn = sorted((Path(folder) / "output").glob("mole_*.png"))
                thumbnail = _side_by_side(drawn) if name in RUNNABLE else shown
                whole = ImageOps.pad(thumbnail, _THUMBNAIL, color="#202020")
                whole.save(EXAMPLES / f"{name}.jpg", quality=85)
                for path in drawn:
                    path.unlink()


def _side_by_side(paths: list[Path]) -> Image.Image:
    pictures = [Image.open(path).convert("RGB") for path in paths]
    sheet = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number * picture.width, 0))
    return sheet


if __name__ == "__main__":
    sys.exit(write_examples())

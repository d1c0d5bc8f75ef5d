"""Nodes that bring models, experts and gates in, and write gates and LoRAs out."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from mole_diffusion.core.bases import told_base
from mole_diffusion.core.experts import load_expert
from mole_diffusion.core.peft_folder import expert_facts

from . import places
from .apply import applied_to
from .experts import ExpertSet, GatesFile
from .export import export_lora
from .notes import show_text
from .starter import load_starter, starter_pictures

CATEGORY = "MoLE"
Experts = io.Custom("MOLE_EXPERTS")
Gates = io.Custom("MOLE_GATES")


class StarterLoader(io.ComfyNode):  # type: ignore[misc]
    """The small model that ships with the project."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEStarterLoader",
            display_name="MoLE Starter Loader",
            category=CATEGORY,
            description="A small Stable Diffusion that ships with the nodes (128 x 128 pixels, no download), "
            "to try experts and gates in seconds. Use Empty Latent Image with 128 x 128.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_starter())


class StarterPictures(io.ComfyNode):  # type: ignore[misc]
    """The pictures that an expert of the starter was trained on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEStarterPictures",
            display_name="MoLE Starter Pictures",
            category=CATEGORY,
            description="The reference pictures of one of the starter's experts, for MoLE Train Gates: with "
            "them an expert need not draw any before its training. For your own experts use Load Image.",
            inputs=[
                io.Combo.Input(
                    "expert", options=places.starter_names(), tooltip="Whose pictures: all of one size."
                )
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
        )

    @classmethod
    def execute(cls, expert: str) -> io.NodeOutput:
        return io.NodeOutput(starter_pictures(expert))


class LoadExpert(io.ComfyNode):  # type: ignore[misc]
    """One LoRA file as an expert."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLELoadExpert",
            display_name="MoLE Load Expert",
            category=CATEGORY,
            description="Reads a LoRA, LoCon, LoHa, LoKr or DoRA file as an expert. Chain several of these, "
            "and connect the last one to MoLE Apply.",
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=places.expert_choices(),
                    tooltip="A file of ComfyUI's folders for loras, or an expert of the starter.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor on everything this expert does; 1 is the file as it is.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    placeholder="name of the file",
                    tooltip="How masks, regions and training call this expert. Empty: the name of the file.",
                ),
                Experts.Input("experts", optional=True, tooltip="Experts to which this one is added."),
                io.Boolean.Input(
                    "check_base",
                    default=True,
                    optional=True,
                    tooltip="Off: use the file though its header names another prediction type than the "
                    "MODEL's; some headers are wrong.",
                ),
            ],
            outputs=[
                Experts.Output(display_name="EXPERTS"),
                io.String.Output(display_name="report", tooltip="What became of each key of the file."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_: Any) -> str:
        return str(expert_facts(places.expert_file(lora)))

    @classmethod
    def execute(
        cls,
        lora: str,
        strength: float,
        name: str = "",
        experts: ExpertSet | None = None,
        check_base: bool = True,
    ) -> io.NodeOutput:
        path = places.expert_file(lora)
        # Tensors made in inference mode could not be trained with.
        with torch.inference_mode(False):
            expert = load_expert(path, name=name.strip() or None, scale=strength)
        triggers = (
            f"triggers: {', '.join(expert.triggers)}" if expert.triggers else "the file names no trigger"
        )
        dialects = ", ".join(expert.report.dialects) or "unknown"
        report = (
            f"{expert.name}: {expert.report.summary()}; for {told_base(expert)}; written by {dialects}; "
            f"{triggers}"
        )
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput((experts or ExpertSet()).with_expert(expert, check_base=check_base), report)


class LoadGates(io.ComfyNode):  # type: ignore[misc]
    """Gates from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLELoadGates",
            display_name="MoLE Load Gates",
            category=CATEGORY,
            description="Reads trained gates from models/mole_gates or output/mole_gates, or the starter's.",
            inputs=[
                io.Combo.Input(
                    "gates",
                    options=places.gates_choices(),
                    tooltip="A gates file. It fits the experts it was trained for and no others.",
                )
            ],
            outputs=[Gates.Output(display_name="GATES")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, gates: str) -> str:
        return places.fingerprint(places.gates_file(gates))

    @classmethod
    def execute(cls, gates: str) -> io.NodeOutput:
        file = GatesFile(places.gates_file(gates))
        parts = "; ".join(f"{part}: {', '.join(names)}" for part, names in file.expert_names.items())
        what = f"gates of {parts}" if file.shared is None else "shared gates, for any experts"
        lines = [what, *filter(None, [file.unfinished])]
        show_text(cls.hidden.unique_id, "; ".join(lines))
        return io.NodeOutput(file)


class SaveGates(io.ComfyNode):  # type: ignore[misc]
    """Gates to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLESaveGates",
            display_name="MoLE Save Gates",
            category=CATEGORY,
            description="Writes gates to ComfyUI's output folder, where MoLE Load Gates finds them.",
            is_output_node=True,
            inputs=[
                Gates.Input("gates"),
                io.String.Input(
                    "filename_prefix",
                    default="mole_gates/gates",
                    tooltip="Folder and beginning of the name, inside the output folder. Load Gates lists "
                    "what is in mole_gates.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, gates: GatesFile, filename_prefix: str) -> io.NodeOutput:
        path = places.new_output(filename_prefix)
        gates.copy_to(path)
        show_text(cls.hidden.unique_id, f"written: {path.name}")
        return io.NodeOutput(str(path), ui={"text": (str(path),)})


class ExportLoRA(io.ComfyNode):  # type: ignore[misc]
    """The mixture with frozen gates as one plain LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEExportLoRA",
            display_name="MoLE Export LoRA",
            category=CATEGORY,
            description="Freezes the gates at their mean weights in the last run and writes one plain LoRA "
            "(kohya) to output/loras, for the LoRA loader of any program. A LoRA knows no prompt and no "
            "place in the picture: it is a mean of what the gates do.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that comes out of MoLE Apply."),
                io.Latent.Input(
                    "after", tooltip="The sampler's LATENT: the weights are those of the run that made it."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/mole",
                    tooltip="Folder and beginning of the name, inside the output folder.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Largest rank to keep. 0 keeps everything: the sum of the experts' ranks.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, after: Any, filename_prefix: str, rank: int) -> io.NodeOutput:
        path = places.new_output(filename_prefix)
        report = export_lora(applied_to(model), path, rank or None)
        show_text(cls.hidden.unique_id, report)
        return io.NodeOutput(str(path), ui={"text": (report,)})

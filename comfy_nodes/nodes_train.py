"""Train Gates: the trainer of the package on ComfyUI's own objects."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import read_concept
from mole_diffusion.pictures.files import pictures_digest
from mole_diffusion.pictures.training import (
    Concept,
    GateTrainer,
    TrainingConfig,
    TrainingEvent,
    TrainingResult,
)
from mole_diffusion.pictures.training.concepts import concepts_from_experts
from mole_diffusion.pictures.training.tasks import Collage
from mole_diffusion.pictures.training.workbench import tensor_picture
from mole_diffusion.training.state import GATES_FILE

from .experts import ExpertSet, GatesFile
from .native import TrainingCopy
from .nodes_load import CATEGORY, Experts, Gates
from .notes import show_text
from .places import GATES

#: Reference inputs that Train Gates takes.
MAX_REFERENCES = 8
#: Iterations between checkpoints, from which a training that was stopped goes on.
CHECKPOINT_EVERY = 10
STARTER_CLIP = "starter"


class TrainGates(io.ComfyNode):  # type: ignore[misc]
    """Gates for a prompt that names several concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        references = [
            io.Image.Input(
                f"reference_{number}",
                optional=True,
                tooltip=f"Pictures of the subject of expert {number}. Without any, the expert draws some "
                "alone.",
            )
            for number in range(1, MAX_REFERENCES + 1)
        ]
        return io.Schema(
            node_id="MoLETrainGates",
            display_name="MoLE Train Gates",
            category=CATEGORY,
            description="Trains the gates of these experts for a prompt that names all of them. Model and "
            "experts stay as they are. Cancel stops at once and keeps what there is: queue again to go on, "
            "with more iterations too. Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1, FLUX.2, Chroma, Z-Image, "
            "Qwen-Image.",
            inputs=[
                io.Model.Input("model", tooltip="The bare model, without MoLE Apply."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                Experts.Input("experts", tooltip="All of them are trained, whatever Mask Experts says."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    placeholder="a zorin boot and a kipra clock on the beach",
                    tooltip="One prompt per line; every concept must be in one of them.",
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    placeholder="boot = a zorin boot | a boot",
                    tooltip="One line per expert: NAME = phrase with the trigger word | the same in words "
                    "the model knows | subject, style or garment. Empty: what the experts' files say.",
                ),
                io.Combo.Input(
                    "objective",
                    options=["collage", "clip", "both"],
                    default="collage",
                    tooltip="collage: denoise cut-and-mixed pictures of the experts (fast). clip: guidance "
                    "by a CLIP (the paper; needs open_clip_torch). both: collages first, CLIP on top.",
                ),
                io.Int.Input("iterations", default=400, min=1, max=100_000),
                io.Int.Input(
                    "batch",
                    default=Collage.batch,
                    min=1,
                    max=64,
                    tooltip="Pictures per iteration.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Height and width of the pictures in pixels. 0: 128 for the starter, 512 for "
                    "Stable Diffusion 1 and 2, 1024 for others.",
                ),
                io.Int.Input(
                    "pictures",
                    default=12,
                    min=1,
                    max=200,
                    tooltip="Pictures that an expert without references draws alone, and backgrounds.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=0,
                    max=10_000,
                    tooltip="Iterations between preview pictures. 0: none.",
                ),
                io.String.Input(
                    "clip_model",
                    default=STARTER_CLIP,
                    tooltip="Guiding CLIP of the objectives clip and both: 'starter', a name of open_clip "
                    "such as ViT-B-32/openai, or local-dir:FOLDER.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance that you will draw with: of FluxGuidance where the model reads it "
                    "(FLUX.1 dev, FLUX.2), else KSampler's cfg; 1 for models of few steps. 0: 3.5, 4 for "
                    "other transformers, 5 for Stable Diffusion.",
                ),
                *references,
            ],
            outputs=[
                Gates.Output(display_name="GATES"),
                io.LossMap.Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        experts: ExpertSet,
        prompt: str,
        concepts: str,
        objective: str,
        iterations: int,
        batch: int,
        seed: int,
        size: int,
        pictures: int,
        preview_every: int,
        clip_model: str,
        guidance: float = 0.0,
        **references: Any,
    ) -> io.NodeOutput:
        prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
        if not prompts:
            raise ConfigError("The prompt is empty: write one that names what the experts know.")
        config = TrainingConfig(
            objective=objective,
            iterations=iterations,
            batch=batch,
            seed=seed,
            drawn_pictures=pictures,
            preview_every=preview_every,
            checkpoint_every=CHECKPOINT_EVERY,
            resolution=size or None,
            guidance=guidance or None,
            clip=read_clip(clip_model),
            progress=False,
        )
        with torch.inference_mode(False), torch.enable_grad():
            known = read_concepts(concepts, experts, references)
            show_text(cls.hidden.unique_id, "copying the model ...")
            pipe = TrainingCopy(model, clip, vae, experts, MoLEConfig(), size or None)
            folder = training_folder(pipe, prompts, known, config)
            result = train(pipe, prompts, known, config, folder, _say(cls.hidden.unique_id))
        comfy.model_management.throw_exception_if_processing_interrupted()
        losses = [row["loss"] for row in result.history]
        return io.NodeOutput(finished_gates(folder, len(losses)), {"loss": losses})


def train(
    pipe: TrainingCopy,
    prompts: list[str],
    concepts: Mapping[str, Concept],
    config: TrainingConfig,
    folder: Path,
    say: Callable[[str], None],
) -> TrainingResult:
    """Train, or go on with a training, with ComfyUI's progress bar; ends early when ComfyUI is interrupted.

    Args:
        folder: checkpoints and gates.
        say: shows a line of text.
    """
    bar = ProgressBar(config.iterations)
    done = 0

    def preparing(batches: int, of: int) -> None:
        bar.update_absolute(batches, of)
        if batches < of:
            say(f"drawing pictures to learn from: {batches} of {of} batches")
        else:
            say("cutting pictures out and mixing them ...")

    def report(event: TrainingEvent) -> bool:
        nonlocal done
        done = event.iteration
        bar.update_absolute(event.iteration, event.iterations, _shown(event.preview))
        row = event.row
        say(f"iteration {event.iteration} of {event.iterations}, loss {row['loss']:.3f}")
        return not comfy.model_management.processing_interrupted()

    say("drawing pictures to learn from ...")
    trainer = GateTrainer(
        pipe,
        prompts,
        concepts,
        config,
        callback=report,
        checkpoint_dir=folder,
        denoiser=pipe.denoiser,
        preparing=preparing,
    )
    try:
        return trainer.train()
    except comfy.model_management.InterruptProcessingException:
        # In the middle of an iteration: the trainer keeps its last checkpoint, and the gates are as good.
        if done:
            pipe.save_gates(folder / GATES_FILE, {"training": config.to_json(), "iterations": str(done)})
        raise


def _shown(picture: Any) -> tuple[str, Any, None] | None:
    """A picture as ComfyUI's progress bar takes it."""
    return None if picture is None else ("JPEG", picture, None)


def read_concepts(text: str, experts: ExpertSet, references: Mapping[str, Any]) -> dict[str, Concept]:
    """What each expert knows: from the widget where it has a line, else from the expert's file.

    Args:
        text: lines NAME = phrase | class phrase | kind.
        references: "reference_1" ... -> IMAGE (B, H, W, 3), in the order of the experts.
    Raises:
        ConfigError: a line cannot be read, or nobody says what an expert knows.
        UnknownExpertError: a line names no expert.
    """
    read = [read_concept(line) for line in text.splitlines() if line.strip()]
    lines = {name: Concept(name, text, known, kind=kind) for name, text, known, kind in read}
    experts.check(lines)
    silent = {expert.name: expert for expert in experts.experts if expert.name not in lines}
    found = {**concepts_from_experts(silent), **lines}
    for number, name in enumerate(experts.names, start=1):
        pictures = references.get(f"reference_{number}")
        if pictures is not None:
            known = tuple(tensor_picture(picture.movedim(-1, 0)) for picture in pictures)
            found[name] = dataclasses.replace(found[name], references=known)
    return {name: found[name] for name in experts.names}


def read_clip(text: str) -> str | tuple[str, str] | None:
    """The guiding CLIP as `TrainingConfig.clip` wants it."""
    text = text.strip()
    if text in ("", STARTER_CLIP):
        return None
    name, slash, pretrained = text.partition("/")
    if ":" in text or not slash:
        return text
    return name, pretrained


def finished_gates(folder: Path, iterations: int) -> GatesFile:
    """The gates of a training under a name that it leaves alone when it is made longer."""
    gates = GatesFile(folder / f"gates-{iterations}.safetensors")
    GatesFile(folder / GATES_FILE).copy_to(gates.path)
    return gates


def training_folder(
    pipe: TrainingCopy, prompts: list[str], concepts: Mapping[str, Concept], config: TrainingConfig
) -> Path:
    """Where this very training keeps its checkpoints: equal inputs go on where an earlier run stopped.

    More iterations go on with it too; fewer than it has done already are a training of their own.
    """
    facts = {
        "base": pipe.denoiser.digest(),
        "prompts": prompts,
        "concepts": [[c.name, c.text, c.class_text, c.kind] for c in concepts.values()],
        "pictures": {c.name: pictures_digest(c.references) for c in concepts.values()},
        "experts": [[e.name, e.sha256, e.scale] for e in pipe.experts.values()],
        "config": {**config.to_dict(), "preview_every": 0, "iterations": 0},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    name = "+".join(pipe.experts)[:60]
    safe = "".join(c if c.isalnum() or c in "+-_" else "_" for c in name)
    home = Path(os.path.join(folder_paths.get_output_directory(), GATES, "training"))
    folder = home / f"{safe}-{key}"
    if iterations_done(folder) > config.iterations:
        return home / f"{safe}-{key}-{config.iterations}"
    return folder


def iterations_done(folder: Path) -> int:
    """How far the training in a folder is; 0 where there is none."""
    gates = GatesFile(folder / GATES_FILE)
    if not gates.path.is_file():
        return 0
    return (gates.iterations or (0, 0))[0]


def _say(node: str | None) -> Callable[[str], None]:
    return lambda text: show_text(node, text)

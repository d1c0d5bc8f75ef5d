"""Export of a session's mixture as one plain LoRA: what the Export tab and the API do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.app.composing import MAX_STEPS
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.app.stopping import stoppable
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.export import ExportReport
from mole_diffusion.pictures.files import write_picture

FORMATS = {"kohya": "kohya (web UIs, ComfyUI)", "diffusers": "diffusers (PEFT)"}
MAX_RANK = 512


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to write.

    Attributes:
        prompts: calibration prompts.
        form: "kohya" or "diffusers".
        rank: largest rank; 0 keeps everything.
        steps: denoising steps per prompt.
        half: float16.
        strengths: expert -> factor that goes into the file.
        active: the experts that go into the file; None is all chosen ones.

    Raises:
        ConfigError: something is out of range.
    """

    prompts: tuple[str, ...]
    form: str = "kohya"
    rank: int = 0
    steps: int = 20
    half: bool = False
    strengths: dict[str, float] | None = None
    active: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("the prompt is empty: the gates are frozen over at least one prompt")
        if self.form not in FORMATS:
            raise ConfigError(f"format is {self.form!r}; allowed are {list(FORMATS)}")
        rules.whole(1, MAX_RANK).check("rank", self.rank, absent=0)
        rules.whole(1, MAX_STEPS).check("steps", self.steps)


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        report: what was written, and how far it is from the gates.
        before, after: pictures of the first prompt on one seed, with the gates and with the file.
    """

    report: ExportReport
    before: Path
    after: Path


def export(studio: Studio, session: Session, request: ExportRequest, setup: Setup | None = None) -> Work:
    """The work of exporting the chosen experts as they are now, or those of a setup, for `Studio.submit`."""
    setup = setup or session.setup()

    def work(job: Job) -> Exported:
        job.report(0, 0, "Loading the model and its experts")

        def tell(done: int, total: int) -> None:
            job.check()
            job.report(done, total, "Comparing with the gates")

        with studio.opened(setup, request.strengths) as pipe, stoppable(pipe, job.check):
            report: ExportReport = pipe.export_lora(
                session.new_path("export", ".safetensors"),
                request.form,
                prompts=list(request.prompts),
                steps=request.steps,
                rank=request.rank or None,
                active_experts=request.active,
                dtype=torch.float16 if request.half else torch.float32,
                callback=tell,
            )
            job.report(0, 0, "Drawing before and after")
            before = _drawn(session, pipe, request, "before", active_experts=request.active)
            held = pipe.detach_experts()
            try:
                pipe.load_expert(report.path, name="exported")
                after = _drawn(session, pipe, request, "after")
            finally:
                pipe.detach_experts()
                pipe.attach_experts(held)
        return Exported(report, before, after)

    return Work(work, setup, units=(len(request.prompts) + 1) * request.steps)


def _drawn(session: Session, pipe: Any, request: ExportRequest, kind: str, **choice: Any) -> Path:
    """A picture of the first prompt."""
    draws = torch.Generator().manual_seed(0)
    steps = request.steps
    picture = pipe(
        request.prompts[0], num_inference_steps=steps, generator=draws, mixture="gates", **choice
    ).images[0]
    path = session.new_path(kind, ".png")
    write_picture(picture, path)
    return path

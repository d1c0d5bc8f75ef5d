"""Named endpoints for programs (`gradio_client`): compose, train, export; names and arguments are stable."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr

from mole_diffusion.app import show
from mole_diffusion.app.composing import ComposeRequest, compose
from mole_diffusion.app.exporting import ExportRequest, export
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.library import add_file
from mole_diffusion.app.metadata import PictureSettings
from mole_diffusion.app.session import Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.app.train_request import TrainRequest
from mole_diffusion.app.training import start_training
from mole_diffusion.app.uploads import PICTURE_SUFFIXES, check_upload
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.pictures.samplers import SAMPLERS
from mole_diffusion.starter.location import GUIDANCE


def connect(studio: Studio) -> None:
    """Add the endpoints to the page that is being built; nothing of them is seen there."""
    endpoints = _Endpoints(studio)
    with gr.Row(visible=False):
        experts = gr.JSON([], label="experts: names in the library; none are the chosen ones")
        strengths = gr.JSON({}, label="strengths: name -> factor")
        text, negative = gr.Textbox(label="prompt"), gr.Textbox("", label="negative")
        lines = gr.JSON(label="prompts: a list")
        mixture = gr.Textbox("gates", label="mixture")
        objective, form = gr.Textbox("collage", label="objective"), gr.Textbox("kohya", label="format")
        numbers = {
            name: gr.Number(value, label=name, precision=0)
            for name, value in (
                ("seed", 0),
                ("steps", 25),
                ("width", 0),
                ("height", 0),
                ("iterations", 400),
                ("batch", 0),
                ("rank", 0),
                ("count", 1),
            )
        }
        guidance = gr.Number(GUIDANCE, label="guidance")
        drawn = gr.Checkbox(True, label="backgrounds: the base draws them first")
        upload = gr.File(label="file", file_types=[".safetensors"])
        name = gr.Textbox("", label="name")
        file, facts = gr.File(label="file"), gr.JSON(label="facts")
        drawing = [text, experts, numbers["seed"], numbers["steps"], guidance, mixture, strengths, negative]
        drawing += [numbers["width"], numbers["height"]]
        sampler = gr.Textbox("", label=f"sampler: one of {', '.join(SAMPLERS)}, or empty for the model's own")
        begin = gr.File(label="image: a picture to begin from", file_types=list(PICTURE_SUFFIXES))
        anew = gr.Number(ComposeRequest.denoising, label="denoising: how much of it is drawn anew, 0 to 1")
        drawing += [sampler, anew]
        files = gr.File(label="files", file_count="multiple")
        training = [
            lines,
            experts,
            numbers["iterations"],
            objective,
            numbers["seed"],
            numbers["batch"],
            drawn,
        ]
        exporting = [lines, experts, form, numbers["rank"], numbers["steps"], strengths]
        for method, inputs, outputs in (
            (endpoints.compose, [*drawing, begin], [file, facts]),
            (endpoints.compose_several, [*drawing, numbers["count"], begin], [files, facts]),
            (endpoints.train, training, [file, facts]),
            (endpoints.export, exporting, [file, facts]),
            (endpoints.add_expert, [upload, name], [facts]),
            (endpoints.experts, [], [facts]),
            (endpoints.queue, [], [facts]),
        ):
            button = gr.Button(method.__name__)
            button.click(method, inputs, outputs, api_name=method.__name__, concurrency_limit=None)


class _Endpoints:
    """One method per endpoint; their parameters' names are the API's."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    @show.friendly
    async def compose(
        self,
        prompt: str,
        experts: list[str] | None,
        seed: float,
        steps: float,
        guidance: float,
        mixture: str,
        strengths: dict[str, float] | None,
        negative: str,
        width: float,
        height: float,
        sampler: str,
        denoising: float,
        request: gr.Request,
        image: str | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Draw a picture; returns the PNG file, its settings, and what it was drawn with."""
        session, setup = self._asked(request, experts)
        wanted = _drawing(
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            size=(width, height),
            mixture=mixture,
            strengths=strengths,
            sampler=sampler,
            image=image,
            denoising=denoising,
        )
        ((file, facts),) = await self._drawn(session, setup, wanted)
        return file, facts

    @show.friendly
    async def compose_several(
        self,
        prompt: str,
        experts: list[str] | None,
        seed: float,
        steps: float,
        guidance: float,
        mixture: str,
        strengths: dict[str, float] | None,
        negative: str,
        width: float,
        height: float,
        sampler: str,
        denoising: float,
        count: float,
        request: gr.Request,
        image: str | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Draw `count` pictures, of one seed after the other; returns as `compose`, in lists."""
        session, setup = self._asked(request, experts)
        wanted = _drawing(
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            size=(width, height),
            mixture=mixture,
            strengths=strengths,
            sampler=sampler,
            image=image,
            denoising=denoising,
            count=count,
        )
        drawn = await self._drawn(session, setup, wanted)
        return [file for file, _ in drawn], [facts for _, facts in drawn]

    @show.friendly
    async def train(
        self,
        prompts: list[str] | str,
        experts: list[str] | None,
        iterations: float,
        objective: str,
        seed: float,
        batch: float,
        backgrounds: bool,
        request: gr.Request,
    ) -> tuple[str, dict[str, Any]]:
        """Train gates, in use from then on; returns the gates file and the last line of the history."""
        session, setup = self._asked(request, experts)
        wanted = TrainRequest(
            prompts=_lines(prompts),
            iterations=int(iterations),
            objective=objective,
            seed=int(seed),
            batch=int(batch),
            backgrounds=bool(backgrounds),
        )
        training = start_training(self._studio, session, wanted, setup)
        await self._done(session, training.job)
        return str(training.job.result), training.history[-1]

    @show.friendly
    async def export(
        self,
        prompts: list[str] | str,
        experts: list[str] | None,
        format: str,
        rank: float,
        steps: float,
        strengths: dict[str, float] | None,
        request: gr.Request,
    ) -> tuple[str, dict[str, Any]]:
        """Write the mixture as one plain LoRA; returns the file and how far it is from the gates."""
        session, setup = self._asked(request, experts)
        wanted = ExportRequest(
            prompts=_lines(prompts),
            form=format,
            rank=int(rank),
            steps=int(steps),
            strengths={str(k): float(v) for k, v in (strengths or {}).items()} or None,
        )
        job = await self._finish(session, "export", export(self._studio, session, wanted, setup))
        # Without the path: clients take whatever has one for a file to download.
        report = job.result.report
        return str(report.path), {key: value for key, value in report.to_dict().items() if key != "path"}

    @show.friendly
    def add_expert(self, file: str, name: str, request: gr.Request) -> dict[str, Any]:
        """Put a LoRA file into the session's library; returns its name and phrase."""
        session = show.session_of(self._studio, request)
        card = add_file(self._studio, session, Path(file), name)
        return {"name": card.name, "text": card.text}

    @show.friendly
    def experts(self, request: gr.Request) -> dict[str, Any]:
        """The session's library and which of it is chosen."""
        session = show.session_of(self._studio, request)
        library = {name: card.text for name, card in session.library.items()}
        return {"library": library, "chosen": list(session.chosen)}

    @show.friendly
    def queue(self, request: gr.Request) -> dict[str, Any]:
        """How much is waiting, how much of it is yours, and how long the next piece of work would wait."""
        session = show.session_of(self._studio, request)
        load = self._studio.worker.load()
        own = sum(not job.finished for job in session.jobs)
        seconds = None if load.seconds is None else round(load.seconds, 1)
        return {"before_the_next": load.ahead, "yours": own, "seconds": seconds}

    def _asked(self, request: gr.Request, experts: list[str] | None) -> tuple[Session, Setup]:
        """The session, and what this call is done with, whatever the session's next call chooses."""
        session = show.session_of(self._studio, request)
        with session.lock:
            if experts:
                session.choose([str(name) for name in experts])
            return session, session.setup()

    async def _drawn(
        self, session: Session, setup: Setup, wanted: ComposeRequest
    ) -> list[tuple[str, dict[str, Any]]]:
        """Draw; the files, and their facts."""
        job = await self._finish(session, "compose", compose(self._studio, session, wanted, setup=setup))
        return [
            (str(one.path), {"settings": one.settings.to_json(), **drawn_with(one.settings)})
            for one in job.result
        ]

    async def _finish(self, session: Session, kind: str, work: Work) -> Job:
        return await self._done(session, self._studio.submit(session, kind, work))

    async def _done(self, session: Session, job: Job) -> Job:
        await job.finish()
        session.used = time.monotonic()
        show.raise_if_failed(job)
        if job.state == "cancelled":
            raise ConfigError("it was cancelled")
        return job


def _drawing(
    *,
    prompt: str,
    negative: str,
    seed: float,
    steps: float,
    guidance: float,
    size: tuple[float, float],
    mixture: str,
    strengths: dict[str, float] | None,
    sampler: str,
    image: str | None,
    denoising: float,
    count: float = 1,
) -> ComposeRequest:
    """A request of the values of a call.

    Raises:
        ConfigError: something is out of range, or the picture is none.
    """
    if image is not None:
        check_upload(Path(image))
    return ComposeRequest(
        prompt=prompt,
        negative=negative or "",
        seed=int(seed),
        steps=int(steps),
        guidance=float(guidance),
        width=int(size[0]),
        height=int(size[1]),
        mixture=mixture,
        strengths={str(k): float(v) for k, v in (strengths or {}).items()},
        count=int(count),
        sampler=sampler or "",
        image=None if image is None else open_picture(image),
        denoising=float(denoising),
    )


def drawn_with(settings: PictureSettings) -> dict[str, Any]:
    """What a picture was drawn with, in plain values: model, mixture, experts with their strengths, gates."""
    return {
        "model": settings.model,
        "mixture": settings.mixture,
        "experts": {use.name: use.strength for use in settings.experts if use.active},
        "gates": settings.gates,
        "gates_sha256": settings.gates_sha256,
    }


def _lines(prompts: list[str] | str) -> tuple[str, ...]:
    return (prompts,) if isinstance(prompts, str) else tuple(str(prompt) for prompt in prompts or ())

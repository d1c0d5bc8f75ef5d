"""Drawing pictures for a session: what the Compose and Compare tabs and the API do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import ExpertUse, PictureSettings, mask_to_text, save_picture
from mole_diffusion.app.session import Picture, Session
from mole_diffusion.app.studio import Studio
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.opening import drawing_settings
from mole_diffusion.starter.location import GUIDANCE

#: Previews may take this share of the time of drawing.
_PREVIEW_SHARE = 0.2
MAX_STEPS = 150
MAX_SIDE = 2048
_GRID = 8


@dataclass(frozen=True, kw_only=True)
class ComposeRequest:
    """What to draw.

    Attributes:
        strengths: expert -> factor, for the chosen experts; experts without an entry count in full.
        active: the experts that count; None is all chosen ones.
        regions: expert -> mask, white where it counts; of any size.
        width, height: in pixels; 0 is the model's own size.
        mixture: a word of the pipeline's `mixture=`.

    Raises:
        ConfigError: something is out of range.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = GUIDANCE
    width: int = 0
    height: int = 0
    mixture: str = "gates"
    active: tuple[str, ...] | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    regions: Mapping[str, Image.Image] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty: write what the picture should show")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"steps is {self.steps}; allowed are 1 to {MAX_STEPS}")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value and (value % _GRID or not 64 <= value <= MAX_SIDE):
                raise ConfigError(f"{name} is {value}; allowed are multiples of {_GRID}, 64 to {MAX_SIDE}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; allowed are 0 to {2**32 - 1}")
        if not 0 <= self.guidance <= 50:
            raise ConfigError(f"guidance is {self.guidance}; allowed are 0 to 50")


def compose(
    studio: Studio,
    session: Session,
    request: ComposeRequest,
    mixtures: Sequence[str] | None = None,
    prepared: Mapping[str, Any] | None = None,
) -> Callable[[Job], list[Picture]]:
    """The work of drawing one picture, or the same one with several mixtures on the same seed.

    Args:
        studio: the models.
        session: whose experts and gallery.
        request: what to draw.
        mixtures: in place of the request's own.
        prepared: what stands behind the names of mixtures that are no words of the pipeline's.

    Returns:
        For `Studio.submit`; the job's result is the pictures, which are in the gallery too.
    """
    wanted = list(mixtures or [request.mixture])

    def work(job: Job) -> list[Picture]:
        job.report(0, 0, "Loading the model and its experts")
        with studio.opened(session) as pipe:
            width, height = picture_size(pipe, request)
            pictures = []
            for i, mixture in enumerate(wanted):
                behind = (prepared or {}).get(mixture, mixture)
                image = _draw(pipe, session, request, behind, (width, height), job, i, len(wanted))
                pictures.append(_keep(session, pipe, request, mixture, image))
        return pictures

    return work


def picture_size(pipe: Any, request: ComposeRequest) -> tuple[int, int]:
    """Width and height in pixels."""
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return request.width or own, request.height or own


def active_names(session: Session, request: ComposeRequest) -> tuple[str, ...]:
    """The experts that count."""
    chosen = session.chosen
    return chosen if request.active is None else tuple(n for n in chosen if n in request.active)


def call_settings(
    session: Session, request: ComposeRequest, mixture: Any, size: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of the pipeline's call, without its callback."""
    active = active_names(session, request)
    settings: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative or None,
        "num_inference_steps": request.steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "width": size[0],
        "height": size[1],
        **drawing_settings(session.model, request.guidance),
    }
    if not active or mixture == "none":
        return {**settings, "mixture": "none"}
    strengths = {name: float(request.strengths.get(name, 1.0)) for name in active}
    regions = {name: mask.resize(size) for name, mask in request.regions.items() if name in active}
    return {
        **settings,
        "mixture": mixture,
        "active_experts": None if len(active) == len(session.chosen) else list(active),
        "expert_scales": strengths if any(value != 1.0 for value in strengths.values()) else None,
        "region_masks": regions or None,
    }


def step_callback(pipe: Any, job: Job, steps: int, first: int, total: int, note: str) -> Callable[..., Any]:
    """For `callback_on_step_end`: tells how far it is, shows previews where they are cheap, can be cancelled.

    Args:
        pipe: the pipeline.
        job: whom to tell.
        steps: of this picture.
        first: steps done before it.
        total: steps of all pictures.
        note: what is being drawn.
    """
    started, spent = time.monotonic(), 0.0

    def after(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal spent
        job.check()
        preview, now = None, time.monotonic()
        if step + 1 < steps and spent <= (now - started) * _PREVIEW_SHARE:
            preview = decode(pipe, values["latents"])
            spent += time.monotonic() - now
        job.report(first + step + 1, total, note, preview=preview)
        return values

    return after


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """A picture of the latents (batch, 4, h, w) as they are; of the first in the batch."""
    vae = pipe.vae
    pixels = vae.decode((latents[:1] / vae.config.scaling_factor).to(vae.dtype)).sample
    picture: Image.Image = pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]
    return picture


def _draw(
    pipe: Any,
    session: Session,
    request: ComposeRequest,
    mixture: Any,
    size: tuple[int, int],
    job: Job,
    index: int,
    count: int,
) -> Image.Image:
    note = "Drawing" if count == 1 else f"Drawing {index + 1} of {count}"
    after = step_callback(pipe, job, request.steps, index * request.steps, count * request.steps, note)
    settings = call_settings(session, request, mixture, size)
    image: Image.Image = pipe(**settings, callback_on_step_end=after).images[0]
    if settings["mixture"] == "gates":
        session.weights, session.weights_of = pipe.gate_weights(), tuple(pipe.experts)
    return image


def _keep(session: Session, pipe: Any, request: ComposeRequest, mixture: str, image: Image.Image) -> Picture:
    """Save a picture with its settings, in the gallery."""
    active = active_names(session, request)
    trained = "trained" if session.gates() is not None else "fresh"
    settings = PictureSettings(
        prompt=request.prompt,
        negative=request.negative,
        seed=request.seed,
        steps=request.steps,
        guidance=float(request.guidance),
        width=image.width,
        height=image.height,
        mixture=mixture,
        model=session.model,
        gates=trained if mixture == "gates" and active else "",
        experts=tuple(
            ExpertUse(
                name=name,
                sha256=pipe.experts[name].sha256,
                strength=float(request.strengths.get(name, 1.0)),
                active=name in active,
            )
            for name in session.chosen
        ),
        regions={name: mask_to_text(mask) for name, mask in request.regions.items() if name in active},
    )
    picture = Picture(session.new_path("picture", ".png"), settings)
    save_picture(image, picture.path, settings)
    session.keep(picture)
    return picture

"""Drawing pictures for a session: what the Compose and Compare tabs and the API do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image, ImageOps

from mole_diffusion.app.infotext import lora_hash
from mole_diffusion.app.jobs import Job
from mole_diffusion.app.metadata import ExpertUse, PictureSettings, image_digest, mask_to_text, save_picture
from mole_diffusion.app.session import Picture, Session
from mole_diffusion.app.setup import Setup
from mole_diffusion.app.stopping import stoppable
from mole_diffusion.app.studio import Studio, Work
from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.components import guidance_arguments
from mole_diffusion.pictures.denoisers import denoiser_of, own_size
from mole_diffusion.pictures.opening import from_picture
from mole_diffusion.pictures.samplers import SAMPLERS, sampler_of, sampling
from mole_diffusion.pictures.training.workbench import tensor_picture
from mole_diffusion.starter.location import GUIDANCE

#: Previews may take this share of the time of drawing.
_PREVIEW_SHARE = 0.2
#: Axes of latents as pictures: batch, channels, height, width.
_PLAIN = 4
MAX_STEPS = 150
MAX_SIDE = 2048
MAX_COUNT = 16
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
        count: pictures, of one seed after the other.
        sampler: a name of `SAMPLERS`; "" is the model's own.
        image: a picture to begin from; None draws from noise alone.
        denoising: how much of that picture is drawn anew.

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
    count: int = 1
    sampler: str = ""
    image: Image.Image | None = None
    denoising: float = 0.6

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty: write what the picture should show")
        rules.whole(1, MAX_STEPS).check("steps", self.steps)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value and (value % _GRID or not 64 <= value <= MAX_SIDE):
                raise ConfigError(f"{name} is {value}; allowed are multiples of {_GRID}, 64 to {MAX_SIDE}")
        rules.whole(0, 2**32 - 1).check("seed", self.seed)
        rules.number(0, 50).check("guidance", self.guidance)
        rules.whole(1, MAX_COUNT).check("pictures", self.count)
        rules.number(0, 1, above=True).check("denoising", self.denoising)
        rules.word(tuple(SAMPLERS)).check("sampler", self.sampler, absent="")
        if self.image is not None and int(self.steps * self.denoising) < 1:
            raise ConfigError(
                f"{self.steps} steps of which {self.denoising:g} are drawn anew are none: raise one of both"
            )


def compose(
    studio: Studio,
    session: Session,
    request: ComposeRequest,
    mixtures: Sequence[str] | None = None,
    *,
    setup: Setup | None = None,
) -> Work:
    """The work of drawing one picture, or the same one with several mixtures on the same seed.

    Everything it needs is taken here and now; what the session has later changes nothing.

    Args:
        studio: the models.
        session: whose experts and gallery.
        request: what to draw.
        mixtures: in place of the request's own; also names of mixtures that were prepared for the session.
        setup: model, experts and gates; None are the session's chosen ones.

    Returns:
        For `Studio.submit`; the job's result is the pictures, which are in the gallery too.
    """
    wanted = list(mixtures or [request.mixture])
    setup = setup or session.setup()
    prepared = session.prepared_for(setup)
    request = replace(request, regions={name: mask.copy() for name, mask in request.regions.items()})

    def work(job: Job) -> list[Picture]:
        job.report(0, 0, "Loading the model and its experts")
        with studio.opened(setup) as pipe, stoppable(pipe, job.check):
            drawing = _Drawing(session, setup, pipe, job, len(wanted) * request.count)
            seeds = [(request.seed + i) % 2**32 for i in range(request.count)]
            every = [(replace(request, seed=seed), name) for seed in seeds for name in wanted]
            return [drawing.draw(i, *one, prepared.get(one[1], one[1])) for i, one in enumerate(every)]

    area = (request.width * request.height) / (512 * 512) or 1.0
    return Work(work, setup, units=request.steps * len(wanted) * request.count * area)


def picture_size(pipe: Any, request: ComposeRequest) -> tuple[int, int]:
    """Width and height in pixels."""
    height, width = own_size(pipe)
    return request.width or width, request.height or height


def active_names(setup: Setup, request: ComposeRequest) -> tuple[str, ...]:
    """The experts that count."""
    return setup.names if request.active is None else tuple(n for n in setup.names if n in request.active)


def call_settings(
    pipe: Any, setup: Setup, request: ComposeRequest, mixture: Any, size: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of the pipeline's call, without its callback."""
    active = active_names(setup, request)
    settings: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": request.steps,
        "generator": torch.Generator().manual_seed(request.seed),
        "width": size[0],
        "height": size[1],
        **guidance_arguments(pipe, request.guidance, request.negative),
    }
    if not active or mixture == "none":
        return {**settings, "mixture": "none"}
    strengths = {name: float(request.strengths.get(name, 1.0)) for name in active}
    regions = {name: mask.resize(size) for name, mask in request.regions.items() if name in active}
    return {
        **settings,
        "mixture": mixture,
        "active_experts": None if len(active) == len(setup.cards) else list(active),
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
        # Packed latents do not say which proportions they have: these models show no previews.
        plain = values["latents"].dim() == _PLAIN
        if plain and step + 1 < steps and spent <= (now - started) * _PREVIEW_SHARE:
            preview = decode(pipe, values["latents"])
            spent += time.monotonic() - now
        job.report(first + step + 1, total, note, preview=preview)
        return values

    return after


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> Image.Image:
    """A picture of the latents (batch, channels, h, w) as they are; of the first in the batch."""
    return tensor_picture(denoiser_of(pipe).decode(latents[:1])[0])


@dataclass(frozen=True)
class _Drawing:
    """One request at work."""

    session: Session
    setup: Setup
    pipe: Any
    job: Job
    count: int

    def draw(self, index: int, request: ComposeRequest, name: str, mixture: Any) -> Picture:
        """Draw with one mixture and keep the picture; without trained gates, those of the prompt."""
        setup = self.setup
        if name == "gates":
            name = mixture = self.pipe.usual_mixture
        note = "Drawing" if self.count == 1 else f"Drawing {index + 1} of {self.count}"
        first, total = index * request.steps, self.count * request.steps
        after = step_callback(self.pipe, self.job, request.steps, first, total, note)
        size = picture_size(self.pipe, request)
        settings = call_settings(self.pipe, setup, request, mixture, size)
        pipe = self.pipe
        if request.image is not None:
            pipe = from_picture(pipe)
            begun = {"image": ImageOps.fit(request.image, size), "strength": request.denoising}
            settings = {
                key: value for key, value in settings.items() if key not in ("width", "height")
            } | begun
        with sampling(pipe, request.sampler):
            image: Image.Image = pipe(**settings, callback_on_step_end=after, record_maps=True).images[0]
            sampled = sampler_of(pipe)
        picture = self._keep(request, name, image, sampled)
        if settings["mixture"] in ("gates", "auto") and (weights := pipe.gate_weights()):
            active = active_names(setup, request)
            maps = {expert: found[0] for expert, found in pipe.expert_maps().items() if expert in active}
            self.session.note_gates(weights, setup.names, maps, picture)
        return picture

    def _keep(self, request: ComposeRequest, mixture: str, image: Image.Image, sampled: str) -> Picture:
        """Save a picture with its settings, in the gallery."""
        setup = self.setup
        active = active_names(setup, request)
        used = setup.gates_state if mixture == "gates" and active else ""
        file = setup.gates if used else setup.shared if mixture == "auto" else None
        settings = PictureSettings(
            prompt=request.prompt,
            negative=request.negative,
            seed=request.seed,
            steps=request.steps,
            guidance=float(request.guidance),
            width=image.width,
            height=image.height,
            mixture=mixture,
            model=setup.model,
            gates=used,
            gates_sha256="" if file is None else file.sha256,
            experts=tuple(
                ExpertUse(
                    name=card.name,
                    sha256=self.pipe.experts[card.name].sha256,
                    lora_hash=lora_hash(card.path),
                    strength=float(request.strengths.get(card.name, 1.0)),
                    active=card.name in active,
                )
                for card in setup.cards
            ),
            regions={name: mask_to_text(mask) for name, mask in request.regions.items() if name in active},
            sampler=request.sampler,
            sampled=sampled,
            image_sha256="" if request.image is None else image_digest(request.image),
            denoising=1.0 if request.image is None else request.denoising,
        )
        picture = Picture(self.session.new_path("picture", ".png"), settings)
        save_picture(image, picture.path, settings)
        self.session.keep(picture)
        return picture

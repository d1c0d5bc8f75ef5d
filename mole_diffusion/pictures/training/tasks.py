"""Settings of each objective of gate training on pictures, and of how its pictures are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.rules import Rule, quoted
from mole_diffusion.training.settings import check, choice, flag, free, number, share, whole

Layout = Literal["scene", "strips"]
Box = tuple[float, float, float, float]

_LAYOUTS: tuple[Layout, ...] = ("scene", "strips")
_GUIDANCE, _RESCALE = Rule("number", 0.0), Rule("number", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of training: how they are drawn, and where those of the concepts come from.

    Args:
        resolution: Height and width in pixels; None is the model's own size.
        sampling_steps: Steps of the sampling schedule.
        guidance: Scale of classifier-free guidance in every picture that is sampled; None is what the
            pipeline draws with where it says so, else 5. Too much drives the colours of subjects too far.
        guidance_rescale: How far that is kept from overexposing (Lin et al. 2023, 3.4), from 0 to 1; None is
            the pipeline's, else 0.
        source: Where pictures of the concepts come from: `"references"`, `"drawn"` (by each expert alone), or
            `"auto"`: references where a concept has them, drawn where not. (`collage_source`)
        drawn: Pictures an expert draws for one concept, and backgrounds the base draws. (`drawn_pictures`)
        candidates: Pictures that are drawn of a subject for each one that is kept, the best as a CLIP ranks
            them; 1 keeps all and asks no CLIP.
        ranking: That CLIP, as `Clip.model`. (`ranking_clip`)
        autocast: Run the frozen networks in bfloat16 under autocast; gates stay float32.
        gradient_checkpointing: Recompute the activations of denoiser and decoder in the backward pass.
    """

    resolution: int | None = free(None)
    sampling_steps: int = whole(20)
    guidance: float | None = free(None)
    guidance_rescale: float | None = free(None)
    source: Literal["auto", "references", "drawn"] = choice(
        "auto", "references", "drawn", word="collage_source"
    )
    drawn: int = whole(12, word="drawn_pictures")
    candidates: int = whole(1)
    ranking: str | tuple[str, str] | None = free(None, word="ranking_clip")
    autocast: bool = flag(False)
    gradient_checkpointing: bool = flag(False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranking", _as_tuples(self.ranking))
        check(self)
        _check_clip("ranking_clip", self.ranking)
        for word, rule in (("guidance", _GUIDANCE), ("guidance_rescale", _RESCALE)):
            value = getattr(self, word)
            if value is not None and not rule.allows(value):
                raise ConfigError(f"{word} is {value!r}; allowed are {rule.allowed}")
        size = self.resolution
        if size is not None and (not isinstance(size, int) or size < 8 or size % 8):
            raise ConfigError(f"resolution is {size!r}; allowed are multiples of 8")

    def as_drawn_by(self, pipe: Any) -> Pictures:
        """The same with the guidance that a pipeline draws with, where none is given."""
        own: Mapping[str, Any] = getattr(pipe, "call_defaults", {})
        scale = own.get(getattr(pipe, "guided_by", "guidance_scale"))
        rescale = own.get("guidance_rescale")
        return dataclasses.replace(
            self,
            guidance=scale if self.guidance is None else self.guidance,
            # The two belong together.
            guidance_rescale=rescale
            if self.guidance is None and self.guidance_rescale is None
            else self.guidance_rescale,
        )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None is the model's own."""
        return None if self.resolution is None else (self.resolution, self.resolution)


@dataclass(frozen=True, kw_only=True)
class Collage:
    """Denoising loss on cut-and-mixed pictures of the experts.

    Args:
        batch: Collages per iteration. (`collage_batch`)
        layouts: Layouts to choose from at random: `"scene"` (objects in boxes on a background), `"strips"`
            (centre strips of the pictures side by side). (`collage_layouts`)
        target: What the network should say of a noisy collage: `"pictures"` (what leads to the picture) or
            `"experts"` (what each expert alone says where its subject stands, and the base elsewhere, at the
            times of `sampling_steps`; for models that were distilled to few steps). (`collage_target`)
        background: Background of scenes: `"base"` (from pictures the base draws of one object, so that it
            fits the prompt) or `"sources"` (of one of the pictures that are mixed). (`collage_background`)
        objects: Most concepts in one collage; a prompt that names more is learned in parts of so many. Three
            is what small bases draw, and the starter's; `boxes` for more allow more. (`collage_objects`)
        boxes: Boxes of a scene (left, top, right, bottom as shares of the picture), one per concept in the
            order of the prompt; None takes `collage.SCENE_BOXES`. (`collage_boxes`)
        seam: Width of the soft seams as a share of the picture.
        box_jitter: Largest random shift and change of size of a box, as a share of the picture.
        outside_weight: Weight of the denoising loss outside the objects of a scene (1 inside).
        pool_size: Collages kept ready as latents; no more than all iterations take.
        redraw_every: Iterations after which `batch` collages of the pool are made anew.
        empty_prompts: Share of collages that are captioned with the empty prompt.
        prior_weight: Weight of the distance to the prediction of the base alone outside the objects.
    """

    batch: int = whole(6, word="collage_batch")
    layouts: tuple[Layout, ...] = free(("scene",), word="collage_layouts")
    target: Literal["pictures", "experts"] = choice("pictures", "experts", word="collage_target")
    background: Literal["base", "sources"] = choice("base", "sources", word="collage_background")
    objects: int = whole(3, word="collage_objects")
    boxes: tuple[Box, ...] | None = free(None, word="collage_boxes")
    seam: float = share(0.02)
    box_jitter: float = share(0.05)
    outside_weight: float = share(0.5)
    pool_size: int = whole(96)
    redraw_every: int = whole(8)
    empty_prompts: float = share(0.0)
    prior_weight: float = number(0.0)

    def __post_init__(self) -> None:
        for name in ("layouts", "boxes"):
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
        check(self)
        if not self.layouts or set(self.layouts) - set(_LAYOUTS):
            raise ConfigError(
                f"collage_layouts is {self.layouts!r}; allowed are {quoted(_LAYOUTS)}, at least one"
            )
        _check_boxes(self.boxes)
        if self.pool_size < self.batch:
            raise ConfigError(
                f"pool_size is {self.pool_size}; allowed is at least collage_batch ({self.batch})"
            )

    @property
    def needs_backgrounds(self) -> bool:
        """Whether collages stand on backgrounds that the base draws."""
        return "scene" in self.layouts and self.background == "base"


@dataclass(frozen=True, kw_only=True)
class _Guidance:
    """What both kinds of guidance by CLIP have; see `Clip`."""

    batch: int = whole(2, word="batch_size")
    views: int = whole(4)
    crops: int = whole(12)
    global_weight: float = number(1.0)
    local_weight: float = number(1.0)
    contrast_weight: float = number(0.5)
    local: Literal["references", "both", "text"] = choice("references", "both", "text", word="local_against")
    model: str | tuple[str, str] | None = free(None, word="clip")
    decoder: str | None = free(None)
    formula: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _as_tuples(self.model))
        check(self)
        _check_clip("clip", self.model)
        if self.formula not in ("paper", "released"):
            raise ConfigError(f"formula is {self.formula!r}; allowed are 'paper', 'released'")


@dataclass(frozen=True, kw_only=True)
class Clip(_Guidance):
    """Guidance by CLIP, the paper's objective: sample without gradient up to a random step (10-90 % of the
    schedule), and judge the clean picture that one step with gradient predicts.

    Args:
        batch: Pictures per iteration. (`batch_size`)
        views: Augmented views per picture of the global term.
        crops: Crops per picture of the local term.
        global_weight: Weight of the global term.
        local_weight: Weight of the local term.
        contrast_weight: Weight of the contrast between concepts inside the local term.
        local: What crops of the local term are compared with: pictures of each concept (`"references"`), its
            class words (`"text"`) or the mean of `"both"`. Class words ask for any such thing, the base's own
            too, and not for the subject. (`local_against`)
        model: Guidance CLIP of open_clip: a name such as `"local-dir:/folder"`, or a pair (model,
            pretrained). None is the CLIP that comes with the starter. (`clip`)
        decoder: Folder or hub id of an `AutoencoderTiny` that decodes for CLIP in place of the VAE.
        formula: `"paper"` for local and global guidance, `"released"` for the formula of the authors' code.
        truncated_steps: Last steps of a rollout that carry gradient.
    """

    truncated_steps: int = whole(1)


@dataclass(frozen=True, kw_only=True)
class ClipWalk(_Guidance):
    """Guidance by CLIP along a walk as the authors' code takes it: 20-50 steps from a renoised reference, all
    with gradient, an optimiser step every two. It exists to compare the cost. Settings: see `Clip`.
    """


@dataclass(frozen=True, kw_only=True)
class Both:
    """Collages first, guidance by CLIP on top of them later.

    Args:
        collage: The collages.
        clip: The guidance, by the paper's formula.
        weight: Weight of the CLIP terms. (`clip_weight`)
        start: Share of the iterations after which they are added. (`clip_from`)
    """

    collage: Collage = field(default_factory=Collage)
    clip: Clip = field(default_factory=Clip)
    weight: float = number(1.0, word="clip_weight")
    start: float = share(0.5, word="clip_from")

    def __post_init__(self) -> None:
        check(self)
        if self.clip.formula != "paper":
            raise ConfigError("formula 'released' is an objective of its own; allowed with both is 'paper'")


Task = Collage | Clip | ClipWalk | Both


def _check_clip(word: str, model: Any) -> None:
    if model is not None and not isinstance(model, str) and len(model) != 2:
        raise ConfigError(f"{word} is {model!r}; allowed are a model name and a pair (model, pretrained)")


def _check_boxes(boxes: Iterable[Box] | None) -> None:
    for box in boxes or ():
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ConfigError(
                f"collage_boxes has {box!r}; allowed is (left, top, right, bottom), 0 <= left < right <= 1 "
                "and 0 <= top < bottom <= 1"
            )


def _as_tuples(value: Any) -> Any:
    """Lists (from JSON) as tuples, at any depth; strings stay."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_as_tuples(entry) for entry in value)
    return value

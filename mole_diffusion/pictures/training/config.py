"""Settings of gate training on pictures: by objective, or as flat words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mole_diffusion.core import rules
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.rules import Rule, quoted
from mole_diffusion.training.settings import (
    COSMETIC,
    GateSettings,
    check,
    choice,
    flag,
    free,
    number,
    share,
    whole,
    words_of,
)

Objective = Literal["clip", "collage", "both", "released"]
Layout = Literal["scene", "strips"]
Box = tuple[float, float, float, float]

OBJECTIVES: tuple[Objective, ...] = ("clip", "collage", "both", "released")
_LAYOUTS: tuple[Layout, ...] = ("scene", "strips")
_ROLLOUTS = ("step", "walk")
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
        scale, rescale = own.get("guidance_scale"), own.get("guidance_rescale")
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
#: What flat words belong to.
_KINDS = (Pictures, Collage, Clip, Both)


@dataclass(frozen=True, kw_only=True, init=False)
class TrainingConfig(GateSettings):
    """How gates are trained on pictures.

    The defaults are the collage objective, which did best on the starter; `paper` gives the settings of
    "Mixture of LoRA Experts" (Wu et al., 2024).

        TrainingConfig(iterations=200, objective=Collage(batch=4))

    Settings may also be given as flat words, as command lines and YAML files do, and be read as such. A word
    is the name of a field of `Pictures`, `Collage`, `Clip` or `Both`, or what is in brackets behind it there:

        TrainingConfig(iterations=200, objective="collage", collage_batch=4)

    Words of objectives that are not chosen are checked and left aside. `rollout="walk"` is `ClipWalk`.

    Args:
        objective: A `Collage`, `Clip`, `ClipWalk` or `Both`; or a word: `"clip"` (local and global CLIP
            guidance, the paper), `"collage"`, `"both"` (collages first, CLIP on top) or `"released"` (the
            CLIP formula of the authors' code).
        pictures: How pictures are drawn.
        text_encoder_gates: Whether the gates of text encoders are trained; they stay as they are otherwise.
        batch: Pictures per iteration of whatever objective; the pool of collages grows with it. None is the
            objective's own.
        words: Settings of the loop and of gates (`training.settings`), and flat words.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    task: Task
    pictures: Pictures
    text_encoder_gates: bool

    def __init__(
        self,
        *,
        objective: Objective | Task | str | None = None,
        task: Task | None = None,
        pictures: Pictures | None = None,
        text_encoder_gates: bool = True,
        batch: int | None = None,
        **words: Any,
    ) -> None:
        given = _flat(pictures) | _flat(task)
        given |= {"objective": objective} if isinstance(objective, str) else _flat(objective)
        given |= _batch(batch, given | words) | words
        loop = {name: given.pop(name) for name in words_of(GateSettings) if name in given}
        if unknown := sorted(set(given) - _WORDS):
            raise TypeError(f"TrainingConfig() has no settings {unknown}; it has {sorted(known_words())}")
        super().__init__(**loop)
        if not isinstance(text_encoder_gates, bool):
            raise ConfigError(f"text_encoder_gates is {text_encoder_gates!r}; allowed are True and False")
        object.__setattr__(self, "text_encoder_gates", text_encoder_gates)
        object.__setattr__(self, "pictures", Pictures(**_own(Pictures, given)))
        object.__setattr__(self, "task", _task(given, self.pictures))

    def __getattr__(self, name: str) -> Any:
        """A setting by its flat word."""
        if name in _WORDS:
            return self.to_dict()[name]
        raise AttributeError(f"TrainingConfig has no setting {name!r}")

    @classmethod
    def paper(cls, **changes: Any) -> TrainingConfig:
        """Settings of the paper: CLIP objective, 400 iterations, batch 2, learning rate 1e-5, alpha 0.5."""
        settings: dict[str, Any] = {
            "objective": "clip",
            "iterations": 400,
            "batch_size": 2,
            "alpha": 0.5,
            "gate_lr": 1e-5,
            "flatten_lr": 1e-5,
            "scalar_lr": 1e-5,
            "schedule": "constant",
            "guidance": 7.5,
            "guidance_rescale": 0.0,
            "local_against": "both",
            "contrast_weight": 0.0,
        }
        return cls(**{**settings, **changes})

    def as_drawn_by(self, pipe: Any) -> TrainingConfig:
        """The same with the guidance of a pipeline, see `Pictures.as_drawn_by`."""
        return TrainingConfig.from_dict({**self.to_dict(), **_flat(self.pictures.as_drawn_by(pipe))})

    @property
    def objective(self) -> str:
        """The word of the objective."""
        return _objective(self.task)

    @property
    def collage(self) -> Collage | None:
        """The settings of collages, where any iteration trains on them."""
        if isinstance(self.task, Both):
            return self.task.collage
        return self.task if isinstance(self.task, Collage) else None

    @property
    def clip_guidance(self) -> Clip | ClipWalk | None:
        """The settings of guidance by CLIP, where any iteration asks CLIP."""
        if isinstance(self.task, Both):
            return self.task.clip
        return None if isinstance(self.task, Collage) else self.task

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flat words; those of objectives that are not chosen are the defaults."""
        chosen = _flat(self.pictures) | _flat(self.task)
        return {
            **{name: getattr(self, name) for name in words_of(GateSettings)},
            "text_encoder_gates": self.text_encoder_gates,
            **_DEFAULTS,
            **chosen,
        }

    def facts(self) -> dict[str, Any]:
        """The settings that the trained gates depend on."""
        return {name: value for name, value in self.to_dict().items() if name not in COSMETIC}

    def to_json(self) -> str:
        """All settings as one line of JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The reverse of `to_dict`; what is not in it has its default.

        Raises:
            ConfigError: if a setting is unknown or a value is not allowed.
        """
        unknown = sorted(set(values) - known_words())
        if unknown:
            raise ConfigError(
                f"unknown fields {unknown} of TrainingConfig; known are {sorted(known_words())}"
            )
        return cls(**values)


def known_words() -> set[str]:
    """The flat words of `TrainingConfig`."""
    return {*words_of(GateSettings), *_WORDS, "text_encoder_gates", "batch"}


def _words(kind: type) -> dict[str, Any]:
    """Word -> default, of the settings in a class."""
    return {word: getattr(kind, name) for word, name in words_of(kind).items()}


_DEFAULTS: dict[str, Any] = {word: default for kind in _KINDS for word, default in _words(kind).items()}
_DEFAULTS |= {"objective": "collage", "rollout": "step"}
_WORDS = set(_DEFAULTS)


def _objective(task: Task) -> str:
    if isinstance(task, Both):
        return "both"
    if isinstance(task, Collage):
        return "collage"
    return "clip" if task.formula == "paper" else "released"


def _flat(settings: Task | Pictures | None) -> dict[str, Any]:
    """Settings by their words."""
    if settings is None:
        return {}
    found = {word: getattr(settings, name) for word, name in words_of(type(settings)).items()}
    if isinstance(settings, Both):
        found = _flat(settings.collage) | _flat(settings.clip) | found
    if not isinstance(settings, Pictures):
        found |= {"objective": _objective(settings)}
    if isinstance(settings, (Clip, ClipWalk)):
        found |= {"rollout": "walk" if isinstance(settings, ClipWalk) else "step"}
    return found


def _batch(batch: int | None, given: Mapping[str, Any]) -> dict[str, int]:
    """What a number of pictures per iteration means for each objective."""
    if batch is None:
        return {}
    rules.whole().check("batch", batch)
    pool = max(given.get("pool_size", Collage.pool_size), batch)
    return {"batch_size": batch, "collage_batch": batch, "pool_size": pool}


def _own(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class of settings among flat words."""
    return {name: given[word] for word, name in words_of(kind).items() if word in given}


def _task(given: Mapping[str, Any], pictures: Pictures) -> Task:
    """The settings of the chosen objective, from flat words; the words of all others are checked too."""
    objective, rollout = given.get("objective", "collage"), given.get("rollout", "step")
    for name, value, allowed in (("objective", objective, OBJECTIVES), ("rollout", rollout, _ROLLOUTS)):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {quoted(allowed)}")
    collage = Collage(**_own(Collage, given))
    formula: Any = "released" if objective == "released" else "paper"
    clip = Clip(**_own(Clip, given), formula=formula)
    both = Both(collage=collage, **_own(Both, given))
    _check_rollout(clip, pictures)
    if rollout == "walk":
        if objective not in ("clip", "released"):
            raise ConfigError(f"rollout 'walk' needs objective 'clip' or 'released', got {objective!r}")
        if clip.truncated_steps != 1:
            raise ConfigError(
                "rollout 'walk' detaches between steps: "
                f"truncated_steps must be 1, got {clip.truncated_steps}"
            )
        return ClipWalk(**_own(ClipWalk, given), formula=formula)
    if objective == "both":
        return dataclasses.replace(both, clip=clip)
    return collage if objective == "collage" else clip


def _check_rollout(clip: Clip, pictures: Pictures) -> None:
    if clip.truncated_steps > max(1, pictures.sampling_steps // 2):
        raise ConfigError(
            f"truncated_steps is {clip.truncated_steps}; "
            f"allowed is at most half of sampling_steps ({pictures.sampling_steps})"
        )
    if clip.truncated_steps > 1 and pictures.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing recomputes one step of a rollout: "
            f"truncated_steps must be 1, got {clip.truncated_steps}"
        )


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

"""Settings of the gate trainer, checked when they are built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mole_diffusion.core.errors import ConfigError

Objective = Literal["clip", "collage", "both", "released"]
Box = tuple[float, float, float, float]

_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("clip", "collage", "both", "released"),
    "schedule": ("cosine", "constant"),
    "rollout": ("step", "walk"),
    "collage_source": ("auto", "references", "drawn"),
    "collage_background": ("base", "sources"),
    "balance": ("average", "per_gate"),
}
_LAYOUTS = ("scene", "strips")
_POSITIVE_INTEGERS = (
    *("iterations", "batch_size", "collage_batch", "checkpoint_every", "sampling_steps", "truncated_steps"),
    *("views", "crops", "collage_objects", "drawn_pictures", "pool_size", "redraw_every"),
)
_POSITIVE = ("gate_lr", "flatten_lr", "scalar_lr", "gradient_clip")
_NOT_NEGATIVE = (
    "alpha",
    "global_weight",
    "local_weight",
    "contrast_weight",
    "clip_weight",
    "prior_weight",
    "preview_every",
    "guidance",
)
#: Settings that change what is shown and kept, and nothing of what is trained.
_COSMETIC = ("progress", "preview_every", "checkpoint_every")
_SHARES = ("clip_from", "seam", "box_jitter", "outside_weight", "empty_prompts")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How gates are trained.

    The defaults are the collage objective, which did best on the starter; :meth:`paper` gives the settings of
    "Mixture of LoRA Experts" (Wu et al., 2024).

    Args:
        objective: ``"clip"`` (local and global CLIP guidance, the paper), ``"collage"`` (denoising loss on
            cut-and-mixed pictures of the experts), ``"both"`` (collages first, CLIP on top of them from the
            share ``clip_from`` of the iterations on) or ``"released"`` (the CLIP formula of the authors'
            code).
        iterations: Number of iterations.
        batch_size: Pictures per iteration of the CLIP objectives.
        collage_batch: Collages per iteration of the collage objective.
        alpha: Weight of the balance loss, which is 0 when all experts are used equally (paper: Eq. 16).
        balance: ``"average"`` balances the weights averaged over all gates, so that a gate may choose one
            expert where another chooses the next (paper: Eq. 15); ``"per_gate"`` balances every gate alone.
        text_encoder_gates: Whether the gates of text encoders are trained; they stay as they are otherwise.
        gate_lr: Learning rate of the projections of pooled and token gates. Adam moves a gate on normalised
            features by at most ``lr * sqrt(features)`` a step, so 1e-5 would leave it uniform.
        flatten_lr: Learning rate of the projections of flattened gates, which have ``L`` times more inputs.
        scalar_lr: Learning rate of strengths and temperatures.
        schedule: ``"cosine"`` (down to zero at the last iteration) or ``"constant"``.
        gradient_clip: Largest norm of the gradient of all gates together.
        seed: Seed of everything that is drawn.
        checkpoint_every: Iterations between checkpoints, written where the trainer has a folder.
        autocast: Run the frozen networks in bfloat16 under autocast; gates stay float32.
        gradient_checkpointing: Recompute the activations of the UNet and the decoder in the backward pass.
        resolution: Height and width of the pictures in pixels; None is the UNet's own size.
        sampling_steps: Steps of the sampling schedule.
        guidance: Scale of classifier-free guidance in every picture that is sampled.
        rollout: ``"step"`` samples without gradient up to a random step (10-90 % of the schedule) and takes
            one step with gradient; ``"walk"`` walks as the authors' code does (20-50 steps from a renoised
            reference, all with gradient, an optimiser step every two), which exists to compare the cost.
        truncated_steps: Last steps of a rollout that carry gradient.
        views: Augmented views per picture of the global CLIP term.
        crops: Crops per picture of the local CLIP term.
        global_weight: Weight of the global CLIP term.
        local_weight: Weight of the local CLIP term.
        contrast_weight: Weight of the contrast between concepts inside the local CLIP term.
        clip: Guidance CLIP of open_clip: a model name such as ``"local-dir:/folder"``, or a pair (model,
            pretrained). None is the CLIP that comes with the starter.
        decoder: Folder or hub id of an ``AutoencoderTiny`` that decodes for CLIP in place of the VAE.
        clip_weight: Weight of the CLIP terms with ``objective="both"``.
        clip_from: Share of the iterations after which ``objective="both"`` adds the CLIP terms.
        collage_source: Where pictures of the concepts come from: ``"references"``, ``"drawn"`` (by each
            expert alone), or ``"auto"``: references where a concept has them, drawn where not.
        collage_layouts: Layouts to choose from at random: ``"scene"`` (objects in boxes on a background),
            ``"strips"`` (centre strips of the pictures side by side).
        collage_background: Background of scenes: ``"base"`` (from pictures the base draws of one object, so
            that it fits the prompt) or ``"sources"`` (of one of the pictures that are mixed).
        collage_objects: Most concepts in one collage; a prompt that names more is learned in parts of so
            many. Three is what small bases draw, and the starter's; ``collage_boxes`` for more allow more.
        collage_boxes: Boxes of a scene (left, top, right, bottom as shares of the picture), one per concept
            in the order of the prompt; None takes `collage.SCENE_BOXES`.
        seam: Width of the soft seams as a share of the picture.
        box_jitter: Largest random shift and change of size of a box, as a share of the picture.
        outside_weight: Weight of the denoising loss outside the boxes of a scene (1 inside).
        drawn_pictures: Pictures an expert draws for one concept, and backgrounds the base draws.
        pool_size: Collages kept ready as latents.
        redraw_every: Iterations after which ``collage_batch`` collages of the pool are made anew.
        empty_prompts: Share of collages that are captioned with the empty prompt.
        prior_weight: Weight of the distance to the prediction of the base alone outside the boxes of a scene.
        preview_every: Iterations between preview pictures; 0 draws none.
        progress: Show a progress bar.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    objective: Objective = "collage"
    iterations: int = 400
    batch_size: int = 2
    collage_batch: int = 6
    alpha: float = 0.5
    balance: Literal["average", "per_gate"] = "average"
    text_encoder_gates: bool = True
    gate_lr: float = 1e-2
    flatten_lr: float = 1e-5
    scalar_lr: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    gradient_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 50
    autocast: bool = False
    gradient_checkpointing: bool = False
    resolution: int | None = None
    sampling_steps: int = 20
    guidance: float = 5.0
    rollout: Literal["step", "walk"] = "step"
    truncated_steps: int = 1
    views: int = 4
    crops: int = 12
    global_weight: float = 1.0
    local_weight: float = 1.0
    contrast_weight: float = 0.5
    clip: str | tuple[str, str] | None = None
    decoder: str | None = None
    clip_weight: float = 1.0
    clip_from: float = 0.5
    collage_source: Literal["auto", "references", "drawn"] = "auto"
    collage_layouts: tuple[Literal["scene", "strips"], ...] = ("scene",)
    collage_background: Literal["base", "sources"] = "base"
    collage_objects: int = 3
    collage_boxes: tuple[Box, ...] | None = None
    seam: float = 0.02
    box_jitter: float = 0.05
    outside_weight: float = 0.5
    drawn_pictures: int = 12
    pool_size: int = 96
    redraw_every: int = 8
    empty_prompts: float = 0.0
    prior_weight: float = 0.0
    preview_every: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("collage_layouts", "collage_boxes", "clip"):
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
        _check_choices(self)
        _check_ranges(self)
        _check_contradictions(self)
        _check_boxes(self.collage_boxes)

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
            "contrast_weight": 0.0,
        }
        return cls(**{**settings, **changes})

    @property
    def uses_clip(self) -> bool:
        """Whether any iteration asks CLIP."""
        return self.objective != "collage"

    @property
    def uses_collages(self) -> bool:
        """Whether any iteration trains on collages."""
        return self.objective in ("collage", "both")

    @property
    def needs_backgrounds(self) -> bool:
        """Whether collages stand on backgrounds that the base draws."""
        return self.uses_collages and "scene" in self.collage_layouts and self.collage_background == "base"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    def facts(self) -> dict[str, Any]:
        """The fields that the trained gates depend on."""
        return {name: value for name, value in self.to_dict().items() if name not in _COSMETIC}

    def to_json(self) -> str:
        """All fields as one line of JSON."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The reverse of :meth:`to_dict`.

        Raises:
            ConfigError: if a field is unknown or a value is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown fields {unknown} of TrainingConfig; known are {sorted(known)}")
        return cls(**values)


def _as_tuples(value: Any) -> Any:
    """Lists (from JSON) as tuples, at any depth; strings stay."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_as_tuples(entry) for entry in value)
    return value


def _check_choices(config: TrainingConfig) -> None:
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; allowed are {_listed(allowed)}")
    if not config.collage_layouts or set(config.collage_layouts) - set(_LAYOUTS):
        raise ConfigError(
            f"collage_layouts is {config.collage_layouts!r}; allowed are {_listed(_LAYOUTS)}, at least one"
        )
    if config.clip is not None and not isinstance(config.clip, str) and len(config.clip) != 2:
        raise ConfigError(f"clip is {config.clip!r}; allowed are a model name and a pair (model, pretrained)")


def _check_ranges(config: TrainingConfig) -> None:
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; allowed are whole numbers from 1")
    for name in _POSITIVE:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; allowed are numbers above 0")
    for name in _NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; allowed are numbers from 0")
    for name in _SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; allowed are numbers from 0 to 1")
    if config.resolution is not None and (config.resolution < 8 or config.resolution % 8):
        raise ConfigError(f"resolution is {config.resolution!r}; allowed are multiples of 8")


def _check_contradictions(config: TrainingConfig) -> None:
    if config.rollout == "walk" and config.objective not in ("clip", "released"):
        raise ConfigError(f"rollout 'walk' needs objective 'clip' or 'released', got {config.objective!r}")
    if config.rollout == "walk" and config.truncated_steps != 1:
        raise ConfigError(
            f"rollout 'walk' detaches between steps: truncated_steps must be 1, got {config.truncated_steps}"
        )
    if config.truncated_steps > max(1, config.sampling_steps // 2):
        raise ConfigError(
            f"truncated_steps is {config.truncated_steps}; "
            f"allowed is at most half of sampling_steps ({config.sampling_steps})"
        )
    if config.truncated_steps > 1 and config.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing recomputes one step of a rollout: "
            f"truncated_steps must be 1, got {config.truncated_steps}"
        )
    if config.pool_size < config.collage_batch:
        raise ConfigError(
            f"pool_size is {config.pool_size}; allowed is at least collage_batch ({config.collage_batch})"
        )


def _check_boxes(boxes: Iterable[Box] | None) -> None:
    for box in boxes or ():
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ConfigError(
                f"collage_boxes has {box!r}; allowed is (left, top, right, bottom), 0 <= left < right <= 1 "
                "and 0 <= top < bottom <= 1"
            )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(repr(value) for value in values)

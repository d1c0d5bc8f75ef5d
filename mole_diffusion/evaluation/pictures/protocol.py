"""The protocol of an evaluation of pictures: what is drawn, by which methods, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.shared_gates import SharedGates
from mole_diffusion.evaluation.pictures.layers import InLayers
from mole_diffusion.evaluation.protocol import Part, chosen, find_protocol, read_protocol, shipped
from mole_diffusion.pictures.auto import AUTO, AutoMixture
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.starter.location import STARTER, shared_gates_of

__all__ = [
    "ExpertSet",
    "ExpertSource",
    "Metrics",
    "Protocol",
    "Seeds",
    "Variant",
    "load_protocol",
    "named",
    "shipped_protocols",
]

FOLDER = Path(__file__).resolve().parent / "protocols"
ALONE, MASKED, PLAIN = "alone", "masked", "plain"
#: Bases of methods that draw one expert after the other, each with the others' class words.
SINGLE = (ALONE, MASKED, PLAIN)

#: Sets on the contact sheet where the protocol names none, and seeds of each.
SHEET_SETS, SHEET_SEEDS = 3, 4

Clip = str | tuple[str, str]


class ExpertSource(Part):
    """An expert that is not of the starter.

    Attributes:
        file: LoRA file, folder or hub id; relative to the working folder.
        text: phrase with the trigger, as it stands in prompts: "a sks dog".
        class_text: the same in words that any CLIP knows: "a dog"; a style needs none.
        kind: "subject", "style" or "garment", see `Concept`; by default what its phrase tells.
        description: what the subject looks like, in words that the scoring CLIP knows: "a small brown dog".
        references: folder of pictures of the subject, or a list of files.
    """

    file: str
    text: str
    class_text: str = ""
    kind: str = ""
    description: str = ""
    references: str | tuple[str, ...] = ()


class ExpertSet(Part):
    """Experts that are drawn together; written as a list of names, or with a name of its own."""

    experts: tuple[str, ...] = Field(min_length=1)
    name: str = ""

    @property
    def label(self) -> str:
        """Its name, else the experts' names joined: "boot+monster+clock"."""
        return self.name or "+".join(self.experts)


def named(template: str, experts: Sequence[str]) -> tuple[str, ...]:
    """The experts, of a set in its order, whose phrases a template takes up.

    Raises:
        KeyError, IndexError, ValueError: as `str.format`, for a template that these experts cannot fill.
    """
    marks = [f"\0{index}\0" for index in range(len(experts))]
    filled = template.format(*marks, all="".join(marks))
    return tuple(name for name, mark in zip(experts, marks, strict=True) if mark in filled)


class Seeds(Part):
    """Seeds `first` to `first + count - 1` for every prompt."""

    count: int = Field(ge=1)
    first: int = Field(default=0, ge=0)

    @property
    def all(self) -> range:
        """The seeds."""
        return range(self.first, self.first + self.count)


class Variant(Part):
    """One row of the table; written as a word, or with changed settings.

    Attributes:
        name: label in tables and folders.
        base: what it is a variant of, by default `name`: a word of `baselines.METHODS`; or, for limits, one
            expert at a time: "alone" (the only one with a weight), "masked" (all others masked out of the
            trained gates of the method `of`), "plain" (in diffusers' own pipeline, through PEFT).
        of: with gates, the method whose trained gates are used; by default its own, with "masked" those of
            "gates".
        mole: settings of `MoLEConfig` that differ; `preset: paper` or `uniform` starts from that preset.
        training: settings of `TrainingConfig` that differ; `preset: paper` likewise.
        options: settings of `baselines.PrepareOptions`.
        references: train with only the first so many reference pictures; all are scored against.
        seeds: only the first so many seeds, for rows that cost more than they tell.
        guidance: in place of the protocol's.
        auto: settings of `AutoSettings` that differ, with "auto".
        shared: with "auto", the shared gates that refine it: "starter", or a file.
        layers: with "la", from which to which share of their blocks the experts are there.
        balance: with "gates", in place of how they keep styles in balance, see `gated_balance.Styled`.
    """

    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    base: str = ""
    of: str = ""
    mole: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    references: int | None = Field(default=None, ge=1)
    seeds: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    auto: dict[str, float] = Field(default_factory=dict)
    shared: str = ""
    layers: tuple[float, float] | None = None
    balance: float | None = Field(default=None, ge=0)

    @property
    def shared_file(self) -> Path | None:
        """The file of `shared`."""
        if not self.shared:
            return None
        return shared_gates_of(STARTER) if self.shared == STARTER else Path(self.shared)

    def mixture(self) -> Any:
        """What `pipe(mixture=...)` takes, where nothing is prepared.

        Raises:
            ConfigError: `auto` names no setting, or one out of range, or something is with another base than
                it goes with.
            GateMismatchError: `shared` is no file of shared gates.
        """
        file = self.shared_file
        if self.layers is not None:
            if self.kind != "la":
                raise ConfigError(f"{self.name}: layers go with 'la' alone, and this is {self.kind!r}")
            return InLayers(*self.layers)
        if self.balance is not None and self.kind != "gates":
            raise ConfigError(f"{self.name}: balance goes with 'gates' alone, and this is {self.kind!r}")
        if not self.auto and file is None:
            return self.kind
        if file is not None and self.kind != AUTO:
            raise ConfigError(f"{self.name}: shared gates refine {AUTO!r} alone, and this is {self.kind!r}")
        known = [entry.name for entry in fields(AutoSettings)]
        if lost := [name for name in self.auto if name not in known or self.kind != AUTO]:
            raise ConfigError(f"{self.name}: auto has {lost}; allowed are {known}, and for {AUTO!r} alone")
        shared = None if file is None else SharedGates.load(file)
        return AutoMixture(AutoSettings(**self.auto), shared=shared)

    @property
    def kind(self) -> str:
        """The method it is a variant of."""
        return self.base or self.name

    @property
    def single(self) -> bool:
        """Whether it draws one expert at a time."""
        return self.kind in SINGLE


class Metrics(Part):
    """What is measured.

    Attributes:
        judge: "starter" (presence, omission, confusion of subjects), or null for pictures it does not know.
        clip: open_clip models that score; "starter" is the starter's scoring CLIP. None of them may have
            guided a training.
        dino: timm model that scores pictures against references, such as "vit_small_patch16_224.dino" or
            "local-dir:/folder".
        crops: whether image alignment is also measured on the best crop.
    """

    judge: Literal["starter"] | None = "starter"
    clip: tuple[Clip, ...] = ("starter",)
    dino: str | None = None
    crops: bool = True


def _as_method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_set(value: Any) -> Any:
    return {"experts": value} if isinstance(value, (list, tuple)) else value


class Protocol(Part):
    """A whole evaluation.

    Attributes:
        title, note: stand above the table.
        model: "starter", a file, a folder or a hub id.
        experts: experts by name; the starter's need no entry.
        sets: sets of experts.
        prompts: templates; `{all}` is all phrases ("a zorin boot and a kipra clock"), `{0}`, `{1}` the single
            ones. Only experts that a prompt names are measured in its pictures.
        training_prompts: templates that methods are trained with; by default `prompts`.
        seeds: seeds for every prompt, the same for every method.
        methods: rows of the table.
        baseline: the method that paired win rates are against.
        mole, training: settings for all methods, as in `Variant`.
        sampler: a scheduler class of diffusers; null is the model's own.
        steps, guidance, guidance_rescale: as in diffusers.
        size: side of the pictures in pixels; null is the model's own.
        batch: pictures per call.
        dtype: "float32", or "bfloat16" under autocast.
        metrics: what is measured.
        keep_seeds: pictures of the first so many seeds are kept as PNG; null keeps all. Only kept pictures
            can be scored anew.
        sheet: sets on the contact sheet `grid.png`; by default the first three.
        masks: methods with gates whose masked pictures are drawn (Fig. 8), for the sets of the sheet.
        cost_rounds: how often time and memory of every method are measured beside the base's; 0 is never.
    """

    title: str = "Evaluation"
    note: str = ""
    model: str = "starter"
    experts: dict[str, ExpertSource] = Field(default_factory=dict)
    sets: tuple[Annotated[ExpertSet, BeforeValidator(_as_set)], ...] = Field(min_length=1)
    prompts: tuple[str, ...] = Field(min_length=1)
    training_prompts: tuple[str, ...] = ()
    seeds: Seeds
    methods: tuple[Annotated[Variant, BeforeValidator(_as_method)], ...] = Field(min_length=1)
    baseline: str = "nla"
    mole: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    sampler: str | None = None
    steps: int = Field(default=25, ge=1)
    guidance: float = Field(default=7.5, ge=0)
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    size: int | None = Field(default=None, ge=8, multiple_of=8)
    batch: int = Field(default=8, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    metrics: Metrics = Metrics()
    keep_seeds: int | None = Field(default=None, ge=0)
    sheet: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    cost_rounds: int = Field(default=0, ge=0)

    def mole_config(self, method: Variant) -> MoLEConfig:
        """How this method's gates are built."""
        settings = {**self.mole, **method.mole}
        preset = settings.pop("preset", None)
        start = {None: MoLEConfig, "paper": MoLEConfig.paper, "uniform": MoLEConfig.uniform}
        if preset not in start:
            raise ConfigError(f"mole: preset {preset!r}; allowed are 'paper' and 'uniform'")
        return MoLEConfig.from_dict({**start[preset]().to_dict(), **settings})

    def training_config(self, method: Variant) -> TrainingConfig:
        """How this method is trained, where it is."""
        settings = {**self.training, **method.training}
        preset = settings.pop("preset", None)
        if preset not in (None, "paper"):
            raise ConfigError(f"training: preset {preset!r}; allowed is 'paper'")
        start = TrainingConfig.paper() if preset else TrainingConfig()
        return TrainingConfig.from_dict({**start.to_dict(), "progress": False, **settings})

    def prepared_as(self, method: Variant) -> Variant:
        """The method whose preparation it draws with: itself, but for "masked" and where `of` names one.

        Raises:
            ConfigError: that method is not here, or has no gates of its own.
        """
        wanted = method.of or ("gates" if method.kind == MASKED else "")
        if not wanted:
            return method
        found = {entry.name: entry for entry in self.methods if entry.kind == "gates" and not entry.of}
        if wanted not in found or method.kind not in (MASKED, "gates"):
            raise ConfigError(
                f"method {method.name!r} uses the gates of {wanted!r}, which is no method with gates here; "
                f"those are {[*found]}, and only methods with gates use them"
            )
        return found[wanted]

    def method_seeds(self, method: Variant) -> range:
        """The seeds this method draws."""
        return self.seeds.all[: method.seeds]

    def sheet_sets(self) -> list[ExpertSet]:
        """The sets of the contact sheet."""
        return [entry for entry in self.sets if entry.label in self.sheet] or list(self.sets[:SHEET_SETS])

    def restricted(
        self, sets: tuple[str, ...] | None, methods: tuple[str, ...] | None, seeds: int | None
    ) -> Protocol:
        """A smaller protocol: only these sets and methods, and the first so many seeds.

        Raises:
            ConfigError: a name the protocol does not have.
        """
        changes: dict[str, Any] = {}
        if sets is not None:
            changes["sets"] = chosen("set", sets, {entry.label: entry for entry in self.sets})
        if methods is not None:
            changes["methods"] = chosen("method", methods, {entry.name: entry for entry in self.methods})
        if seeds is not None:
            changes["seeds"] = Seeds(count=seeds, first=self.seeds.first)
        return self.model_copy(update=changes)


def shipped_protocols() -> list[str]:
    """Names of the protocols inside the package."""
    return shipped(FOLDER)


def load_protocol(source: str | Path) -> Protocol:
    """A shipped protocol by name, or a YAML file; `extends: OTHER` fills in what a file leaves out.

    Raises:
        ConfigError: no such protocol, or one with unknown or impossible settings, all of which are named.
    """
    path = find_protocol(str(source), FOLDER, Path())
    protocol = read_protocol(Protocol, _PARTS, path, FOLDER)
    _check(protocol, path)
    return protocol


_PARTS: Mapping[str, type[Part]] = {
    "experts": ExpertSource,
    "sets": ExpertSet,
    "seeds": Seeds,
    "methods": Variant,
    "metrics": Metrics,
}


def _check(protocol: Protocol, path: Path) -> None:
    """What no field can see alone.

    Raises:
        ConfigError: names that occur twice or nowhere, templates that cannot be filled, settings of gates or
            trainings that do not exist.
    """
    for what, names in (
        ("sets", [entry.label for entry in protocol.sets]),
        ("methods", [entry.name for entry in protocol.methods]),
        *((f"set {entry.label!r}", list(entry.experts)) for entry in protocol.sets),
    ):
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{path}: {what}: {doubles} more than once")
    smallest = min(len(entry.experts) for entry in protocol.sets)
    for template in (*protocol.prompts, *protocol.training_prompts):
        try:
            taken_up = named(template, ["x"] * smallest)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{path}: prompt {template!r} cannot be filled ({error}); allowed are {{all}} and {{0}} to "
                f"{{{smallest - 1}}}"
            ) from error
        if not taken_up:
            raise ConfigError(f"{path}: prompt {template!r} names no expert; write {{all}} or {{0}}")
    gated = [entry.name for entry in protocol.methods if entry.kind == "gates"]
    for field, wanted, known in (
        ("sheet", protocol.sheet, [entry.label for entry in protocol.sets]),
        ("masks", protocol.masks, gated),
    ):
        if lost := [name for name in wanted if name not in known]:
            raise ConfigError(f"{path}: {field} names {lost}; allowed are {known}")
    for method in protocol.methods:
        protocol.prepared_as(method)
        protocol.mole_config(method)
        protocol.training_config(method)
        method.mixture()

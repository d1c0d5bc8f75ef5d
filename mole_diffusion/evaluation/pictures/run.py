"""An evaluation of pictures: the same seeds drawn by every method, scored, and written down, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.files import file_sha256
from mole_diffusion.evaluation import run
from mole_diffusion.evaluation.gate_records import record_of, record_path, write_record
from mole_diffusion.evaluation.pictures.cost import measure_cost
from mole_diffusion.evaluation.pictures.figures import write_figures
from mole_diffusion.evaluation.pictures.guard import refuse_guides
from mole_diffusion.evaluation.pictures.masks import write_masks
from mole_diffusion.evaluation.pictures.measures import PICTURES
from mole_diffusion.evaluation.pictures.protocol import SHEET_SEEDS, Protocol, Variant
from mole_diffusion.evaluation.pictures.scorers import ClipScorer, Scorer, make_scorers
from mole_diffusion.evaluation.pictures.sets import Scene, make_scene
from mole_diffusion.evaluation.pictures.stage import Drawn, Stage, check_methods, needs_preparation
from mole_diffusion.evaluation.pictures.tables import write_tables
from mole_diffusion.evaluation.results import Results, keep_metrics
from mole_diffusion.evaluation.run import Say
from mole_diffusion.evaluation.schema import Row
from mole_diffusion.evaluation.table import Table
from mole_diffusion.pictures.files import open_picture, write_picture
from mole_diffusion.pictures.opening import pick_device

__all__ = ["Batch", "Pictures", "evaluate", "rescore", "write_report"]

FOLDER = "pictures"


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn in one call."""

    scene: Scene
    method: Variant
    prompt: int
    seeds: tuple[int, ...]
    alone: str | None = None

    @property
    def place(self) -> str:
        """The set."""
        return self.scene.name

    @property
    def maker(self) -> str:
        """The method's name."""
        return self.method.name

    def rows(self) -> list[Row]:
        """What identifies its pictures."""
        return [self.row(seed) for seed in self.seeds]

    def row(self, seed: int) -> Row:
        """What identifies one of its pictures."""
        row: Row = {"set": self.scene.name, "method": self.method.name, "prompt": self.prompt, "seed": seed}
        return row if self.alone is None else {**row, "alone": self.alone}

    def picture(self, seed: int) -> str:
        """Where one of its pictures is kept, below the folder of the evaluation."""
        name = f"{self.prompt}-{seed}" + (f"-{self.alone}" if self.alone else "")
        return f"{FOLDER}/{self.scene.name}/{self.method.name}/{name}.png"


def evaluate(
    protocol: Protocol, out: Path, *, device: torch.device | None = None, say: Say = print, shown: bool = True
) -> Table:
    """Draw and measure what is missing in `out`, then write tables and figures; see `evaluation.run`.

    Args:
        protocol: what to do.
        out: folder of the evaluation; a run that was stopped goes on there.
        device: where; None is the process's own.
        say: called with one line of progress at a time.
        shown: whether to show a progress bar.

    Raises:
        ConfigError: methods or networks that do not exist, a metric that guided a training, or a folder with
            pictures of other settings or measured by other networks.
    """
    on_cpu = (device or torch.device(pick_device("auto"))).type == "cpu"
    state = run.processes(on_cpu)
    domain = Pictures(protocol, out, device or run.device_of(state, on_cpu))
    return run.evaluate(domain, out, state, say=say, shown=shown)


def write_report(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Table:
    """Write the tables and every figure."""
    table = write_tables(protocol, out, rows)
    write_figures(protocol, out, rows, table)
    return table


def rescore(protocol: Protocol, out: Path, *, device: torch.device | None = None, say: Say = print) -> Table:
    """Measure the kept pictures anew, with the protocol's metrics as they are now.

    Raises:
        ConfigError: pictures were not kept, or are of sets that the protocol lacks; see also `evaluate`.
    """
    scorers = _allowed_scorers(protocol, device or torch.device("cpu"))
    scenes = {scene.name: scene for scene in (make_scene(protocol, chosen) for chosen in protocol.sets)}
    results = Results(out, PICTURES)
    rows = results.read()
    if unknown := sorted({row["set"] for row in rows} - set(scenes)):
        raise ConfigError(f"{out} has pictures of {unknown}; the protocol has {list(scenes)}")
    if lost := [row for row in rows if not (out / (row["picture"] or "-")).is_file()]:
        raise ConfigError(f"{len(lost)} of {len(rows)} pictures were not kept and cannot be measured anew")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["method"], row["prompt"], row.get("alone")), []).append(row)
    for done, ((chosen, method, prompt, alone), group) in enumerate(groups.items(), start=1):
        pictures = [open_picture(out / row["picture"]) for row in group]
        for row, found in zip(group, score(scorers, pictures, scenes[chosen], prompt, alone), strict=True):
            row["scores"] = found
        say(f"{done} of {len(groups)}: {chosen}, {method}, prompt {prompt}")
    results.replace(rows)
    keep_metrics(out, identities(scorers))
    return write_report(protocol, out, rows)


def _allowed_scorers(protocol: Protocol, device: torch.device) -> list[Scorer]:
    """The protocol's scorers; ConfigError if one of them guided a training."""
    scorers = make_scorers(protocol.metrics, device)
    clips = (scorer for scorer in scorers if isinstance(scorer, ClipScorer))
    refuse_guides(protocol, {scorer.clip: scorer.hashes for scorer in clips})
    return scorers


def identities(scorers: Sequence[Scorer]) -> list[list[str]]:
    """What tells these scorers from others: kind, measures and numbers of their networks."""
    return [[type(scorer).__name__, *scorer.measures, *sorted(scorer.hashes)] for scorer in scorers]


def score(
    scorers: Sequence[Scorer], pictures: Sequence[Image.Image], scene: Scene, prompt: int, alone: str | None
) -> list[dict[str, Any]]:
    """All measures of pictures of one prompt, of what it names; of an expert alone only its own concept's."""
    concepts = {name: scene.concepts[name] for name in scene.named(prompt) if alone in (None, name)}
    captions = scene.captions(prompt, alone)
    rows: list[dict[str, Any]] = [{} for _ in pictures]
    for scorer in scorers:
        for row, found in zip(rows, scorer(pictures, captions, concepts), strict=True):
            row.update(found)
    if alone is not None:
        for row in rows:
            # The base's own objects were asked for too.
            row.pop("others", None)
    return rows


def settings_of(protocol: Protocol, scenes: Sequence[Scene]) -> dict[str, Any]:
    """What the pictures depend on."""
    drawing = ("model", "sampler", "steps", "guidance", "guidance_rescale", "size", "dtype")
    return {
        "drawing": {name: getattr(protocol, name) for name in drawing},
        "prompts": {str(index): template for index, template in enumerate(protocol.prompts)},
        "sets": {
            scene.name: {name: [c.text, c.class_text] for name, c in scene.concepts.items()}
            for scene in scenes
        },
        "methods": {method.name: _method_settings(protocol, method) for method in protocol.methods},
    }


def _method_settings(protocol: Protocol, method: Variant) -> dict[str, Any]:
    file = method.shared_file
    own = {
        "guidance": method.guidance,
        "auto": method.auto or None,
        "shared": None if file is None else file_sha256(file),
    }
    drawing = {"base": method.kind} | {name: value for name, value in own.items() if value is not None}
    if not needs_preparation(method):
        return drawing
    method = protocol.prepared_as(method)
    return {
        **drawing,
        "mole": protocol.mole_config(method).to_dict(),
        "training": protocol.training_config(method).facts(),
        "options": method.options,
        "references": method.references,
        "training_prompts": list(protocol.training_prompts or protocol.prompts),
    }


class Pictures:
    """The domain of pictures, for `evaluation.run`.

    Args:
        protocol: what is drawn and measured.
        out: folder of the evaluation.
        device: where.

    Raises:
        ConfigError: methods or networks that do not exist, or a metric that guided a training.
    """

    schema = PICTURES

    def __init__(self, protocol: Protocol, out: Path, device: torch.device) -> None:
        check_methods(protocol)
        self._protocol, self._out, self._device = protocol, out, device
        self._scenes = [make_scene(protocol, chosen) for chosen in protocol.sets]
        self._scorers = _allowed_scorers(protocol, device)
        self._stage: Stage | None = None

    def settings(self) -> dict[str, Any]:
        """What the pictures depend on."""
        return settings_of(self._protocol, self._scenes)

    def identities(self) -> list[list[str]]:
        """What tells each scorer from others."""
        return identities(self._scorers)

    def batches(self) -> Iterator[Batch]:
        """All batches, set by set and method by method; always the same, whatever is there already."""
        for scene in self._scenes:
            for method in self._protocol.methods:
                yield from _batches(self._protocol, scene, method)

    def needed(self, batch: Batch) -> tuple[str, str] | None:
        """The set and the method whose preparation it draws with."""
        if not needs_preparation(batch.method):
            return None
        return batch.scene.name, self._protocol.prepared_as(batch.method).name

    def is_ready(self, batch: Batch) -> bool:
        """Whether its method can draw at once."""
        return not needs_preparation(batch.method) or self._on(batch.scene).is_prepared(batch.method)

    def prepare(self, batch: Batch) -> None:
        """Prepare its method for its set."""
        self._on(batch.scene).prepare(batch.method)

    def make(self, batch: Batch, is_wanted: Callable[[Row], bool]) -> list[Row]:
        """Draw, measure and keep; see `evaluation.run.Domain`."""
        drawn = self._on(batch.scene).draw(batch.method, batch.prompt, batch.seeds, batch.alone)
        if batch.prompt == 0 and batch.alone is None:
            self._record(batch)
        found = score(self._scorers, drawn.pictures, batch.scene, batch.prompt, batch.alone)
        return [
            {**row, "picture": self._keep(picture, batch, seed), "scores": scores, **_cost(drawn)}
            for seed, picture, scores in zip(batch.seeds, drawn.pictures, found, strict=True)
            if is_wanted(row := batch.row(seed))
        ]

    def extras(self) -> None:
        """Masked pictures and costs, where the protocol asks for them and they are not there."""
        protocol = self._protocol
        masked = [method for method in protocol.methods if method.name in protocol.masks]
        chosen = [entry.label for entry in protocol.sheet_sets()]
        for scene in self._scenes:
            for method in masked if scene.name in chosen else ():
                write_masks(self._on(scene), method, protocol.seeds.all[:SHEET_SEEDS], self._out)
        if protocol.cost_rounds:
            measure_cost(protocol, self._on(self._scenes[0]), self._out)

    def tables(self, rows: Sequence[Row]) -> Table:
        """Write the tables."""
        return write_tables(self._protocol, self._out, rows)

    def report(self, rows: Sequence[Row]) -> Table:
        """Write the tables and every figure."""
        return write_report(self._protocol, self._out, rows)

    def _on(self, scene: Scene) -> Stage:
        """The stage of a set; one at a time."""
        if self._stage is None or self._stage.scene is not scene:
            self._stage = Stage(self._protocol, scene, self._device, self._out)
        return self._stage

    def _record(self, batch: Batch) -> None:
        """Keep the weights of the gates, if any ran."""
        record = record_of(self._on(batch.scene).pipe.gate_weights())
        if record:
            write_record(record_path(self._out, batch.scene.name, batch.method.name), record)

    def _keep(self, picture: Image.Image, batch: Batch, seed: int) -> str | None:
        limit = self._protocol.keep_seeds
        if limit is not None and seed not in self._protocol.seeds.all[:limit]:
            return None
        write_picture(picture, self._out / batch.picture(seed))
        return batch.picture(seed)


def _cost(drawn: Drawn) -> dict[str, Any]:
    cost: dict[str, Any] = {"seconds": round(drawn.seconds, 4)}
    return cost if drawn.peak_mib is None else {**cost, "peak_mib": round(drawn.peak_mib, 1)}


def _batches(protocol: Protocol, scene: Scene, method: Variant) -> Iterator[Batch]:
    """A method's pictures of a set; always the same batches, whatever is there already."""
    seeds = protocol.method_seeds(method)
    for prompt in range(len(protocol.prompts)):
        for start in range(0, len(seeds), protocol.batch):
            part = tuple(seeds[start : start + protocol.batch])
            for alone in scene.named(prompt) if method.single else [None]:
                yield Batch(scene, method, prompt, part, alone)

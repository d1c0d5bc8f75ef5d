"""The run: everything a protocol asks for is drawn, measured and written down, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.cost import cost_markdown, measure_cost
from mole_diffusion.evaluation.figures import write_figures
from mole_diffusion.evaluation.gate_records import record_of, record_path, write_record
from mole_diffusion.evaluation.guard import refuse_guides
from mole_diffusion.evaluation.masks import write_masks
from mole_diffusion.evaluation.protocol import SHEET_SEEDS, Protocol, Variant
from mole_diffusion.evaluation.results import (
    METRICS,
    Results,
    Row,
    check_metrics,
    check_settings,
    key_of,
    write_text,
)
from mole_diffusion.evaluation.scorers import ClipScorer, Scorer, make_scorers
from mole_diffusion.evaluation.sets import Scene, make_scene
from mole_diffusion.evaluation.stage import Drawn, Stage, check_methods, needs_preparation
from mole_diffusion.evaluation.table import Table, concepts_csv, make_table, to_csv, to_markdown
from mole_diffusion.pictures.files import open_picture
from mole_diffusion.pictures.opening import pick_device
from mole_diffusion.training.progress import Progress

__all__ = ["Batch", "evaluate", "rescore", "write_report"]

PICTURES = "pictures"
#: Other processes wait while one trains gates for hours.
_PATIENCE = timedelta(days=7)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn in one call."""

    scene: Scene
    method: Variant
    prompt: int
    seeds: tuple[int, ...]
    alone: str | None = None

    def row(self, seed: int) -> Row:
        """What identifies one of its pictures."""
        row: Row = {"set": self.scene.name, "method": self.method.name, "prompt": self.prompt, "seed": seed}
        return row if self.alone is None else {**row, "alone": self.alone}

    def picture(self, seed: int) -> str:
        """Where one of its pictures is kept, below the folder of the evaluation."""
        name = f"{self.prompt}-{seed}" + (f"-{self.alone}" if self.alone else "")
        return f"{PICTURES}/{self.scene.name}/{self.method.name}/{name}.png"


def evaluate(
    protocol: Protocol, out: Path, *, device: torch.device | None = None, say: Say = print, shown: bool = True
) -> Table:
    """Draw and measure what is missing in `out`, then write tables.

    Under `accelerate launch` the work is shared among the processes; the first one writes the tables.

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
    from accelerate import PartialState

    on_cpu = (device or torch.device(pick_device("auto"))).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    where = device or state.device
    check_methods(protocol)
    scenes = [make_scene(protocol, chosen) for chosen in protocol.sets]
    scorers = _allowed_scorers(protocol, where)
    results = Results(out, state.process_index)
    if state.is_main_process:
        check_settings(out, settings_of(protocol, scenes))
        check_metrics(out, identities(scorers))
        results.merge()
    state.wait_for_everyone()
    done = {key_of(row) for row in results.read()}
    state.wait_for_everyone()
    work = _Work(protocol, out, where, scorers, results, done)
    mine = work.missing(scenes)
    if state.num_processes > 1:
        _prepare_all(work, mine, state.process_index, state.num_processes, say)
        state.wait_for_everyone()
        mine = mine[state.process_index :: state.num_processes]
    work.run(mine, say, shown=shown and state.is_main_process, report=state.num_processes == 1)
    state.wait_for_everyone()
    table: Table = {}
    if state.is_main_process:
        work.extras(scenes)
        table = write_report(protocol, out, results.merge())
    state.wait_for_everyone()
    return table


def write_tables(protocol: Protocol, out: Path, rows: Sequence[Row]) -> Table:
    """Write `table.md`, `table.csv`, `concepts.csv` and `cost.md` of what there is."""
    table = make_table(protocol, rows)
    write_text(out / "table.md", to_markdown(protocol, table))
    write_text(out / "table.csv", to_csv(table))
    write_text(out / "concepts.csv", concepts_csv(protocol, rows))
    if costs := cost_markdown(protocol, out):
        write_text(out / "cost.md", costs)
    return table


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
    results = Results(out)
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
    write_text(out / METRICS, json.dumps(identities(scorers), indent=1) + "\n")
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
    drawing = {"base": method.kind} | ({} if method.guidance is None else {"guidance": method.guidance})
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


@dataclass
class _Work:
    """What one process needs to draw and measure."""

    protocol: Protocol
    out: Path
    device: torch.device
    scorers: Sequence[Scorer]
    results: Results
    done: set[Any]
    stage: Stage | None = None

    def missing(self, scenes: Sequence[Scene]) -> list[Batch]:
        """The batches with a picture that is not there yet, set by set and method by method."""
        return [
            batch
            for scene in scenes
            for method in self.protocol.methods
            for batch in _batches(self.protocol, scene, method)
            if any(key_of(batch.row(seed)) not in self.done for seed in batch.seeds)
        ]

    def on(self, scene: Scene) -> Stage:
        """The stage of a set; one at a time."""
        if self.stage is None or self.stage.scene is not scene:
            self.stage = Stage(self.protocol, scene, self.device, self.out)
        return self.stage

    def run(self, batches: Sequence[Batch], say: Say, *, shown: bool, report: bool) -> None:
        """Draw and measure; with `report`, the tables are written after every set."""
        total = sum(len(batch.seeds) for batch in batches)
        if total:
            say(f"{total} pictures to draw, {len(self.done)} are there")
        drawn = 0
        with Progress("pictures", total, shown=shown) as progress:
            before: Batch | None = None
            for batch in batches:
                if before is not None and report and before.scene is not batch.scene:
                    write_tables(self.protocol, self.out, self.results.merge())
                before = batch
                new = needs_preparation(batch.method) and not self.on(batch.scene).is_prepared(batch.method)
                what = f"{batch.scene.name}, {batch.method.name}"
                progress.update(drawn, f"{what}: preparing" if new else what)
                self._draw(batch)
                drawn += len(batch.seeds)
                progress.update(drawn, what)

    def extras(self, scenes: Sequence[Scene]) -> None:
        """Masked pictures and costs, where the protocol asks for them and they are not there."""
        protocol = self.protocol
        masked = [method for method in protocol.methods if method.name in protocol.masks]
        chosen = [entry.label for entry in protocol.sheet_sets()]
        for scene in scenes:
            for method in masked if scene.name in chosen else ():
                write_masks(self.on(scene), method, protocol.seeds.all[:SHEET_SEEDS], self.out)
        if protocol.cost_rounds:
            measure_cost(protocol, self.on(scenes[0]), self.out)

    def _draw(self, batch: Batch) -> None:
        drawn = self.on(batch.scene).draw(batch.method, batch.prompt, batch.seeds, batch.alone)
        if batch.prompt == 0 and batch.alone is None:
            self._record(batch)
        found = score(self.scorers, drawn.pictures, batch.scene, batch.prompt, batch.alone)
        rows = []
        for seed, picture, scores in zip(batch.seeds, drawn.pictures, found, strict=True):
            row = batch.row(seed)
            if key_of(row) in self.done:
                continue
            kept = self._keep(picture, batch, seed)
            rows.append({**row, "picture": kept, "scores": scores, **_cost(drawn)})
        self.results.append(rows)

    def _record(self, batch: Batch) -> None:
        """Keep the weights of the gates, if any ran."""
        record = record_of(self.on(batch.scene).pipe.gate_weights())
        if record:
            write_record(record_path(self.out, batch.scene.name, batch.method.name), record)

    def _keep(self, picture: Image.Image, batch: Batch, seed: int) -> str | None:
        limit = self.protocol.keep_seeds
        if limit is not None and seed not in self.protocol.seeds.all[:limit]:
            return None
        path = self.out / batch.picture(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
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


def _prepare_all(work: _Work, batches: Sequence[Batch], index: int, count: int, say: Say) -> None:
    """This process's share of the preparations."""
    wanted = {
        (batch.scene.name, work.protocol.prepared_as(batch.method).name): batch
        for batch in batches
        if needs_preparation(batch.method)
    }
    for batch in list(wanted.values())[index::count]:
        say(f"Preparing {batch.method.name} for {batch.scene.name}")
        work.on(batch.scene).prepare(batch.method)

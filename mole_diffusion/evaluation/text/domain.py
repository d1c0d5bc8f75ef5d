"""An evaluation of texts: the same items answered by every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.core.files import replacing
from mole_diffusion.core.records import in_order
from mole_diffusion.evaluation import run
from mole_diffusion.evaluation.results import write_text
from mole_diffusion.evaluation.run import Say
from mole_diffusion.evaluation.schema import Heading, Row, Schema
from mole_diffusion.evaluation.table import ALL, Table, make_table, to_csv, to_grid
from mole_diffusion.evaluation.text.methods import SEEDED, Methods, TextBatch
from mole_diffusion.evaluation.text.protocol import TextProtocol, plain
from mole_diffusion.evaluation.text.scorers import scores_of
from mole_diffusion.starter.location import STARTER
from mole_diffusion.starter.text.identity import starter_identity
from mole_diffusion.training.heat_map import gate_heat_map

TEXTS = Schema(
    items="answers",
    verb="write",
    key=("task", "method", "seed", "item"),
    pair=("task", "item", "seed"),
    n_unit=1,
    headings={
        "score": Heading("score", is_share=True),
        "exact": Heading("exact", is_share=True),
        "bleu": Heading("BLEU", is_share=True),
        "rouge1": Heading("ROUGE-1", is_share=True),
        "rouge2": Heading("ROUGE-2", is_share=True),
        "rougeL": Heading("ROUGE-L", is_share=True),
        "ends": Heading("ends", is_share=True),
    },
    wins=("score",),
)
_BATCH = 50


class Texts:
    """The domain of texts; see `evaluation.run.Domain`.

    Args:
        protocol: what to do.
        out: folder of the evaluation.
        device: where.
    """

    schema = TEXTS

    def __init__(self, protocol: TextProtocol, out: Path, device: torch.device) -> None:
        self._protocol, self._out = protocol, out
        self._methods = Methods(protocol, out, device)

    def settings(self) -> dict[str, Any]:
        """What the answers depend on."""
        found = plain(self._protocol)
        for name in ("tasks", "seeds", "items", "title", "baseline"):
            found.pop(name)
        if self._protocol.model == STARTER:
            # Experts that were trained anew are others, and so is a task that was mended.
            names, methods = self._protocol.names, self._protocol.methods.values()
            experts = {
                one for name in names for way in methods for one in self._protocol.experts_for(name, way)
            }
            found["starter"] = starter_identity(names, experts | set(names))
        return found

    def identities(self) -> list[list[str]]:
        """The measures are the same for all."""
        return [
            ["exact", "LoRAHub's normalisation"],
            ["bleu", "sacreBLEU 13a, of a sentence"],
            ["rouge", "F"],
        ]

    def batches(self) -> Iterator[TextBatch]:
        """Task by task, method by method."""
        for name in self._protocol.names:
            items = len(self._methods.task(name).test)
            for method, variant in self._protocol.methods.items():
                seeds = self._protocol.seeds if variant.kind in SEEDED else 1
                yield from (TextBatch(name, method, seed, items) for seed in range(seeds))

    def needed(self, batch: TextBatch) -> Hashable | None:
        """What is trained or searched is so for one task, method and seed."""
        return self._methods.needed(batch)

    def is_ready(self, batch: TextBatch) -> bool:
        """Whether what it needs is there."""
        return self._methods.is_ready(batch)

    def prepare(self, batch: TextBatch) -> None:
        """Train or search what is needed and not there."""
        self._methods.prepare(batch)

    def make(self, batch: TextBatch, is_wanted: Callable[[Row], bool]) -> list[Row]:
        """Answer all items and score them; of gates, draw their mean weights (Fig. 7, left)."""
        self.prepare(batch)
        methods, model = self._methods, self._methods.model
        task, rows = methods.task(batch.place), batch.rows()
        start = time.monotonic()
        with methods.answering(batch) as mixture:
            texts = [one.source for one in task.test]
            with model.recording():
                answers = model.answer(
                    texts, batch_size=_BATCH, mixture=mixture, top_k=methods.variant(batch).top_k,
                    max_new_tokens=self._protocol.tokens,
                )  # fmt: skip
            recorded, names = model.gate_weights(), list(model.experts)
        seconds = (time.monotonic() - start) / len(rows)
        weights = {label: weight for (label,), weight in recorded.mean("expert").items()}
        if recorded and batch.seed == 0:
            tables = in_order(recorded.means(), names)
            figure = gate_heat_map(tables, names, title=f"{batch.place}, {batch.maker}")
            path = self._out / "gate-weights" / f"{batch.place}-{batch.maker}.png"
            with replacing(path) as temporary:
                figure.save(temporary, format="png")
        made = []
        for row, example, answer in zip(rows, task.test, answers, strict=True):
            if is_wanted(row):
                scores = scores_of(answer, [example.target, *example.also], task.metric)
                # An answer that fills all its tokens never came to an end.
                scores["ends"] = float(len(model.tokenizer(answer).input_ids) < self._protocol.tokens)
                made.append(
                    {**row, "scores": scores, "seconds": seconds, "answer": answer, "weights": weights}
                )
        return made

    def extras(self) -> None:
        """Nothing beside."""

    def tables(self, rows: Sequence[Row]) -> Table:
        """Write `table.md` and `table.csv`: all tasks, families, and every task."""
        protocol = self._protocol
        families: dict[str, list[str]] = {}
        for name in protocol.names:
            families.setdefault(self._methods.task(name).family, []).append(name)
        places = {ALL: list(protocol.names), **(families if len(families) > 1 else {})}
        places |= {name: [name] for name in protocol.names}
        table = make_table(TEXTS, rows, places, list(protocol.methods), protocol.baseline)
        lines = [
            f"# {protocol.title}",
            "",
            f"{len(protocol.names)} tasks, {protocol.items} held-out items each, {protocol.seeds} seeds.",
            "",
            *to_grid(TEXTS, table, "task"),
            "",
            "Mean and 95 % bootstrap interval over tasks (of one task: over items). *score*: exact match, "
            "BLEU or ROUGE-L, as the paper has it for the task; *ends*: answers that came to an end; *wins* "
            f"against {protocol.baseline} on the same item.",
        ]
        write_text(self._out / "table.md", "\n".join(lines) + "\n")
        write_text(self._out / "table.csv", to_csv(TEXTS, table))
        return table

    def report(self, rows: Sequence[Row]) -> Table:
        """The tables."""
        return self.tables(rows)


def evaluate_texts(
    protocol: TextProtocol, out: Path, *, device: torch.device, say: Say = print, shown: bool = True
) -> Table:
    """Answer and measure what is missing in `out`, then write tables; see `evaluation.run`.

    Raises:
        ConfigError: tasks or experts that do not exist, or a folder with answers of other settings.
    """
    state = run.processes(device.type == "cpu")
    return run.evaluate(Texts(protocol, out, device), out, state, say=say, shown=shown)

"""The run of an evaluation: everything a domain asks for is made, measured and written down, once.

What is made (pictures, answers) and how it is measured is the `Domain`'s. Under `accelerate launch` the work
is shared among the processes; the first one writes the tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from mole_diffusion.evaluation.results import Results, check_metrics, check_settings
from mole_diffusion.evaluation.schema import Row, Schema
from mole_diffusion.evaluation.table import Table
from mole_diffusion.training.progress import Progress

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["Batch", "Domain", "Say", "device_of", "evaluate", "processes", "shared_card"]

#: Other processes wait while one trains gates for hours.
_PATIENCE = timedelta(days=7)

Say = Callable[[str], None]


class Batch(Protocol):
    """Items that are made in one call."""

    @property
    def place(self) -> str:
        """Where they stand in the table: a set of experts, a task."""

    @property
    def maker(self) -> str:
        """Name of the method that makes them."""

    def rows(self) -> Sequence[Row]:
        """What identifies each of them."""


B = TypeVar("B", bound=Batch)


class Domain(Protocol[B]):
    """What is evaluated in one domain.

    Attributes:
        schema: how its rows are read.
    """

    schema: Schema

    def settings(self) -> dict[str, Any]:
        """What the items depend on: nested mappings and lists of plain values."""

    def identities(self) -> list[list[str]]:
        """What tells each of its scorers from others."""

    def batches(self) -> Iterable[B]:
        """All batches, place by place; always the same ones, whatever is there already."""

    def needed(self, batch: B) -> Hashable | None:
        """What must be trained, searched or merged before this batch can be made; None for nothing."""

    def is_ready(self, batch: B) -> bool:
        """Whether what it needs is there."""

    def prepare(self, batch: B) -> None:
        """Train, search or merge what it needs, if that is not there."""

    def make(self, batch: B, is_wanted: Callable[[Row], bool]) -> list[Row]:
        """Make a whole batch and measure it.

        Args:
            batch: what is made.
            is_wanted: tells, of one of its rows, whether it is not there yet.

        Returns:
            The wanted rows with their scores.
        """

    def extras(self) -> None:
        """What is made beside the batches, where it is not there."""

    def tables(self, rows: Sequence[Row]) -> Table:
        """Write the tables of what there is."""

    def report(self, rows: Sequence[Row]) -> Table:
        """Write the tables and every figure."""


def processes(on_cpu: bool) -> PartialState:
    """The processes of `accelerate launch`, or this one alone.

    Where there are more of them than cards, they share the cards. Small networks leave most of a card idle.
    """
    from accelerate import PartialState

    card = None if on_cpu else shared_card(os.environ, torch.cuda.device_count())
    if card is None:
        return PartialState(cpu=on_cpu, timeout=_PATIENCE)
    torch.cuda.set_device(card)
    # The cards' own way of talking wants a card for each.
    return PartialState(cpu=True, timeout=_PATIENCE)


def shared_card(environ: Mapping[str, str], cards: int) -> int | None:
    """The card of this process where the processes of a machine outnumber its cards; None where they do not.

    Args:
        environ: as `torchrun` and `accelerate launch` set it.
        cards: of this machine.
    """
    if not 0 < cards < int(environ.get("LOCAL_WORLD_SIZE", "1")):
        return None
    return int(environ["LOCAL_RANK"]) % cards


def wait(state: PartialState) -> None:
    """Until all processes have come so far."""
    if state.num_processes > 1 and state.device.type == "cpu":
        # Accelerate would name a card for each process.
        torch.distributed.barrier()
    else:
        state.wait_for_everyone()


def device_of(state: PartialState, on_cpu: bool) -> torch.device:
    """Where a process of `processes` computes."""
    own: torch.device = state.device
    if on_cpu or own.type != "cpu":
        return own
    return torch.device("cuda", torch.cuda.current_device())


def evaluate(
    domain: Domain[B], out: Path, state: PartialState, *, say: Say = print, shown: bool = True
) -> Table:
    """Make and measure what is missing in `out`, then write tables.

    Args:
        domain: what to do.
        out: folder of the evaluation; a run that was stopped goes on there.
        state: see `processes`.
        say: called with one line of progress at a time.
        shown: whether to show a progress bar.

    Returns:
        The table; empty in all processes but the first.

    Raises:
        ConfigError: a folder with items of other settings or measured otherwise; and what the domain raises.
    """
    results = Results(out, domain.schema, state.process_index)
    if state.is_main_process:
        check_settings(out, domain.settings(), domain.schema)
        check_metrics(out, domain.identities(), domain.schema)
        results.merge()
    wait(state)
    done = {domain.schema.key_of(row) for row in results.read()}
    wait(state)

    def is_wanted(row: Row) -> bool:
        return domain.schema.key_of(row) not in done

    mine = [batch for batch in domain.batches() if any(map(is_wanted, batch.rows()))]
    if state.num_processes > 1:
        _prepare_all(domain, mine, state, say)
        wait(state)
        mine = mine[state.process_index :: state.num_processes]
    n_items = sum(len(batch.rows()) for batch in mine)
    if n_items:
        say(f"{n_items} {domain.schema.items} to {domain.schema.verb}, {len(done)} are there")
    with Progress(domain.schema.items, n_items, shown=shown and state.is_main_process) as progress:
        _make_all(domain, mine, is_wanted, results, progress, report=state.num_processes == 1)
    wait(state)
    table: Table = {}
    if state.is_main_process:
        domain.extras()
        table = domain.report(results.merge())
    wait(state)
    return table


def _make_all(
    domain: Domain[B],
    batches: Sequence[B],
    is_wanted: Callable[[Row], bool],
    results: Results,
    progress: Progress,
    *,
    report: bool,
) -> None:
    """Make and measure; with `report`, the tables are written after every place."""
    made, before = 0, ""
    for batch in batches:
        if report and before not in ("", batch.place):
            domain.tables(results.merge())
        before = batch.place
        what = f"{batch.place}, {batch.maker}"
        progress.update(made, what if domain.is_ready(batch) else f"{what}: preparing")
        results.append(domain.make(batch, is_wanted))
        made += len(batch.rows())
        progress.update(made, what)


def _prepare_all(domain: Domain[B], batches: Sequence[B], state: PartialState, say: Say) -> None:
    """This process's share of the preparations."""
    wanted = {needed: batch for batch in batches if (needed := domain.needed(batch)) is not None}
    for batch in list(wanted.values())[state.process_index :: state.num_processes]:
        say(f"Preparing {batch.maker} for {batch.place}")
        domain.prepare(batch)

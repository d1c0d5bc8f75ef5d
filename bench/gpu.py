"""What gated experts cost on a GPU: steps of SD 1.5 and SDXL at full width, and the training of gates.

    python bench/gpu.py                       # writes bench/results/gpu-CARD.md and .json
    python bench/gpu.py --device cpu --tiny   # seconds; shows that it works, measures nothing of interest

Weights are random. The variants of a network share its weights; a round runs every variant once, each round
in another order, and a ratio compares two runs of one round. Reported: medians.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import nn

from bench.gate_training import train_gates
from bench.measuring import (
    MIB,
    Variant,
    allocated,
    launches,
    machine,
    measure,
    mebibytes,
    median_ratio,
    operations,
    peak_of,
)
from bench.networks import (
    RANK,
    SD15,
    SDXL,
    TINY,
    TINY_XL,
    Shape,
    activate_adapters,
    add_adapters,
    experts_of,
    forward_of,
    gated,
    make_unet,
    relative_error,
    share_weights,
)
from mole_diffusion.core.config import MoLEConfig

COUNTS = (1, 3, 16, 64)
TINY_COUNTS = (1, 3)
#: A picture without guidance, and one with.
BATCHES = (1, 2)
POOLED = 3
BARE = "bare network"
#: Of the time, by which the steps of SD 1.5 and then those of SDXL are done; the rest trains gates.
SHARES = (0.4, 0.75)


@dataclass
class Bench:
    """The variants of one network.

    Attributes:
        shape, device: what runs where.
        networks: variant -> network.
        adapters: variant -> names of the PEFT adapters that must be active in it.
        resident: variant -> bytes that it keeps on the device beside the bare weights.
        missing: variant -> why it is not there.
    """

    shape: Shape
    device: torch.device
    networks: dict[str, nn.Module] = field(default_factory=dict)
    adapters: dict[str, list[str]] = field(default_factory=dict)
    resident: dict[str, int | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def variants(self, batch: int) -> dict[str, Variant]:
        """What to run, for this number of latents."""
        made = {}
        for name, network in self.networks.items():
            forward = forward_of(network, self.shape, batch, self.device)
            adapters = self.adapters.get(name)
            made[name] = Variant(forward, partial(activate_adapters, network, adapters) if adapters else None)
        return made


def ours(count: int, pooling: str = "token") -> str:
    """Name of the variant with gated experts."""
    return f"{count} expert{'s' * (count > 1)}, {pooling} gates"


def theirs(count: int) -> str:
    """Name of the variant with PEFT's adapters."""
    return f"PEFT, {count} adapter{'s' * (count > 1)}"


def build(shape: Shape, device: torch.device, counts: Sequence[int]) -> Bench:
    """The bare network, ours and PEFT's with every number of experts, all with the same weights."""
    bench = Bench(shape, device)
    bare = bench.networks[BARE] = make_unet(shape, device)
    names = [f"expert{i}" for i in range(max(counts))]
    before = allocated(device)
    with_peft = share_weights(bare)
    add_adapters(with_peft, names)
    each = None if before is None else ((allocated(device) or 0) - before) // len(names)
    for count in counts:
        bench.networks[theirs(count)] = with_peft
        bench.adapters[theirs(count)] = names[:count]
        bench.resident[theirs(count)] = None if each is None else each * count
    experts = experts_of(with_peft, names)
    for count, pooling in [*((count, "token") for count in counts), (POOLED, "mean")]:
        _add_ours(bench, bare, experts[:count], pooling)
    return bench


def _add_ours(bench: Bench, bare: Any, experts: Sequence[Any], pooling: str) -> None:
    name, network = ours(len(experts), pooling), share_weights(bare)
    before = allocated(bench.device)
    mixture = None
    try:
        mixture = gated(network, experts, MoLEConfig(pooling=pooling))
        forward_of(network, bench.shape, max(BATCHES), bench.device)()
    except torch.cuda.OutOfMemoryError:
        bench.missing[name] = "out of memory"
        if mixture is not None:
            mixture.eject()
            mixture.release()
        return
    bench.networks[name] = network
    bench.resident[name] = None if before is None else (allocated(bench.device) or 0) - before


@torch.no_grad()
def steps(
    shape: Shape,
    device: torch.device,
    counts: Sequence[int],
    rounds: int,
    until: float,
    told: Callable[[dict[str, Any]], None],
) -> None:
    """Time, operations and memory of a step of every variant, for every batch.

    Args:
        until: value of `time.monotonic` at which measuring should be done.
        told: is given what there is so far, at the beginning and after every row.
    """
    bench = build(shape, device, counts)
    weights = sum(p.numel() * p.element_size() for p in bench.networks[BARE].parameters())
    result: dict[str, Any] = {
        "shape": shape.name,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "weights_mib": weights // MIB,
        "against_peft": _check(bench),
        "missing": bench.missing,
        "batches": {},
    }
    told(result)
    for number, batch in enumerate(BATCHES, start=1):
        if number > 1 and time.monotonic() > until:
            result["batches_skipped"] = list(BATCHES[number - 1 :])
            break
        variants = bench.variants(batch)
        left = until - time.monotonic()
        # Rounds take half of a batch's share, operations and memory of each row the rest.
        share = time.monotonic() + left * (number - 0.5) / len(BATCHES)
        seconds = measure(variants, rounds, device, share)
        rows: dict[str, Any] = {name: {"seconds": seconds[name]} for name in variants}
        result["batches"][str(batch)] = {"latents": [batch, 4, shape.side, shape.side], "rows": rows}
        told(result)
        for name, variant in variants.items():
            if time.monotonic() > until:
                break
            variant.prepare()
            rows[name] |= {
                "operations": operations(variant.forward),
                "launches": launches(variant.forward, device),
                "peak": peak_of(variant.forward, device),
                "resident": bench.resident.get(name),
            }
            told(result)


def _check(bench: Bench) -> float:
    """One expert against PEFT with that adapter alone: relative difference of their outputs."""
    variants = bench.variants(1)
    outputs = []
    for name in (ours(1), theirs(1)):
        variants[name].prepare()
        outputs.append(variants[name].forward())
    return relative_error(*outputs)


def steps_markdown(result: dict[str, Any], counts: Sequence[int]) -> list[str]:
    """The tables of one network."""
    lines = [
        f"## A step of {result['shape']}",
        "",
        f"Weights of {result['weights_mib']:,} MiB in {result['dtype']}, experts of rank {RANK}. One expert"
        f" against PEFT with that adapter: relative difference {result['against_peft']:.1e}.",
        "",
    ]
    for entry in result["batches"].values():
        rows = entry["rows"]
        lines += [
            f"Latents {entry['latents']}, medians of {len(rows[BARE]['seconds'])} rounds:",
            "",
            "| variant | ms | x bare | x PEFT with as many | operations | x bare | launches | x bare "
            "| kept on the device, MiB | a step needs, MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(name, rows, counts) for name in rows]
        lines += [f"| {name} | {why} |{' |' * 8}" for name, why in result["missing"].items()]
        lines += [""]
    return lines


def _row(name: str, rows: dict[str, Any], counts: Sequence[int]) -> str:
    row, bare = rows[name], rows[BARE]
    partner = next((theirs(count) for count in counts if name == ours(count)), None)
    against = f"{median_ratio(row['seconds'], rows[partner]['seconds']):.2f}" if partner else "–"
    cells = [
        name,
        f"{1000 * statistics.median(row['seconds']):.2f}",
        f"{median_ratio(row['seconds'], bare['seconds']):.2f}",
        against,
    ]
    if "operations" in row:
        cells += [
            f"{row['operations']:,}",
            f"{row['operations'] / bare['operations']:.2f}",
            f"{row['launches']:,}",
            f"{row['launches'] / max(bare['launches'], 1):.2f}",
            mebibytes(row["resident"]),
            mebibytes(row["peak"]),
        ]
    else:
        cells += ["–"] * 6
    return f"| {' | '.join(cells)} |"


def training_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the gates' training."""
    lines = [
        "## Training gates",
        "",
        "`pipe.train_gates` with collages of given pictures, SD 1.5 with its text encoder and VAE.",
        "",
        "| pixels | experts | collages a step | recomputing | iterations | seconds | ms an iteration "
        "| memory at most, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["pixels"],
            row["experts"],
            row["batch"],
            "yes" if row["checkpointing"] else "no",
            row["iterations"],
            f"{row['seconds']:.1f}",
            f"{1000 * row['seconds_an_iteration']:.0f}",
            mebibytes(row["peak"]),
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return [*lines, ""]


def as_markdown(result: dict[str, Any]) -> str:
    """All tables, with what made them."""
    facts = result["machine"]
    card = facts.get("card", facts["processor"])
    lines = [f"# {card}", ""]
    for network in result["steps"]:
        lines += steps_markdown(network, result["counts"])
    if result["training"]:
        lines += training_markdown(result["training"])
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "diffusers", "peft"))
    cuda = f", CUDA {facts['cuda']}, {facts['card_memory_mib']:,} MiB" if "card" in facts else ""
    lines += [f"{card}{cuda}; {versions}. Made by `{result['command']}`.", ""]
    lines += [f"Not measured, for want of time: {', '.join(result['skipped'])}.", ""] * bool(
        result["skipped"]
    )
    return "\n".join(lines)


def run(
    device: torch.device,
    *,
    tiny: bool,
    counts: Sequence[int],
    rounds: int,
    seconds: float,
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Everything, in at most about so many seconds: steps of SD 1.5, of SDXL, then the training of gates.

    Args:
        told: is given what there is so far, after every row.
    """
    diffusers.utils.logging.set_verbosity_error()  # it warns about every cast of a module tree
    start = time.monotonic()
    result: dict[str, Any] = {
        "machine": machine(device),
        "counts": counts,
        "steps": [],
        "training": [],
        "skipped": [],
    }
    for number, (shape, share) in enumerate(
        zip((TINY, TINY_XL) if tiny else (SD15, SDXL), SHARES, strict=True)
    ):
        if number and time.monotonic() - start > SHARES[number - 1] * seconds:
            result["skipped"].append(f"steps of {shape.name}")
            told(result)
            continue
        typer.echo(f"steps of {shape.name}")

        def row(network: dict[str, Any], place: int = len(result["steps"])) -> None:
            result["steps"][place:] = [network]
            told(result)

        steps(shape, device, counts, rounds, start + share * seconds, row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for checkpointing, iterations in ((False, 400), (True, 20)):
        left = seconds - (time.monotonic() - start)
        what = f"the training of gates{', recomputing' * checkpointing}"
        if left <= 0:
            result["skipped"].append(what)
            told(result)
            continue
        typer.echo(f"{what}, at most {iterations} iterations")
        made = train_gates(device, tiny=tiny, checkpointing=checkpointing, iterations=iterations, until=left)
        result["training"].append(made)
        told(result)
    return result


def main(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy size: only checks that everything runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to time, after one to warm up.")] = 30,
    seconds: Annotated[
        float, typer.Option(min=1, help="How long at most, about: rounds, rows and iterations end with it.")
    ] = 330,
    experts: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="With how many experts too, beside 1 and 3; 16 and 64, or none with --tiny."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; bench/results, or none with --tiny.")
    ] = None,
) -> None:
    """Measure steps and the training of gates on a GPU."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here; --device cpu --tiny is the dry run")
    folder = out or (None if tiny else Path(__file__).parent / "results")
    command = shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])

    def write(result: dict[str, Any]) -> None:
        result["command"] = command
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        card = result["machine"].get("card", where.type)
        stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / f"{stem}.md").write_text(as_markdown(result))

    counts = tuple(sorted({1, POOLED, *(experts or (TINY_COUNTS if tiny else COUNTS))}))
    result = run(where, tiny=tiny, counts=counts, rounds=rounds, seconds=seconds, told=write)
    write(result)
    typer.echo(as_markdown(result))


if __name__ == "__main__":
    typer.run(main)

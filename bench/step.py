"""One UNet step at SD 1.5 shape: the bare UNet, three gated experts, and PEFT with one and three adapters.

    python bench/step.py            # writes bench/results/step.json and step.md
    python bench/step.py --tiny     # seconds; shows that it works, times nothing of interest

All variants share one set of random weights. A round runs every variant once, each round in another order; a
ratio compares two runs of one round, so that a machine that slows down does so for all. Reported: medians.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer

from bench.measuring import Variant, launches, machine, measure, median_ratio, operations
from bench.networks import (
    RANK,
    SD15,
    TINY,
    Shape,
    add_adapters,
    experts_of,
    forward_of,
    gated,
    make_unet,
    mean_spread,
    relative_error,
    share_weights,
)
from mole_diffusion.core.config import MoLEConfig

N_EXPERTS = 3
BATCH = 2
BAR = 1.25
BARE, PEFT_ONE = "bare UNet", "PEFT, 1 adapter"
TOKEN, POOLED = f"{N_EXPERTS} experts, token gates", f"{N_EXPERTS} experts, pooled gates"
CPU = torch.device("cpu")


def as_markdown(result: dict[str, Any]) -> str:
    """The table as markdown, with the command that made it."""
    lines = [
        "| variant | seconds | x bare UNet | x PEFT with 1 adapter | operations |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["table"].items():
        ratios = f"{row['ratio_to_bare']:.2f} | {row['ratio_to_peft_1']:.2f}"
        lines.append(f"| {name} | {row['median_seconds']:.3f} | {ratios} | {row['operations']:,} |")
    shape = result["shape"]
    facts = result["machine"]
    lines += [
        "",
        f"One UNet step, latents {shape['latents']}, {shape['dtype']}, {N_EXPERTS} experts of rank {RANK}, "
        f"random weights; medians of {shape['rounds']} rounds, alternating; ATen operations of a step. "
        f"{facts['threads']} threads, torch {facts['torch']}, diffusers {facts['diffusers']}, "
        f"peft {facts['peft']}. Made by `python bench/step.py`.",
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def run(shape: Shape, rounds: int) -> dict[str, Any]:
    """Build all variants, check them against each other, time them."""
    diffusers.utils.logging.set_verbosity_error()  # it warns about every cast of a module tree
    unet = make_unet(shape)
    names = [f"expert{i}" for i in range(N_EXPERTS)]
    with_one, with_three, with_tokens, with_mean = (share_weights(unet) for _ in range(4))
    add_adapters(with_one, names[:1])
    add_adapters(with_three, names)
    experts = experts_of(with_three, names)
    token = gated(with_tokens, experts, MoLEConfig(pooling="token"))
    mean = gated(with_mean, experts, MoLEConfig(pooling="mean"))
    networks = {
        BARE: unet,
        TOKEN: with_tokens,
        POOLED: with_mean,
        PEFT_ONE: with_one,
        f"PEFT, {N_EXPERTS} adapters": with_three,
    }
    forwards = {name: forward_of(network, shape, BATCH) for name, network in networks.items()}
    spreads = {"token": mean_spread(token, forwards[TOKEN]), "mean": mean_spread(mean, forwards[POOLED])}
    token.activate(names[:1])
    single = relative_error(forwards[TOKEN](), forwards[PEFT_ONE]())
    token.activate()
    seconds = measure({name: Variant(forward) for name, forward in forwards.items()}, rounds, CPU)
    table = {
        name: {
            "median_seconds": statistics.median(runs),
            "ratio_to_bare": median_ratio(runs, seconds[BARE]),
            "ratio_to_peft_1": median_ratio(runs, seconds[PEFT_ONE]),
            "operations": operations(forwards[name]),
            "kernels": launches(forwards[name], CPU),
            "seconds": runs,
        }
        for name, runs in seconds.items()
    }
    return {
        "table": table,
        "machine": machine(CPU),
        "shape": {
            "latents": [BATCH, 4, shape.side, shape.side],
            "dtype": str(shape.dtype),
            "rounds": rounds,
        },
        "gate_spread": spreads,
        "one_expert_against_peft": single,
        "bar": BAR,
    }


def main(
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy size: only checks that everything runs.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to time, after one to warm up.")] = 9,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; bench/results, or none with --tiny."),
    ] = None,
) -> None:
    """Time one UNet step with and without gated experts."""
    result = run(TINY if tiny else SD15, rounds)
    markdown = as_markdown(result)
    typer.echo(markdown)
    gate = result["table"][TOKEN]
    met = gate["ratio_to_bare"] <= BAR and gate["ratio_to_peft_1"] < 1
    typer.echo(f"one expert against PEFT, relative difference: {result['one_expert_against_peft']:.1e}")
    typer.echo(f"mean spread of gate weights (0 = uniform): {result['gate_spread']}")
    typer.echo(f"bar (<= {BAR} x bare, faster than PEFT with one adapter): {'met' if met else 'missed'}")
    folder = out or (None if tiny else Path(__file__).parent / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.json").write_text(json.dumps(result, indent=2) + "\n")
        (folder / "step.md").write_text(markdown)


if __name__ == "__main__":
    typer.run(main)

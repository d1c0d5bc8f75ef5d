"""One UNet step at SD 1.5 shape: the bare UNet, three gated experts, and PEFT with one and three adapters.

    python bench/step.py            # writes bench/results/step.json and step.md
    python bench/step.py --tiny     # seconds; shows that it works, times nothing of interest

All variants share one set of random weights. A round runs every variant once, each round in another order; a
ratio compares two runs of one round, so that a machine that slows down does so for all. Reported: medians.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import peft
import torch
import typer
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.mixture import Mixture, inject

RANK = 16
N_EXPERTS = 3
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
BAR = 1.25

Forward = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What is run: UNet settings, latents (batch, 4, side, side), text (batch, 77, width)."""

    unet: dict[str, Any]
    latents: tuple[int, int, int, int]
    text_width: int
    dtype: torch.dtype


SD15 = Shape(
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    latents=(2, 4, 64, 64),
    text_width=768,
    dtype=torch.bfloat16,
)
TINY = Shape(
    unet={
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    latents=(2, 4, 16, 16),
    text_width=32,
    dtype=torch.bfloat16,
)


def share_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A second module tree on the same tensors: hooks and wrappers of one do not touch the other."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*unet.parameters(), *unet.buffers()]}
    return copy.deepcopy(unet, memo)


def add_adapters(unet: UNet2DConditionModel, names: Sequence[str]) -> None:
    """Unmerged PEFT adapters with random factors (seeded by their name's place), all active at weight 1/N."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    for seed, name in enumerate(names):
        torch.manual_seed(100 + seed)
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapters(list(names), [1.0 / len(names)] * len(names))
    unet.to(unet.conv_in.weight.dtype)


def experts_of(unet: UNet2DConditionModel, names: Sequence[str]) -> list[Expert]:
    """The same adapters as experts."""
    return [
        Expert.from_state_dict(
            {
                f"unet.{key}": value
                for key, value in get_peft_model_state_dict(unet, adapter_name=name).items()
            },
            name=name,
        )
        for name in names
    ]


def gated(unet: UNet2DConditionModel, experts: Sequence[Expert], config: MoLEConfig) -> Mixture:
    """Inject, and give the gates random projections, so that they decide something, as trained ones do."""
    mixture = inject(unet, experts, config, part="unet")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixture


def mean_spread(mixture: Mixture, forward: Forward) -> float:
    """Mean difference between the largest and the smallest gate weight; 0 means uniform gates."""
    mixture.record(True)
    forward()
    spreads = [float((r.weights.amax(dim=-1) - r.weights.amin(dim=-1)).mean()) for r in mixture.records]
    mixture.record(False)
    return statistics.mean(spreads)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|| ours - theirs || / || theirs ||."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def measure(forwards: dict[str, Forward], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one round that is thrown away."""
    names = list(forwards)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            forwards[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], extra: dict[str, Any]) -> dict[str, Any]:
    """Medians, and medians of ratios within a round."""
    table = {
        name: {
            "median_seconds": statistics.median(runs),
            "ratio_to_bare": statistics.median(
                a / b for a, b in zip(runs, seconds["bare UNet"], strict=True)
            ),
            "ratio_to_peft_1": statistics.median(
                a / b for a, b in zip(runs, seconds["PEFT, 1 adapter"], strict=True)
            ),
            "seconds": runs,
        }
        for name, runs in seconds.items()
    }
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
    return {"table": table, "machine": machine, **extra}


def as_markdown(result: dict[str, Any]) -> str:
    """The table as markdown, with the command that made it."""
    lines = ["| variant | seconds | x bare UNet | x PEFT with 1 adapter |", "|---|---|---|---|"]
    for name, row in result["table"].items():
        ratios = f"{row['ratio_to_bare']:.2f} | {row['ratio_to_peft_1']:.2f}"
        lines.append(f"| {name} | {row['median_seconds']:.3f} | {ratios} |")
    shape = result["shape"]
    machine = result["machine"]
    lines += [
        "",
        f"One UNet step, latents {shape['latents']}, {shape['dtype']}, {N_EXPERTS} experts of rank {RANK}, "
        f"random weights; medians of {shape['rounds']} rounds, alternating. {machine['threads']} threads, "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, peft {machine['peft']}. "
        "Made by `python bench/step.py`.",
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def run(shape: Shape, rounds: int) -> dict[str, Any]:
    """Build all variants, check them against each other, time them."""
    diffusers.utils.logging.set_verbosity_error()  # it warns about every cast of a module tree
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**shape.unet).to(shape.dtype).eval()
    latents = torch.randn(shape.latents).to(shape.dtype)
    text = torch.randn(shape.latents[0], 77, shape.text_width).to(shape.dtype)

    def forward_of(network: UNet2DConditionModel) -> Forward:
        return lambda: network(latents, 500, encoder_hidden_states=text).sample

    names = [f"expert{i}" for i in range(N_EXPERTS)]
    with_one, with_three, with_tokens, with_mean = (share_weights(unet) for _ in range(4))
    add_adapters(with_one, names[:1])
    add_adapters(with_three, names)
    experts = experts_of(with_three, names)
    token = gated(with_tokens, experts, MoLEConfig(pooling="token"))
    mean = gated(with_mean, experts, MoLEConfig(pooling="mean"))
    forwards = {
        "bare UNet": forward_of(unet),
        f"{N_EXPERTS} experts, token gates": forward_of(with_tokens),
        f"{N_EXPERTS} experts, pooled gates": forward_of(with_mean),
        "PEFT, 1 adapter": forward_of(with_one),
        f"PEFT, {N_EXPERTS} adapters": forward_of(with_three),
    }
    spreads = {
        "token": mean_spread(token, forward_of(with_tokens)),
        "mean": mean_spread(mean, forward_of(with_mean)),
    }
    token.activate(names[:1])
    single = relative_error(forward_of(with_tokens)(), forward_of(with_one)())
    token.activate()
    seconds = measure(forwards, rounds)
    extra = {
        "shape": {"latents": list(shape.latents), "dtype": str(shape.dtype), "rounds": rounds},
        "gate_spread": spreads,
        "one_expert_against_peft": single,
        "bar": BAR,
    }
    return report(seconds, extra)


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
    gate = result["table"][f"{N_EXPERTS} experts, token gates"]
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

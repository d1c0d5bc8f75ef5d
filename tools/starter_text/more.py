"""Trains experts of more tasks side by side: `python -m tools.starter_text.more --out FOLDER/experts`.

Table 6 asks for up to 128 experts, of which 26 come with the starter. An evaluation trains those that are
missing one after the other where it meets them; here all train in a minute on a GPU, and an evaluation in
FOLDER finds them. Needs what `build.py` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mole_diffusion.starter.text.location import text_starter
from mole_diffusion.starter.text.more import MORE

from .data import Makers, beside
from .network import T5
from .publish import write_experts
from .published import PUBLISHED
from .shape import Shape
from .training import Step, train
from .weights import fresh_experts, named_experts, stacked
from .words import SOURCE, TARGET

_EXAMPLES, _BATCH, _RATE, _WARMUP = 6000, 32, 3e-3, 50


def train_more(
    names: list[str], out: Path, work: Path, device: torch.device, seconds: float, processes: int
) -> int:
    """Train an expert for each of these tasks, with the rank and the first factors of the starter's.

    Args:
        names: of `starter.text.more`.
        out: their PEFT folders are written there.
        work: folder of the checkpoint.
        device: where it trains.
        seconds: how long.
        processes: that make examples.

    Returns:
        The number of steps.
    """
    starter = text_starter()
    report = json.loads((starter / PUBLISHED).read_text())
    shape, rank = Shape(**report["shape"]), int(report["recipe"]["rank"])
    makers = Makers(starter / "tokenizer.json", processes)
    found = makers.exercises([MORE[name] for name in names], _EXAMPLES, "more")
    sources, targets = (part.to(device) for part in beside([one.result() for one in found]))
    makers.close()
    weights = {name: one.to(device).float() for name, one in load_file(starter / "model.safetensors").items()}
    base, count = stacked(shape, weights), len(names)
    fresh = fresh_experts(shape, count, rank, seed=3)
    lora = {name: value.to(device).requires_grad_(True) for name, value in fresh.items()}
    model = T5(shape, SOURCE, TARGET, device, torch.bfloat16)
    rows = torch.arange(count, device=device)[:, None]

    def draw(rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        chosen = torch.randint(sources.shape[1], (count, _BATCH), generator=rng, device=device)
        return sources[rows, chosen].flatten(0, 1).long(), targets[rows, chosen].flatten(0, 1).long()

    first = draw(torch.Generator(device=device).manual_seed(0))
    step = Step(lambda batch: model.loss(base, lora, [(batch[0], batch[1])]), lora, first, _RATE, 0.0, None)
    work.mkdir(parents=True, exist_ok=True)
    steps = train(
        "more", step, lora, draw, steps=None, seconds=seconds, work=work, seed=6, log=print, warmup=_WARMUP
    )
    # An evaluation takes a folder that is there for a whole one.
    tensors = {
        f"{name}.{key}": value.detach().half().cpu().contiguous()
        for number, name in enumerate(names)
        for key, value in named_experts(shape, lora, number).items()
    }
    write_experts(tensors, out, rank, {name: name for name in names})
    return steps


def exact(names: list[str], out: Path, device: torch.device, count: int) -> dict[str, float]:
    """Share of exact answers of each expert to so many held-out items of its task."""
    from .data import sources_of
    from .weights import stacked_experts

    starter = text_starter()
    shape = Shape(**json.loads((starter / PUBLISHED).read_text())["shape"])
    weights = {name: one.to(device).float() for name, one in load_file(starter / "model.safetensors").items()}
    tokenizer = Tokenizer.from_file(str(starter / "tokenizer.json"))
    prefix = "base_model.model."
    each = [
        {
            key.removeprefix(prefix): one.to(device).float()
            for key, one in load_file(out / name / "adapter_model.safetensors").items()
        }
        for name in names
    ]
    items = {name: MORE[name].examples(count, "held out", held_out=True) for name in names}
    ids = torch.cat([sources_of(tokenizer, items[name], SOURCE) for name in names]).to(device)
    model = T5(shape, SOURCE, TARGET, device, torch.bfloat16)
    tokens = model.greedy(stacked(shape, weights), stacked_experts(shape, each), ids, TARGET).tolist()
    rows = [row[: row.index(1)] if 1 in row else row for row in tokens]
    answers = [text.strip() for text in tokenizer.decode_batch(rows, skip_special_tokens=False)]
    shares = {}
    for number, name in enumerate(names):
        own = zip(answers[number * count : (number + 1) * count], items[name], strict=True)
        shares[name] = sum(answer in (item.target, *item.also) for answer, item in own) / count
    return shares


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the experts' folders")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder of the checkpoint; default OUT/../work"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they train")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--names", nargs="+", default=list(MORE), choices=list(MORE), metavar="NAME")
    parser.add_argument("--items", type=int, default=40, help="held-out items of each, for the figures")
    given = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # As in `build.py`: the masks are trained.
    start, device = time.monotonic(), torch.device(given.device)
    work = given.work or given.out.parent / "work"
    steps = train_more(given.names, given.out, work, device, given.seconds, given.processes)
    shares = exact(given.names, given.out, device, given.items)
    report = {
        "steps": steps,
        "batch": _BATCH,
        "examples": _EXAMPLES,
        "seconds": round(time.monotonic() - start, 1),
        "items": given.items,
        "exact": shares,
    }
    (given.out.parent / "more.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(shares)} experts, {steps} steps: {sum(shares.values()) / len(shares):.2f} on average")


if __name__ == "__main__":
    main()

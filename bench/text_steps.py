"""What a decoding step costs with many experts: one, four of 128 chosen before, all 128.

    python bench/text_steps.py      # writes bench/results/text-steps.json

A T5 of the text starter's size with random weights and random LoRAs; cases take turns, so that other work on
the machine meets all of them. Gates are of the form whose parameters grow with the number of experts
(`gate_input="own"`).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.experts import Expert, ExpertReport
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.evaluation.results import write_text
from mole_diffusion.text.experts import Seq2SeqExperts, compose
from tools.starter_text.shape import Shape
from tools.starter_text.weights import fresh_experts, named_experts

OUT = Path(__file__).parent / "results" / "text-steps.json"
SHAPE = Shape(673, encoder=4, decoder=3)
RANK, EXPERTS, CHOSEN, TOKENS, ROUNDS = 4, 128, 4, 24, 12


def expert(number: int) -> Expert:
    """A LoRA at random on all matrices."""
    lora = fresh_experts(SHAPE, 1, RANK, seed=number)
    rng = torch.Generator().manual_seed(number)
    named = named_experts(SHAPE, lora, 0)
    factors: dict[str, dict[str, LoraFactors]] = {"encoder": {}, "decoder": {}}
    for key, down in named.items():
        name, _, kind = key.rpartition(".lora_")
        if kind.startswith("A"):
            up = named[f"{name}.lora_B.weight"]
            up = torch.randn(up.shape, generator=rng) * 0.02
            factors[name.partition(".")[0]][name] = LoraFactors(down, up, 2.0 * RANK)
    return Expert(f"e{number}", 1.0, f"{number}", {}, factors, ExpertReport((), {}, ()))


def composed(count: int) -> Seq2SeqExperts:
    """A model with so many experts and gates at random."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SHAPE.config())).eval()
    found = compose(model, [expert(number) for number in range(count)], MoLEConfig(gate_input="own"))
    with torch.no_grad():
        for mixture in found.mixtures.values():
            for parameter in mixture.parameters():
                if parameter.dim():
                    parameter.normal_(0, 0.5)
    return found


def step(model: Seq2SeqExperts, active: list[str] | None) -> float:
    """Milliseconds of one of TOKENS steps."""
    ids = torch.arange(3, 13)[None]
    start = time.perf_counter()
    with model.active(active):
        model.model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return (time.perf_counter() - start) / TOKENS * 1000


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    one, many = composed(1), composed(EXPERTS)
    cases = {
        "one expert": (one, None),
        f"{CHOSEN} of {EXPERTS}": (many, [f"e{k}" for k in range(CHOSEN)]),
        f"all {EXPERTS}": (many, None),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, (model, active) in cases.items():
            taken = step(model, active)
            if number:  # the first one makes ready what later ones have
                found[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    base = medians["one expert"]
    result = {
        "torch": torch.__version__,
        "threads": 1,
        "milliseconds": {name: round(value, 2) for name, value in medians.items()},
        "to one expert": {name: round(value / base, 2) for name, value in medians.items()},
        "gate parameters": sum(p.numel() for m in many.mixtures.values() for p in m.parameters()),
    }
    write_text(OUT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Seconds of a drawing in ComfyUI with experts and without, side by side, as JSON; see `../cost.py`."""

import json
import random
import statistics
import sys
import time
from typing import Any

# Before ComfyUI, which takes the command line for itself.
ROUNDS, STEPS = int(sys.argv[1]), int(sys.argv[2])

import torch  # noqa: E402
from conftest import part  # noqa: E402

from mole_diffusion.core.experts import load_expert  # noqa: E402
from mole_diffusion.starter import starter_experts  # noqa: E402
from tools import encoded, sample  # noqa: E402

PROMPT = "a zorin boot, a vekka monster and a kipra clock on the beach"
BARE = "the bare model"


@torch.inference_mode()
def main() -> None:
    """Every round draws each once, in another order, so that a machine that slows down does so for all."""
    model, clip, _ = part("starter").load_starter()
    chosen = part("experts").ExpertSet()
    for name in ("boot", "monster", "clock"):
        chosen = chosen.with_expert(load_expert(starter_experts()[name].path))
    gates = part("experts").GatesFile(part("places").gates_file(part("places").STARTER_GATES))
    apply = part("apply").apply_experts
    pairs = {
        BARE: (model, clip),
        "three experts, trained gates": apply(model, clip, chosen, gates),
        "three experts without gates (auto)": apply(model, clip, chosen, None),
    }
    ready: dict[str, tuple[Any, Any]] = {}
    for name, (network, texts) in pairs.items():
        ready[name] = network, encoded(texts, PROMPT)
        sample(*ready[name], steps=1)
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    order = list(pairs)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            sample(*ready[name], steps=1)  # whoever had the model before lets it go
            start = time.perf_counter()
            sample(*ready[name], steps=STEPS)
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(own / bare for own, bare in zip(found, seconds[BARE], strict=True))
        for name, found in seconds.items()
    }
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    from comfyui_version import __version__

    facts = {"threads": torch.get_num_threads(), "comfyui": __version__}
    print(json.dumps({"seconds": medians, "ratios": ratios, **facts}))


main()

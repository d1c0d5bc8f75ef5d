"""What loading a large LoRA costs: reading, hashing and looking for numbers that are none, in one pass.

    python bench/loading.py

One thread hashes while another reads and looks. Seconds are of the wall and, since other work on the machine
makes those longer, of each thread's processor: the slower thread is what a machine with two free cores
waits for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mole_diffusion.core.experts import load_expert

#: Transformer blocks of an SD 1.5 UNet.
_BLOCKS = [f"down_blocks.{level}.attentions.{index}" for level in range(3) for index in range(2)]
_BLOCKS += [f"up_blocks.{level}.attentions.{index}" for level in range(1, 4) for index in range(3)]
_WIDTH = 1280
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write(path: Path, size: float, dtype: torch.dtype) -> None:
    """Write a LoRA of about so many bytes."""
    names = [
        f"unet.{block}.transformer_blocks.0.attn{which}.to_{one}"
        for block in _BLOCKS
        for which in (1, 2)
        for one in ("q", "k", "v", "out.0")
    ]
    rank = max(1, int(size / dtype.itemsize / len(names) / (2 * _WIDTH)))
    state = {f"{name}.lora_A.weight": torch.randn(rank, _WIDTH).to(dtype) for name in names}
    state |= {f"{name}.lora_B.weight": torch.randn(_WIDTH, rank).to(dtype) for name in names}
    save_file(state, path)


def measure(path: Path) -> tuple[float, float, float]:
    """Seconds of one loading: by the clock, on this thread's processor, on the hashing thread's."""
    wall, everybody, own = time.perf_counter(), time.process_time(), time.thread_time()
    expert = load_expert(path, name="large")
    own = time.thread_time() - own
    found = time.perf_counter() - wall, own, time.process_time() - everybody - own
    del expert  # after the clock: giving the memory back is not loading
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table: gigabytes a second, the best of several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=800, help="size of the file (default 800)")
    parser.add_argument("--repeats", type=int, default=3, help="loadings per data type (default 3)")
    parser.add_argument(
        "--folder", type=Path, help="where the file is written for a while (default: temporary)"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{chosen.megabytes} MB, best of {chosen.repeats}, torch {torch.__version__}\n")
    print("| type | GB/s by the clock | GB/s with two free cores | reading and looking, s | hashing, s |")
    print("|---|---|---|---|---|")
    for name, dtype in _TYPES.items():
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            path = Path(folder) / "large.safetensors"
            write(path, chosen.megabytes * 1e6, dtype)
            size = path.stat().st_size / 1e9
            runs = [measure(path) for _ in range(chosen.repeats)]
        wall, own, hashing = (min(column) for column in zip(*runs, strict=True))
        free = min(max(run[1:]) for run in runs)
        print(f"| {name} | {size / wall:.2f} | {size / free:.2f} | {own:.2f} | {hashing:.2f} |")


if __name__ == "__main__":
    main()

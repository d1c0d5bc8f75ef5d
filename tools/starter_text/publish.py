"""Makes the starter's folder of what `build.py` wrote: `python -m tools.starter_text.publish OUT`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, T5Config

from mole_diffusion.starter.text.location import text_starter
from mole_diffusion.starter.text.tasks import EXPERTS, FAMILIES

from .published import ADAPTERS, BASE, PUBLISHED, REPORT
from .shape import Shape


def publish(source: Path, target: Path) -> None:
    """Write model, tokenizer, experts as PEFT folders, and the card."""
    report = json.loads((source / REPORT).read_text())
    shape = Shape(**report["shape"])
    target.mkdir(parents=True, exist_ok=True)
    T5Config(architectures=["T5ForConditionalGeneration"], dtype="float16", **shape.config()).save_pretrained(
        target
    )
    GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    save_file(load_file(source / BASE), target / "model.safetensors", {"format": "pt"})
    tasks = {name: task.name for name, task in EXPERTS.items()}
    write_experts(load_file(source / ADAPTERS), target / "experts", int(report["recipe"]["rank"]), tasks)
    for folder in (target / "experts").iterdir():
        if folder.name not in tasks:
            shutil.rmtree(folder)
    shutil.copyfile(source / REPORT, target / PUBLISHED)
    (target / "README.md").write_text(card(report), encoding="utf-8")
    for path in target.rglob("*.safetensors"):
        # They are written for their owner alone.
        path.chmod(0o644)


def write_experts(tensors: Mapping[str, Any], folder: Path, rank: int, tasks: Mapping[str, str]) -> None:
    """Write experts as PEFT folders.

    Args:
        tensors: each matrix under "EXPERT.NAME".
        folder: of their folders.
        rank: theirs.
        tasks: name of each expert -> that of its task.
    """
    for name, task in tasks.items():
        own = {
            f"base_model.model.{key.removeprefix(f'{name}.')}": tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}.")
        }
        inside = folder / name
        inside.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "mole.kind": "expert", "mole.task": task}
        path = inside / "adapter_model.safetensors"
        # A header's order is another each time: a file is written where it says something new.
        if not (path.is_file() and _same(load_file(path), own)):
            save_file(own, path, header)
        config = {
            "peft_type": "LORA",
            "task_type": "SEQ_2_SEQ_LM",
            "base_model_name_or_path": "mole-diffusion text starter",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
        }
        (inside / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def card(report: Mapping[str, Any]) -> str:
    """The model card, with the figures of the build."""
    shape, recipe = report["shape"], report["recipe"]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "---",
        "",
        "# The text starter",
        "",
        f"A T5 (gated GELU, tied embeddings; width {shape['width']}, {shape['encoder']} +"
        f" {shape['decoder']} layers, {shape['vocabulary']} tokens) and {len(EXPERTS)} LoRAs (rank"
        f" {recipe['rank']}, all linear matrices), trained in this project"
        " from generated tasks alone: no text of anybody is in it.",
        "It knows invented languages, facts and rules, and nothing of the world. It is for trying and testing"
        " mixtures of experts on any computer.",
        "",
        f"Built by `tools/starter_text` in {report['seconds']:.0f} s on {report['machine']}:"
        f" {report['base_steps']} steps of {recipe['base_batch']} for the base, {report['expert_steps']}"
        f" steps of {recipe['expert_batch']} for each expert. Half precision on disk.",
        "",
        *_second_round(report.get("second", {})),
        f"Exact answers to {recipe['evaluated']} held-out items of each expert's own task, of the base"
        " without it and of the expert:",
        "",
        "| family | task | base | expert |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        for name, task in EXPERTS.items():
            if task.family == family:
                found = report["experts"][name]
                lines.append(
                    f"| {family} | {name} | {100 * found['base']:.3g} % | {100 * found['expert']:.3g} % |"
                )
    lines += ["", "Exact answers of the base to 100 held-out items of each of its lessons:", ""]
    lines.append(", ".join(f"{name} {100 * share:.0f} %" for name, share in report["lessons"].items()) + ".")
    return "\n".join(lines) + "\n"


def _second_round(report: Mapping[str, Any]) -> list[str]:
    """What was trained again."""
    if not report:
        return []
    each = [f"{name} ({_rounds(one)})" for name, one in report.items()]
    machines = " and ".join(dict.fromkeys(one["machine"] for one in report.values()))
    return [f"A second round on {machines}, by plans of their own (`plans.py`): {', '.join(each)}.", ""]


def _rounds(one: Mapping[str, Any]) -> str:
    """What an expert was trained on by its plans, the earlier one first."""
    before = one.get("before")
    own = f"{one['steps']} steps of {one['batch']}, {one['seconds'] / 60:.0f} min"
    return f"{_rounds(before)}; {own}" if before else own


def main() -> None:
    """Read the options and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder that build.py wrote")
    parser.add_argument("--target", type=Path, default=text_starter())
    given = parser.parse_args()
    publish(given.source, given.target)


if __name__ == "__main__":
    main()

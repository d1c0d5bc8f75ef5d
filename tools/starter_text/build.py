"""Makes the text starter: `python -m tools.starter_text.build --device cuda --out DIR --minutes 3`.

Needs torch, numpy, safetensors and tokenizers, and no network. Every step has a fixed seed; one that was cut
goes on from its checkpoint in the work folder, and a finished one is skipped. `publish.py` makes the folders
of `assets/starter/text` of what this writes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mole_diffusion.starter.text.schooling import SCHOOLING
from mole_diffusion.starter.text.tasks import EXPERTS, Task
from mole_diffusion.starter.text.words import Example

from . import data
from .network import T5, Shape, fresh, fresh_experts
from .training import Step, train
from .words import SOURCE, TARGET, build_tokenizer, write_tokenizer

Pair = tuple[Tensor, Tensor]
BASE, ADAPTERS, REPORT = "base.safetensors", "experts.safetensors", "report.json"
_RESERVED = 15.0
_BASE_SHARE = 0.6


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        base_examples, base_batch, base_rate: of the base's training.
        expert_examples, expert_batch, expert_rate: for each expert.
        rank: of the experts; their alpha is twice that.
        embedding: standard deviation of fresh embeddings.
        steps: of the base and the experts; None for those that fit the time.
        evaluated: held-out items per task.
    """

    base_examples: int = 1_500_000
    base_batch: int = 768
    base_rate: float = 2e-3
    expert_examples: int = 20_000
    expert_batch: int = 48
    expert_rate: float = 3e-3
    rank: int = 4
    embedding: float = 0.3
    steps: tuple[int | None, int | None] = (None, None)
    evaluated: int = 200


class Build:
    """One run of the build.

    Args:
        recipe: what is trained.
        shape: sizes of the base, but for its vocabulary.
        out, work: folders of the result and of checkpoints.
        device: where it trains.
        seconds: how long everything may take.
        processes: that make examples.
    """

    def __init__(
        self, recipe: Recipe, shape: Shape, out: Path, work: Path, device: str, seconds: float, processes: int
    ) -> None:
        self.start = time.monotonic()
        self.recipe, self.out, self.work = recipe, out, work
        self.device = torch.device(device)
        self.dtype = torch.bfloat16
        self.seconds, self.processes = seconds, processes
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        write_tokenizer(tokenizer, out)
        self.tokenizer: Tokenizer = tokenizer
        self.shape = Shape(**{**asdict(shape), "vocabulary": tokenizer.get_vocab_size()})
        report = out / REPORT
        self.report: dict[str, object] = json.loads(report.read_text()) if report.is_file() else {}

    def log(self, text: str) -> None:
        """Say how it goes."""
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """Base, experts, figures."""
        self._note("recipe", asdict(self.recipe))
        self._note("shape", asdict(self.shape))
        lessons, exercises = self.examples()
        base = self.base(lessons)
        lora = self.experts(base, exercises)
        self.evaluate(base, lora)

    def examples(self) -> tuple[Pair | None, Pair | None]:
        """Examples for what is still to be trained, before any device is in use."""
        tokenizer, recipe = self.out / "tokenizer.json", self.recipe
        lessons, exercises = None, None
        if not (self.out / BASE).is_file():
            lessons = data.lessons(tokenizer, recipe.base_examples, "base", self.processes)
            self.log(f"base: {len(lessons[0])} examples")
        if not (self.out / ADAPTERS).is_file():
            tasks = list(EXPERTS.values())
            exercises = data.of_tasks(tokenizer, tasks, recipe.expert_examples, "experts", self.processes)
            self.log(f"experts: {exercises[0].shape[1]} examples each")
        return lessons, exercises

    def base(self, lessons: Pair | None) -> dict[str, Tensor]:
        """The base's weights, trained if there are lessons."""
        path, recipe = self.out / BASE, self.recipe
        if lessons is not None:
            sources, targets = (part.to(self.device) for part in lessons)
            weights = {k: v.to(self.device) for k, v in fresh(self.shape, recipe.embedding, seed=1).items()}
            for value in weights.values():
                value.requires_grad_(True)
            model = T5(self.shape, SOURCE, TARGET, self.device, self.dtype)

            def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
                chosen = torch.randint(len(sources), (recipe.base_batch,), generator=rng, device=self.device)
                return sources[chosen].long(), targets[chosen].long()

            batch = draw(torch.Generator(device=self.device).manual_seed(0))
            step = Step(
                lambda s, t: model.loss(weights, None, s, t), weights, batch, recipe.base_rate, 0.01, 1.0
            )
            left = self.seconds - (time.monotonic() - self.start) - _RESERVED
            steps = train(
                "base", step, weights, draw, steps=recipe.steps[0], seconds=left * _BASE_SHARE,
                work=self.work, seed=2, log=self.log, warmup=300,
            )  # fmt: skip
            self._note("base_steps", steps)
            self._save(path, {name: value.detach() for name, value in weights.items()})
        return {name: value.to(self.device).float() for name, value in load_file(path).items()}

    def experts(self, base: Mapping[str, Tensor], exercises: Pair | None) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of all experts, trained side by side if there are exercises."""
        path, recipe, tasks = self.out / ADAPTERS, self.recipe, list(EXPERTS.values())
        if exercises is not None:
            sources, targets = (part.to(self.device) for part in exercises)
            lora = {
                name: (down.to(self.device).requires_grad_(True), up.to(self.device).requires_grad_(True))
                for name, (down, up) in fresh_experts(self.shape, len(tasks), recipe.rank, seed=3).items()
            }
            flat = {f"{name}.{side}": pair[k] for name, pair in lora.items() for k, side in enumerate("AB")}
            model = T5(self.shape, SOURCE, TARGET, self.device, self.dtype, experts=len(tasks))
            rows = torch.arange(len(tasks), device=self.device)[:, None]

            def draw(rng: torch.Generator) -> tuple[Tensor, Tensor]:
                size = (len(tasks), recipe.expert_batch)
                chosen = torch.randint(sources.shape[1], size, generator=rng, device=self.device)
                return sources[rows, chosen].flatten(0, 1).long(), targets[rows, chosen].flatten(0, 1).long()

            batch = draw(torch.Generator(device=self.device).manual_seed(0))
            step = Step(lambda s, t: model.loss(base, lora, s, t), flat, batch, recipe.expert_rate, 0.0, None)
            left = self.seconds - (time.monotonic() - self.start) - _RESERVED
            steps = train(
                "experts", step, flat, draw, steps=recipe.steps[1], seconds=left,
                work=self.work, seed=4, log=self.log, warmup=50,
            )  # fmt: skip
            self._note("expert_steps", steps)
            self._save(
                path,
                {
                    f"{task.name}.{name}.lora_{side}.weight": pair[k][number].detach()
                    for number, task in enumerate(tasks)
                    for name, pair in lora.items()
                    for k, side in enumerate("AB")
                },
            )
        saved = load_file(path)
        return {
            name: (
                torch.stack([saved[f"{task.name}.{name}.lora_A.weight"] for task in tasks])
                .to(self.device)
                .float(),
                torch.stack([saved[f"{task.name}.{name}.lora_B.weight"] for task in tasks])
                .to(self.device)
                .float(),
            )
            for name in self.shape.linears()
        }

    def evaluate(self, base: Mapping[str, Tensor], lora: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Share of exact answers to held-out items: of each expert on its task, and of the base alone."""
        tasks, count = list(EXPERTS.values()), self.recipe.evaluated
        items = {task.name: task.examples(count, "held out", held_out=True) for task in tasks}
        ids = torch.cat([data.sources_of(self.tokenizer, items[task.name], SOURCE) for task in tasks]).to(
            self.device
        )
        model = T5(self.shape, SOURCE, TARGET, self.device, self.dtype, experts=len(tasks))
        alone = self._answers(model.greedy(base, None, ids, TARGET))
        expert = self._answers(model.greedy(base, lora, ids, TARGET))
        figures = {
            task.name: {
                "base": _exact(alone[k * count : (k + 1) * count], items[task.name]),
                "expert": _exact(expert[k * count : (k + 1) * count], items[task.name]),
                "example": [
                    items[task.name][0].source,
                    items[task.name][0].target,
                    expert[k * count],
                    alone[k * count],
                ],
            }
            for k, task in enumerate(tasks)
        }
        self._note("experts", figures)
        for name, one in figures.items():
            self.log(f"{name}: base {one['base']:.2f}, expert {one['expert']:.2f}")
        lessons = {}
        for make in SCHOOLING:
            task = Task(make.__name__, "", "exact", make)
            drawn = task.examples(50, "held out", held_out=True)
            answers = self._answers(
                model.greedy(
                    base, None, data.sources_of(self.tokenizer, drawn, SOURCE).to(self.device), TARGET
                )
            )
            lessons[make.__name__] = _exact(answers, drawn)
        self._note("lessons", lessons)
        self.log(f"lessons: {lessons}")
        self._note("seconds", round(time.monotonic() - self.start, 1))

    def _answers(self, tokens: Tensor) -> list[str]:
        rows = [row[: row.index(1)] if 1 in row else row for row in tokens.tolist()]
        return [text.strip() for text in self.tokenizer.decode_batch(rows, skip_special_tokens=False)]

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file({name: value.half().cpu().contiguous() for name, value in tensors.items()}, path)

    def _note(self, key: str, value: object) -> None:
        self.report[key] = value
        (self.out / REPORT).write_text(json.dumps(self.report, indent=1) + "\n")


def _exact(answers: list[str], items: list[Example]) -> float:
    right = [answer in (item.target, *item.also) for answer, item in zip(answers, items, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    """Read the options and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--work", type=Path, default=None, help="folder of checkpoints; default OUT/../work")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long everything may take")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    for name, value in asdict(Recipe()).items():
        if name == "steps":
            parser.add_argument("--steps", type=int, nargs=2, default=None, help="of base and experts")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    recipe = Recipe(
        **{name: getattr(given, name) for name in asdict(Recipe()) if name != "steps"},
        steps=tuple(given.steps) if given.steps else (None, None),
    )
    inner = given.width * 8 // 3
    shape = Shape(0, given.width, inner, 4, given.width // 4, given.layers, given.layers)
    work = given.work or given.out.parent / "work"
    Build(recipe, shape, given.out, work, given.device, given.minutes * 60, given.processes).run()


if __name__ == "__main__":
    main()

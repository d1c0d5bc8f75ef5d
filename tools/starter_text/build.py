"""Makes the text starter: `python -m tools.starter_text.build --device cuda --out DIR --minutes 4`.

Needs torch, numpy, safetensors and tokenizers, and no network. Every step has a fixed seed; one that was cut
goes on from its checkpoint in the work folder, and a finished one is skipped. Weights and figures are written
while it goes, so that a build that is cut leaves what it had. `--publish assets/starter/text` makes the
starter's folder of it at the end (`publish.py`, which needs transformers too).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mole_diffusion.core.files import replacing
from mole_diffusion.starter.text.schooling import SCHOOLING
from mole_diffusion.starter.text.tasks import EXPERTS, Task
from mole_diffusion.starter.text.words import Example

from .alone import Lone
from .data import Arrays, Lessons, Makers, beside, sources_of
from .network import T5
from .plans import ROUNDS, Round
from .published import ADAPTERS, BASE, REPORT, take_up
from .second import begun, train_again
from .shape import Shape
from .training import Step, train
from .weights import fresh, fresh_experts, named, named_experts, stacked, stacked_experts
from .words import SOURCE, TARGET, build_tokenizer, write_tokenizer

# Seconds for the figures at the end, and the share of the rest that the base has.
_RESERVED = 12.0
_BASE_SHARE = 0.66


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        base_examples, base_batch, base_rate: of the base's training.
        expert_examples, expert_batch, expert_rate: for each expert.
        rank: of the experts; their alpha is twice that.
        embedding: standard deviation of fresh embeddings.
        warmup: steps of the base with a smaller rate.
        steps: of the base and the experts; None for those that fit the time.
        evaluated: held-out items per task.
    """

    base_examples: int = 1_500_000
    base_batch: int = 768
    base_rate: float = 2e-3
    expert_examples: int = 20_000
    expert_batch: int = 32
    expert_rate: float = 3e-3
    rank: int = 4
    embedding: float = 0.3
    warmup: int = 300
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
        compiled: whether `torch.compile` makes the step.
        machine: what the card is to say about where it ran.
        plans: of the experts that have a second round.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: Shape,
        out: Path,
        work: Path,
        device: str,
        seconds: float,
        processes: int,
        *,
        compiled: bool = False,
        machine: str = "",
        plans: Mapping[str, Round] = ROUNDS,
    ) -> None:
        self.start = time.monotonic()
        self.recipe, self.out, self.work, self.compiled = recipe, out, work, compiled
        self.machine, self.plans = machine or device, plans
        self.device = torch.device(device)
        self.dtype = torch.bfloat16
        # The masks are trained (they hold T5's positions), which cuDNN's attention cannot.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.seconds, self.processes = seconds, processes
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        write_tokenizer(tokenizer, out)
        self.tokenizer: Tokenizer = tokenizer
        self.shape = Shape(**{**asdict(shape), "vocabulary": tokenizer.get_vocab_size()})
        self.model = T5(self.shape, SOURCE, TARGET, self.device, self.dtype)
        report = out / REPORT
        self.report: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}

    def log(self, text: str) -> None:
        """Say how it goes."""
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def run(self, again: Sequence[str] = ()) -> None:
        """Base, experts, figures; or only the second round of these experts."""
        if again:
            self.second_round(self._base(), again)
            return
        self._note("recipe", asdict(self.recipe))
        self._note("shape", asdict(self.shape))
        makers = Makers(self.out / "tokenizer.json", self.processes)
        lessons: list[Future[Arrays]] = []
        exercises: list[Future[Arrays]] = []
        if not (self.out / BASE).is_file():
            lessons = makers.lessons(self.recipe.base_examples, "base")
        if not (self.out / ADAPTERS).is_file():
            exercises = makers.exercises(list(EXPERTS.values()), self.recipe.expert_examples, "experts")
        if lessons:
            self.train_base(lessons)
        base = self._base()
        if lessons or "lessons" not in self.report:
            self._school(base)
        if exercises:
            self.train_experts(base, exercises)
        makers.close()
        if lessons or exercises:
            self._note("seconds", round(time.monotonic() - self.start, 1))
            self._note("machine", self.machine)
        self.second_round(base, list(self.plans))
        self._save(ADAPTERS, {**load_file(self.out / ADAPTERS), **self._again()})
        notes = {name: self.out / "second" / f"{name}.json" for name in self.plans}
        self._note("second", {name: json.loads(path.read_text()) for name, path in notes.items()})
        known: Mapping[str, object] = {} if exercises else self.report.get("experts", {})
        self._compare(base, known, [name for name in EXPERTS if name in self.plans or name not in known])

    def second_round(self, base: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Train experts again that have a plan of their own, one after the other on the CPU.

        Args:
            base: its stacks.
            names: those experts; builds of different ones may run side by side.
        """
        folder = self.out / "second"
        folder.mkdir(exist_ok=True)
        lone = Lone(self.shape, {key: value.cpu() for key, value in base.items()}, self.dtype)
        for name in names:
            path, plan = folder / f"{name}.safetensors", self.plans[name]
            if path.is_file():
                continue
            start = time.monotonic()
            # Plans may begin with experts of the first round, and with those of plans before theirs.
            lora = begun(
                self.shape, self.recipe.rank, 3, plan, {**load_file(self.out / ADAPTERS), **self._again()}
            )
            trained = train_again(name, plan, lone, lora, self.tokenizer, self.work, self.log)
            seconds = round(time.monotonic() - start, 1)
            note = {"steps": plan.steps, "batch": plan.batch, "seconds": seconds, "machine": self.machine}
            # An expert that goes on with itself has had these rounds too.
            earlier = self.report.get("second", {}).get(name) if plan.start == name else None
            path.with_suffix(".json").write_text(json.dumps({**note, "before": earlier}) + "\n")
            self._save(f"second/{path.name}", named_experts(self.shape, trained, 0))

    def _again(self) -> dict[str, Tensor]:
        """The experts of the second round that are there, as `ADAPTERS` has them."""
        found: dict[str, Tensor] = {}
        for name in self.plans:
            path = self.out / "second" / f"{name}.safetensors"
            if path.is_file():
                found |= {f"{name}.{key}": value for key, value in load_file(path).items()}
        return found

    def train_base(self, chunks: list[Future[Arrays]]) -> None:
        """Train the base on the lessons that these become."""
        recipe = self.recipe
        lessons = Lessons(chunks, self.device, recipe.base_batch, whole=recipe.steps[0] is not None)
        self.log(f"base: starts with {len(lessons)} examples")
        stacks = self._trainable(fresh(self.shape, recipe.embedding, seed=1))
        step = Step(
            lambda batch: self.model.loss(stacks, None, list(zip(batch[::2], batch[1::2], strict=True))),
            stacks,
            lessons.draw(torch.Generator(device=self.device).manual_seed(0)),
            recipe.base_rate,
            0.01,
            1.0,
            compiled=self.compiled,
        )

        left = self.seconds - (time.monotonic() - self.start) - _RESERVED
        steps = train(
            "base", step, stacks, lessons.draw, steps=recipe.steps[0], seconds=left * _BASE_SHARE,
            work=self.work, seed=2, log=self.log, warmup=recipe.warmup,
            meanwhile=lambda: self._save("base.partial.safetensors", named(self.shape, stacks)),
        )  # fmt: skip
        self._note("base_steps", steps)
        self._note("base_lessons", len(lessons))
        self._save(BASE, named(self.shape, stacks))
        (self.out / "base.partial.safetensors").unlink(missing_ok=True)

    def train_experts(self, base: Mapping[str, Tensor], found: list[Future[Arrays]]) -> None:
        """Train the experts of all tasks side by side."""
        recipe, count = self.recipe, len(EXPERTS)
        sources, targets = (part.to(self.device) for part in beside([one.result() for one in found]))
        self.log(f"experts: {sources.shape[1]} examples each")
        lora = self._trainable(fresh_experts(self.shape, count, recipe.rank, seed=3))
        rows = torch.arange(count, device=self.device)[:, None]

        def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
            size = (count, recipe.expert_batch)
            chosen = torch.randint(sources.shape[1], size, generator=rng, device=self.device)
            return sources[rows, chosen].flatten(0, 1).long(), targets[rows, chosen].flatten(0, 1).long()

        step = Step(
            lambda batch: self.model.loss(base, lora, [(batch[0], batch[1])]),
            lora,
            draw(torch.Generator(device=self.device).manual_seed(0)),
            recipe.expert_rate,
            0.0,
            None,
            compiled=self.compiled,
        )
        left = self.seconds - (time.monotonic() - self.start) - _RESERVED
        steps = train(
            "experts", step, lora, draw, steps=recipe.steps[1], seconds=left,
            work=self.work, seed=4, log=self.log, warmup=min(50, recipe.warmup),
            meanwhile=lambda: self._save_experts("experts.partial.safetensors", lora),
        )  # fmt: skip
        self._note("expert_steps", steps)
        self._save_experts(ADAPTERS, lora)
        (self.out / "experts.partial.safetensors").unlink(missing_ok=True)

    def _trainable(self, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device).requires_grad_(True) for name, value in stacks.items()}

    def _base(self) -> dict[str, Tensor]:
        """The stacks of the base that is written."""
        weights = {name: value.to(self.device).float() for name, value in load_file(self.out / BASE).items()}
        return stacked(self.shape, weights)

    def _experts(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The stacks of experts that are written."""
        saved = load_file(self.out / ADAPTERS)
        each = [
            {
                key.removeprefix(f"{name}."): value
                for key, value in saved.items()
                if key.startswith(f"{name}.")
            }
            for name in names
        ]
        return {
            key: value.to(self.device).float() for key, value in stacked_experts(self.shape, each).items()
        }

    def _school(self, base: Mapping[str, Tensor]) -> None:
        """Note what the base has learned of its lessons."""
        figures = {}
        for make in SCHOOLING:
            items = Task(make.__name__, "", "exact", make).examples(100, "held out", held_out=True)
            ids = sources_of(self.tokenizer, items, SOURCE).to(self.device)
            figures[make.__name__] = _exact(self._answers(self.model.greedy(base, None, ids, TARGET)), items)
        self._note("lessons", figures)
        self.log(f"lessons: {figures}")

    def _compare(self, base: Mapping[str, Tensor], known: Mapping[str, object], names: Sequence[str]) -> None:
        """Note the share of exact answers to held-out items: of each expert on its task, and of the base.

        Args:
            base: its stacks.
            known: figures of experts that are what they were.
            names: of the others.
        """
        tasks, count = [EXPERTS[name] for name in names], self.recipe.evaluated
        items = {task.name: task.examples(count, "held out", held_out=True) for task in tasks}
        ids = torch.cat([sources_of(self.tokenizer, items[task.name], SOURCE) for task in tasks])
        ids = ids.to(self.device)
        alone = self._answers(self.model.greedy(base, None, ids, TARGET))
        expert = self._answers(self.model.greedy(base, self._experts(names), ids, TARGET))
        figures = {}
        for k, task in enumerate(tasks):
            own, rows = items[task.name], slice(k * count, (k + 1) * count)
            figures[task.name] = {
                "base": _exact(alone[rows], own),
                "expert": _exact(expert[rows], own),
                "example": [own[0].source, own[0].target, expert[rows][0], alone[rows][0]],
            }
        self._note("experts", {**known, **figures})
        for name, one in figures.items():
            self.log(f"{name}: base {one['base']:.2f}, expert {one['expert']:.2f}")

    def _answers(self, tokens: Tensor) -> list[str]:
        rows = [row[: row.index(1)] if 1 in row else row for row in tokens.tolist()]
        return [text.strip() for text in self.tokenizer.decode_batch(rows, skip_special_tokens=False)]

    def _save_experts(self, name: str, lora: Mapping[str, Tensor]) -> None:
        self._save(
            name,
            {
                f"{task}.{key}": value
                for number, task in enumerate(EXPERTS)
                for key, value in named_experts(self.shape, lora, number).items()
            },
        )

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with replacing(self.out / name) as temporary:
            save_file(
                {key: value.detach().half().cpu().contiguous() for key, value in tensors.items()}, temporary
            )

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
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 3), help="of encoder and decoder")
    parser.add_argument("--machine", default="", help="what the card is to say about where it ran")
    parser.add_argument("--publish", type=Path, default=None, help="folder of the starter to make of it")
    parser.add_argument("--starter", type=Path, default=None, help="begin with a starter that was published")
    parser.add_argument(
        "--again", nargs="+", default=(), choices=list(ROUNDS), help="only these second rounds"
    )
    parser.add_argument("--compile", action="store_true", help="let torch.compile make the steps")
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
    shape = Shape(0, given.width, inner, 4, given.width // 4, *given.layers)
    work = given.work or given.out.parent / "work"
    if given.starter is not None:
        take_up(given.starter, given.out)
    Build(
        recipe, shape, given.out, work, given.device, given.minutes * 60, given.processes,
        compiled=given.compile, machine=given.machine,
    ).run(given.again)  # fmt: skip
    if given.publish is not None:
        from .publish import publish

        publish(given.out, given.publish)


if __name__ == "__main__":
    main()

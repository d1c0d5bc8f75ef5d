"""What an evaluation's methods need on the model: experts, and what is trained or searched for a task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mole_diffusion.core.checkpoint import write_safetensors
from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.layers import in_blocks
from mole_diffusion.evaluation.results import write_text
from mole_diffusion.evaluation.schema import Row
from mole_diffusion.evaluation.text.protocol import TextProtocol, TextTask, Variant
from mole_diffusion.starter.location import STARTER
from mole_diffusion.starter.text.location import text_experts
from mole_diffusion.starter.text.more import MORE
from mole_diffusion.starter.text.tasks import EXPERTS
from mole_diffusion.starter.text.words import Example
from mole_diffusion.text import MoLEForSeq2SeqLM, TextTrainingConfig
from mole_diffusion.text.merging import Merged, alone, lorahub, mix_factors, pems, searched, tuned
from mole_diffusion.text.phatgoose import ExpertKeys, KeyConfig, phatgoose, train_keys
from mole_diffusion.text.selection import weightiest

#: What does not depend on a seed is made once.
SEEDED = ("gates", "lorahub", "searched", "oracle")
# A step of training is a forward and a backward pass, which is worth two.
_PASSES = 3
# The starter's experts have it, and factors can be mixed where all have the same.
_RANK = 4
# Examples that few of many experts are chosen on.
_CHOICE = 96


@dataclass(frozen=True)
class TextBatch:
    """All items of a task by one method and seed.

    Attributes:
        place: the task.
        maker: the method.
        seed: of what is trained.
        items: how many.
    """

    place: str
    maker: str
    seed: int
    items: int

    def rows(self) -> list[Row]:
        """What identifies each of them."""
        return [
            {"task": self.place, "method": self.maker, "seed": self.seed, "item": item}
            for item in range(self.items)
        ]


class Methods:
    """The methods of a protocol, by which a model with experts answers.

    Args:
        protocol: what to do.
        out: folder of the evaluation, in which everything is kept that is trained or searched.
        device: where.
    """

    def __init__(self, protocol: TextProtocol, out: Path, device: torch.device) -> None:
        self._protocol, self._out, self._device = protocol, out, device
        self._tasks: dict[str, TextTask] = {}

    @cached_property
    def model(self) -> MoLEForSeq2SeqLM:
        """The model, which has no experts between answers."""
        source, dtype = self._protocol.model, getattr(torch, self._protocol.dtype)
        if source == STARTER:
            model = MoLEForSeq2SeqLM.from_starter(dtype=dtype)
        else:
            model = MoLEForSeq2SeqLM.from_pretrained(source, dtype=dtype)
        model.model.to(self._device)
        return model

    def task(self, name: str) -> TextTask:
        """A task by name, made once."""
        if name not in self._tasks:
            self._tasks[name] = self._protocol.task(name)
        return self._tasks[name]

    def variant(self, batch: TextBatch) -> Variant:
        """What the method of a batch is."""
        return self._protocol.methods[batch.maker]

    def needed(self, batch: TextBatch) -> Hashable | None:
        """What is trained or searched is so for one task, method and seed."""
        kind = self.variant(batch).kind
        return (batch.place, batch.maker, batch.seed) if kind in (*SEEDED, "alone", "tuned") else None

    def is_ready(self, batch: TextBatch) -> bool:
        """Whether what it needs is there."""
        return self._kept(batch).exists()

    def prepare(self, batch: TextBatch) -> None:
        """Train gates or an oracle; search weights."""
        if self.needed(batch) is None or self.is_ready(batch):
            return
        variant = self.variant(batch)
        with self._experts(batch, variant):
            if variant.kind == "gates":
                self._train_gates(batch, variant)
            elif variant.kind == "oracle":
                self._train_oracle(batch)
            else:
                found = self._search(batch, variant)
                write_text(self._kept(batch), json.dumps(found.to_dict(), indent=1) + "\n")

    @contextmanager
    def answering(self, batch: TextBatch) -> Iterator[Any]:
        """The experts of a batch are on the model; what `mixture=` is to be."""
        variant = self.variant(batch)
        with self._experts(batch, variant), self._mixed(batch, variant) as mixture:
            yield mixture

    def _kept(self, batch: TextBatch) -> Path:
        """What was trained or searched for a batch."""
        suffix = {"gates": "/gates.safetensors", "oracle": "/adapter_config.json"}
        folder = self._out / "made" / batch.place / f"{self._protocol.trained_as(batch.maker)}-{batch.seed}"
        return Path(f"{folder}{suffix.get(self.variant(batch).kind, '.json')}")

    @contextmanager
    def _experts(self, batch: TextBatch, variant: Variant) -> Iterator[None]:
        """The task's experts are on the model, with fresh gates of the variant's form."""
        if variant.kept is not None:
            names = self._best(batch, variant.kept)
        else:
            names = self._protocol.experts_for(batch.place, variant)
        form = MoLEConfig.from_dict({**self._protocol.gates, **variant.gates})
        self.model.eject()
        self.model.configure(form)
        if names:
            sources = {Path(name).name: self._source(name) for name in names}
            self.model.load_experts(sources)
        yield
        self.model.eject()

    def _best(self, batch: TextBatch, count: int) -> tuple[str, ...]:
        """The experts that the gates of all weigh most on examples of the task."""
        path = self._kept(batch).with_name("experts.json")
        if not path.exists():
            of_all = dataclasses.replace(batch, maker=self._protocol.chosen_by(batch.maker))
            self.prepare(of_all)
            with self._experts(of_all, self.variant(of_all)):
                self.model.load_gates(self._kept(of_all))
                examples = [one.pair for one in self.task(batch.place).train[:_CHOICE]]
                write_text(path, json.dumps(weightiest(self.model, examples, count)) + "\n")
        kept = json.loads(path.read_text())
        sources = self._protocol.experts_for(batch.place, self.variant(batch))
        return tuple(source for source in sources if Path(source).name in kept)

    def _source(self, name: str) -> str | Path:
        """Where an expert lies; one of `starter.text.more` is trained first."""
        if self._protocol.model != STARTER:
            return name
        folder = self._out / "experts" / name
        if name in MORE and not (folder / "adapter_config.json").is_file():
            examples = MORE[name].examples(self._protocol.train, "expert", held_out=False)
            self._train_expert(examples, folder)
        return folder if name in MORE else text_experts().get(name, name)

    @contextmanager
    def _mixed(self, batch: TextBatch, variant: Variant) -> Iterator[Any]:
        """What `mixture=` is to be, with gates or merged experts in place."""
        kind, model = variant.kind, self.model
        if kind == "gates":
            model.load_gates(self._kept(batch))
        elif kind in ("lorahub", "pems"):
            weights = None if kind == "pems" else self._weights(batch)
            merged = (
                pems(model).expert
                if weights is None
                else mix_factors(list(model.experts.values()), weights, "lorahub")
            )
            assert merged is not None
            model.eject()
            model.add_expert(merged)
        elif kind == "oracle":
            model.load_expert(self._kept(batch).parent)
        elif kind == "layers":
            own = in_blocks(next(iter(model.experts.values())), model.mixtures, *variant.layers)
            model.eject()
            model.add_expert(own)
        # These leave one expert, or ask for all in full.
        full = ("own", "lorahub", "pems", "oracle", "layers")
        if kind in ("alone", "tuned", "searched"):
            yield self._weights(batch)
        elif kind == "both":
            yield dict.fromkeys(self._protocol.skills_of(batch.place), 1.0)
        elif kind == "phatgoose":
            yield phatgoose(model, {name: self._keys(name) for name in model.experts})
        else:
            yield "la" if kind in full else kind

    def _weights(self, batch: TextBatch) -> dict[str, float]:
        found: dict[str, float] = json.loads(self._kept(batch).read_text())["weights"]
        return found

    def _keys(self, name: str) -> ExpertKeys:
        """The keys of an expert, which are learned on its own task where they are not there yet.

        Raises:
            ConfigError: the task of the expert is not known.
        """
        path, tasks = self._out / "keys" / f"{name}.safetensors", {**EXPERTS, **MORE}
        if not path.is_file():
            if name not in tasks:
                raise ConfigError(f"phatgoose trains on experts' own tasks; that of {name!r} is not known")
            examples = tasks[name].examples(self._protocol.train, "keys", held_out=False)
            pairs = [one.pair for one in examples]
            found = train_keys(self.model, self.model.tokenizer, name, pairs, KeyConfig(progress=False))
            path.parent.mkdir(exist_ok=True)
            write_safetensors(path, {key: value.cpu() for key, value in found.items()}, {"mole.kind": "keys"})
        keys: ExpertKeys = load_file(path)
        return keys

    def _train_gates(self, batch: TextBatch, variant: Variant) -> None:
        settings = {**self._protocol.training, **variant.training, "seed": batch.seed, "progress": False}
        task = self.task(variant.trained_on or batch.place)
        examples = [one.pair for one in task.train]
        folder = self._kept(batch).parent
        # Not to be taken for finished while it is under way.
        work = folder.with_name(f"{folder.name}.training")
        result = self.model.train_gates(examples, TextTrainingConfig(**settings), checkpoint_dir=work)
        write_text(folder / "history.json", json.dumps(result.history[:: max(1, len(result.history) // 100)]))
        self.model.save_gates(self._kept(batch))

    def _train_oracle(self, batch: TextBatch) -> None:
        self._train_expert(self.task(batch.place).train, self._kept(batch).parent, seed=batch.seed)

    def _train_expert(self, examples: Sequence[Example], folder: Path, **settings: Any) -> None:
        from mole_diffusion.text.expert_training import TextExpertConfig, train_expert

        settings = {"rank": _RANK, **self._protocol.trained_experts, **settings, "progress": False}
        pairs = [one.pair for one in examples]
        train_expert(self.model.model, self.model.tokenizer, pairs, folder, TextExpertConfig(**settings))

    def _search(self, batch: TextBatch, variant: Variant) -> Merged:
        model, shots = self.model, [one.pair for one in self.task(batch.place).shots]
        if variant.kind == "alone":
            return alone(model, model.tokenizer, shots)
        if variant.kind == "tuned":
            return tuned(model, model.tokenizer, shots)
        options: dict[str, Any] = {"seed": batch.seed}
        if variant.same_budget:
            config = TextTrainingConfig(**self._protocol.training)
            train = self.task(batch.place).train[: 4 * config.batch_size]
            shots = [one.pair for one in train]
            options["budget"] = max(1, _PASSES * config.iterations * config.batch_size // len(shots))
        if variant.kind == "lorahub":
            return lorahub(model, model.tokenizer, shots, literal=not variant.same_budget, **options)
        return searched(model, model.tokenizer, shots, **options)

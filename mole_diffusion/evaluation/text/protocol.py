"""What is evaluated on texts: tasks, experts, methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.evaluation.protocol import Part, chosen, find_protocol, read_protocol, shipped
from mole_diffusion.starter.location import STARTER
from mole_diffusion.starter.text.more import MORE
from mole_diffusion.starter.text.tasks import EXPERTS, JOINT, UNSEEN
from mole_diffusion.starter.text.words import Example

FOLDER = Path(__file__).parent / "protocols"
#: Kinds of methods that have one expert alone, the task's own if no other is named.
LONE = ("own", "layers")
#: Kinds that have no expert of the protocol's.
BARE = ("none", "oracle")
#: Kinds of methods that every protocol may name.
KINDS = (
    *("la", "nla", "gates", "arrow", "energy", "phatgoose", "alone", "tuned", "searched"),
    *("lorahub", "pems", "both", *LONE, *BARE),
)


class Variant(Part):
    """A method, and what differs from the protocol's settings.

    Attributes:
        kind: one of `KINDS`: "own" is the task's own expert, "layers" the same in some blocks alone, "both"
            those that know the parts of the task at 1, "oracle" a LoRA trained for the task.
        gates, training: changes of the form of gates, and of their training.
        drawn: another number of experts.
        trained_on: another task that gates are trained on.
        top_k: for "gates": how many experts each text is left with; see `text.selection`.
        kept: for "gates": how many experts are kept of all, those that gates of all of them weigh most; see
            `MoLEForSeq2SeqLM.keep_best`. The protocol has a method that differs in this alone.
        layers: for "layers", from which to which share of the blocks.
        expert: for "own" and "layers": another expert than the task's own.
        same_budget: for "lorahub" and "searched": as many passes as the gates' training.
    """

    kind: str
    gates: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    drawn: int | None = None
    trained_on: str | None = None
    top_k: int | None = Field(None, ge=1)
    kept: int | None = Field(None, ge=2)
    layers: tuple[float, float] = (0.0, 1.0)
    expert: str | None = None
    same_budget: bool = False

    @model_validator(mode="after")
    def _known(self) -> Variant:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        for name in ("top_k", "kept"):
            if getattr(self, name) is not None and self.kind != "gates":
                raise ValueError(f"{name} goes by gates, and kind is {self.kind!r}")
        if self.expert is not None and self.kind not in LONE:
            raise ValueError(f"expert goes by {' and '.join(LONE)}, and kind is {self.kind!r}")
        return self


class TaskFiles(Part):
    """A task that lies in files, JSONL as LoRAHub's.

    Attributes:
        test: what is measured.
        train: what gates train on; None for the shots.
        shots: what weights are searched on; None for the first of `train`.
        metric: see `scorers`.
    """

    test: Path
    train: Path | None = None
    shots: Path | None = None
    metric: Literal["exact", "bleu", "rouge"] = "exact"


class TextProtocol(Part):
    """An evaluation.

    Attributes:
        title: of its table.
        model: "starter", a folder or a hub id.
        tasks: names of the starter's tasks.
        files: name -> a task in files.
        experts: names or sources that are always there.
        own: whether each task's own expert is there too.
        skills: whether those are there that know the parts of each task; see `starter.text.two_skills`.
        drawn: how many experts there are in all: those missing are drawn from the starter and then from
            `starter.text.more`, always the same ones, and fewer are among more.
        trained_experts: settings of `TextExpertConfig` for experts that do not come with the starter, which
            are trained where they are asked for, and for oracles.
        methods: name in the table -> what it is.
        seeds: trainings of everything that is trained.
        items: held-out items of each task.
        train: examples that gates train on.
        shots: examples that weights are searched on.
        gates, training: form of the gates, and their training.
        tokens: most tokens of an answer.
        dtype: of the model.
        baseline: the method that win rates are against.
    """

    title: str
    model: str = STARTER
    tasks: tuple[str, ...] = ()
    files: dict[str, TaskFiles] = Field(default_factory=dict)
    experts: tuple[str, ...] = ()
    own: bool = False
    skills: bool = False
    drawn: int = 0
    trained_experts: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, Variant]
    seeds: int = Field(3, ge=1)
    items: int = Field(200, ge=1)
    train: int = Field(9600, ge=1)
    shots: int = Field(5, ge=1)
    gates: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    tokens: int = Field(24, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    baseline: str = "nla"

    def restricted(
        self, tasks: tuple[str, ...] | None, methods: tuple[str, ...] | None, seeds: int | None
    ) -> TextProtocol:
        """The same for some of its tasks and methods, and the first so many seeds."""
        names = self.names if tasks is None else tasks
        chosen("task", names, dict.fromkeys(self.names))
        kept = tuple(self.methods) if methods is None else methods
        chosen("method", kept, self.methods)
        return self.model_copy(
            update={
                "tasks": tuple(name for name in self.tasks if name in names),
                "files": {name: files for name, files in self.files.items() if name in names},
                "methods": {name: self.methods[name] for name in kept},
                "seeds": seeds or self.seeds,
            }
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks."""
        return (*self.tasks, *self.files)

    def task(self, name: str) -> TextTask:
        """A task by name.

        Raises:
            ConfigError: there is none.
        """
        if name in self.files:
            return _from_files(name, self.files[name])
        known = {**EXPERTS, **UNSEEN}
        if name not in known:
            raise ConfigError(f"no task is called {name!r}; known are {list(known)}")
        task = known[name]
        return TextTask(
            name,
            task.family,
            task.metric,
            task.examples(self.train, "training", held_out=False),
            task.examples(self.items, "evaluation", held_out=True),
            task.examples(self.shots, "shots", held_out=False),
        )

    def trained_as(self, method: str) -> str:
        """The method that makes what a method needs: what differs in `top_k` alone has the same gates."""
        return self._same_but_for(method, "top_k") or method

    def chosen_by(self, method: str) -> str:
        """The method whose gates choose the experts that another one keeps.

        Raises:
            ConfigError: the protocol has none, or it is left out.
        """
        found = self._same_but_for(method, "kept")
        if found is None:
            raise ConfigError(
                f"method {method!r} keeps experts that gates of all choose; add the method of these"
            )
        return found

    def _same_but_for(self, method: str, field: str) -> str | None:
        """The first method that is like another one with this field left out."""
        wanted = self.methods[method].model_copy(update={field: None})
        return next((name for name, one in self.methods.items() if one == wanted), None)

    def skills_of(self, task: str) -> tuple[str, ...]:
        """The experts that know the parts of a task.

        Raises:
            ConfigError: there are none.
        """
        found = UNSEEN[task].skills if task in UNSEEN else ()
        if not found:
            known = [name for name, one in UNSEEN.items() if one.skills]
            raise ConfigError(f"no experts know the parts of {task!r}; skills are of {', '.join(known)}")
        return found

    def experts_for(self, task: str, variant: Variant) -> tuple[str, ...]:
        """The experts of a task, in the order of the gates' rows.

        Raises:
            ConfigError: more are to be drawn than there are, or no experts know the task's parts.
        """
        if variant.kind in BARE:
            return ()
        if variant.kind in LONE:
            return (variant.expert or task,)
        found = list(self.experts)
        if self.own and task in EXPERTS and task not in found:
            found.append(task)
        if self.skills or variant.kind == "both":
            found += [name for name in self.skills_of(task) if name not in found]
        wanted = self.drawn if variant.drawn is None else variant.drawn
        pool = [name for name in EXPERTS if name not in found and name != JOINT.name]
        if not self.own and task in pool:
            pool.remove(task)
        Random(f"experts beside {task if self.own or self.skills else 'all'}").shuffle(pool)
        more = list(MORE)
        Random("more experts").shuffle(more)
        pool += more
        missing = max(0, wanted - len(found))
        if missing > len(pool):
            raise ConfigError(f"drawn is {wanted}; there are {len(found) + len(pool)} experts for {task!r}")
        return tuple(found + pool[:missing])


@dataclass(frozen=True)
class TextTask:
    """A task with its examples.

    Attributes:
        name, family, metric: see `starter.text.tasks.Task`.
        train, test, shots: what gates train on, what is measured, what weights are searched on.
    """

    name: str
    family: str
    metric: str
    train: list[Example]
    test: list[Example]
    shots: list[Example]


def _from_files(name: str, files: TaskFiles) -> TextTask:
    from mole_diffusion.text.examples import pairs_of

    def read(path: Path | None) -> list[Example]:
        return [] if path is None else [Example(*pair) for pair in pairs_of(path)]

    shots, train = read(files.shots), read(files.train)
    return TextTask(name, "files", files.metric, train or shots, read(files.test), shots or train[:5])


def load_text_protocol(source: str) -> TextProtocol:
    """A protocol that ships, or a file.

    Raises:
        ConfigError: neither, or it says something impossible.
    """
    path = find_protocol(source, FOLDER, Path())
    parts: Mapping[str, type[Part]] = {"methods": Variant, "files": TaskFiles}
    return read_protocol(TextProtocol, parts, path, FOLDER)


def text_protocols() -> list[str]:
    """Names of those that ship."""
    return shipped(FOLDER)


def plain(protocol: TextProtocol) -> dict[str, Any]:
    """As plain values."""
    found: dict[str, Any] = json.loads(protocol.model_dump_json())
    return found

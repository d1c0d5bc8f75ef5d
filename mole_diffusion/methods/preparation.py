"""`prepare`: do the work of a method once, into a folder; `load_prepared`: take it up again."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.core.errors import ConfigError, NoExpertsError, UnknownExpertError
from mole_diffusion.core.phrases import SUBJECT
from mole_diffusion.methods import (
    custom_diffusion,
    merges,
    search,
    ssr,
    svdiff,
    textual_inversion,
    trained_gates,
)
from mole_diffusion.methods.job import Job, PrepareOptions
from mole_diffusion.methods.methods import METHODS, method_named
from mole_diffusion.methods.prepared import (
    FILE,
    FORMAT,
    FORMAT_VERSION,
    STARTED,
    Prepared,
    PreparedMixture,
    describe_base,
    describe_experts,
    read_record,
    write_json,
)
from mole_diffusion.pictures.files import pictures_digest

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept, TrainingConfig


@dataclass(frozen=True)
class _Recipe:
    """How a method is prepared: the work, what reads the result, and what of the job it depends on."""

    work: Callable[[str, Job], None]
    reader: type[Prepared]
    depends_on: tuple[str, ...] = ()


def _nothing(method: str, job: Job) -> None:
    """Methods that the pipeline knows by their word."""
    job.details["mixture"] = method


_WORD = _Recipe(_nothing, PreparedMixture)
_MERGE = _Recipe(merges.merge, merges.PreparedMerge, ("weights", "density", "seed"))
_TRAINED = ("texts", "pictures", "steps", "rate", "seed")
_RECIPES: dict[str, _Recipe] = {
    "gates": _Recipe(
        trained_gates.train, trained_gates.PreparedGates, ("prompts", "concepts", "config", "gates")
    ),
    "svdiff": _Recipe(svdiff.train, svdiff.PreparedShifts, _TRAINED),
    "textual_inversion": _Recipe(textual_inversion.train, textual_inversion.PreparedWords, _TRAINED),
    "custom_diffusion": _Recipe(custom_diffusion.train, custom_diffusion.PreparedCustomDiffusion, _TRAINED),
    "searched": _Recipe(search.search, PreparedMixture, ("prompts", "concepts", "config", "search_passes")),
    "svd": _MERGE,
    "ties": _MERGE,
    "dare_linear": _MERGE,
    "ssr": _Recipe(ssr.merge, merges.PreparedMerge, ("texts", "seed")),
}


def prepare(
    method: str,
    pipe: Any,
    prompts: str | Sequence[str] = (),
    concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
    config: TrainingConfig | None = None,
    folder: str | Path | None = None,
    options: PrepareOptions | None = None,
) -> Prepared:
    """Do the work of a method once; the result is a mixture for `pipe(prompt, mixture=...)`.

    The pipeline is afterwards what it was before, bitwise, with the gates it had.

    Args:
        method: a name in `METHODS`; those that need no preparation are accepted too.
        pipe: a pipeline with its experts loaded.
        prompts: the prompts to prepare for; the merges need none.
        concepts: what each expert knows, as for `pipe.train_gates`; None takes the triggers from their files.
        config: settings of the gate trainer; None is `TrainingConfig()`.
        folder: where to write. A finished preparation of the same is read from there, an unfinished one goes
            on. None keeps the result in a temporary folder, for as long as the object lives.
        options: settings of single methods.

    Raises:
        ConfigError: the method is unknown, something it needs is missing, or the folder holds a preparation
            of something else.
        NoExpertsError: the pipeline has no experts.
    """
    from mole_diffusion.pictures.training import TrainingConfig

    method_named(method)
    if not pipe.experts:
        raise NoExpertsError(f"prepare({method!r}): no experts are loaded: call load_expert() first")
    recipe = _RECIPES.get(method, _WORD)
    temporary = folder is None
    home = Path(tempfile.mkdtemp(prefix="mole-baseline-") if folder is None else folder)
    job = Job(
        pipe,
        home,
        [prompts] if isinstance(prompts, str) else list(prompts),
        _concepts(pipe, concepts, needed=not {"concepts", "texts"}.isdisjoint(recipe.depends_on)),
        config or TrainingConfig(),
        options or PrepareOptions(),
    )
    for name in job.options.weights or {}:
        if name not in pipe.experts:
            raise UnknownExpertError(name, list(pipe.experts))
    facts = _facts(recipe, job)
    made_for = {"base": describe_base(pipe), "experts": describe_experts(pipe), "facts": facts}
    if not _is_done(home, FILE, method, made_for):
        _is_done(home, STARTED, method, made_for)  # what an earlier run began must be the same
        _work(recipe, method, job, home, made_for)
    found = load_prepared(home)
    if temporary:
        weakref.finalize(found, shutil.rmtree, home, ignore_errors=True)
    return found


def _work(recipe: _Recipe, method: str, job: Job, home: Path, made_for: Mapping[str, Any]) -> None:
    """Do a method's work, and write what it was made for and what it cost."""
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "method": method, **made_for}
    write_json(home / STARTED, header)
    start = time.monotonic()
    recipe.work(method, job)
    seconds = round(time.monotonic() - start + job.earlier_seconds, 3)
    cost = {"unet_passes": job.passes, "seconds": seconds, "details": job.details}
    write_json(home / FILE, {**header, **cost})
    (home / STARTED).unlink()


def load_prepared(folder: str | Path) -> Prepared:
    """What `prepare` wrote into a folder.

    Raises:
        ConfigError: there is no finished preparation in the folder.
    """
    home = Path(folder)
    record = read_record(home / FILE)
    if record is None:
        raise ConfigError(f"there is no prepared baseline in {str(home)!r}: it has no {FILE}")
    if record["method"] not in METHODS:
        raise ConfigError(f"{str(home)!r} holds the method {record['method']!r}; known are {list(METHODS)}")
    return _RECIPES.get(record["method"], _WORD).reader(home, record)


def _concepts(pipe: Any, concepts: Any, *, needed: bool) -> Mapping[str, Concept]:
    from mole_diffusion.pictures.training.concepts import as_concepts, concepts_from_experts

    if concepts is None:
        return concepts_from_experts(pipe.experts) if needed else {}
    return as_concepts(concepts, list(pipe.experts))


def _facts(recipe: _Recipe, job: Job) -> dict[str, Any]:
    """What a preparation depends on beside base and experts, as JSON gives it back."""
    known: dict[str, Callable[[], Any]] = {
        "prompts": lambda: job.prompts,
        "concepts": lambda: {name: _describe_concept(concept) for name, concept in job.concepts.items()},
        "config": job.config.facts,
        "gates": lambda: job.pipe.mole_config.to_dict(),
        "weights": lambda: dict(job.options.weights) if job.options.weights else None,
        "density": lambda: job.options.density,
        "seed": lambda: job.config.seed,
        "search_passes": lambda: job.options.search_passes,
        "steps": lambda: job.options.steps,
        "rate": lambda: job.options.rate,
        "texts": lambda: {name: [c.text, c.class_text] for name, c in job.concepts.items()},
        "pictures": lambda: {name: job.digest(concept) for name, concept in job.concepts.items()},
    }
    return {name: _as_json(known[name]()) for name in recipe.depends_on}


def _describe_concept(concept: Concept) -> dict[str, Any]:
    return {
        "text": concept.text,
        "class_text": concept.class_text,
        **({} if concept.kind == SUBJECT else {"kind": concept.kind}),
        "references": len(concept.references),
        "sha256": pictures_digest(concept.references),
    }


def _as_json(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def _is_done(folder: Path, file: str, method: str, made_for: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very preparation, finished or (by `STARTED`) begun.

    Raises:
        ConfigError: it holds another one.
    """
    record = read_record(folder / file)
    if record is None:
        return False
    different = [
        name for name, value in {"method": method, **made_for}.items() if (record.get(name) != value)
    ]
    if different:
        lines = [f"{name}: {_difference(record.get(name), made_for.get(name, method))}" for name in different]
        raise ConfigError(
            "\n  - ".join([f"{str(folder)!r} holds another preparation; give another folder", *lines])
        )
    return True


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
        return "; ".join(f"{n} is {there.get(n)!r} there, {here.get(n)!r} here" for n in names)
    return f"{there!r} there, {here!r} here"

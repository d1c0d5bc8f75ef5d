"""The demo: train gates for a few experts of the starter and show, seed by seed, what they change."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.core.files import check_writable, replacing
from mole_diffusion.core.phrases import kind_of, listed
from mole_diffusion.core.records import in_order
from mole_diffusion.pictures.denoisers import own_size
from mole_diffusion.pictures.drawing import draw
from mole_diffusion.pictures.files import open_picture, write_picture
from mole_diffusion.pictures.grid import GridRow, picture_grid
from mole_diffusion.pictures.opening import hush_libraries
from mole_diffusion.pictures.pipelines import StableDiffusionMoLEPipeline
from mole_diffusion.pictures.training import Concept, TrainingConfig
from mole_diffusion.starter.location import (
    GUIDANCE,
    RESCALE,
    StarterExpert,
    default_experts,
    starter_experts,
)
from mole_diffusion.training.charts import entropy_curve
from mole_diffusion.training.heat_map import gate_heat_map

__all__ = ["DemoOptions", "DemoResult", "region_strips", "run_demo"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo draws.

    Args:
        experts: names of starter experts, two or more; None takes the starter's own choice of three.
        prompt: what to draw; None asks for all experts' subjects on the beach.
        seeds: one picture per seed in every row.
        iterations: training iterations of the gates.
        steps: denoising steps per picture.
        out: folder for the results.
        fresh: train anew even if `out` holds a training with the same settings, finished or not.

    Raises:
        ConfigError: fewer than two experts, an expert twice, or no seeds.
    """

    experts: tuple[str, ...] | None = None
    prompt: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    iterations: int = 400
    steps: int = 25
    out: Path = Path("demo")
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.experts is not None and len(self.experts) < 2:
            raise ConfigError(f"experts: {list(self.experts)}; the demo mixes two or more")
        if self.experts is not None and len(set(self.experts)) != len(self.experts):
            raise ConfigError(f"experts: {list(self.experts)} names one twice")
        if not self.seeds:
            raise ConfigError("seeds: none given; need at least one")


@dataclass(frozen=True)
class DemoResult:
    """What the demo wrote (name -> file), the rows of the grid, and lines on what to try next."""

    files: dict[str, Path]
    rows: list[GridRow]
    next_steps: list[str]


def run_demo(options: DemoOptions, say: Say = print) -> DemoResult:
    """Draw, train, draw again, and write grid, gates and figures to `options.out`.

    Args:
        options: what to draw and where to write.
        say: called with one line of progress at a time.

    Raises:
        UnknownExpertError: a name that is not in the starter.
        FileNotFoundError: the starter has not been built.
    """
    chosen = _choose(options.experts)
    prompt = options.prompt or default_prompt(chosen)
    out = options.out
    check_writable(out)
    with _timed(say, f"Loading the starter and the experts {', '.join(chosen)}"):
        hush_libraries()
        pipe = StableDiffusionMoLEPipeline.from_starter(experts=list(chosen))
        pipe.set_progress_bar_config(disable=True)
    say(f'Prompt: "{prompt}"')
    # Five rows before the training; after it the gates, each expert masked in turn, and the regions.
    artist = _Artist(pipe, prompt, options, say, rows=len(chosen) + 7)
    rows = [_reference_row(chosen), artist.alone(chosen), *_rows_before(artist, len(chosen))]
    history = _train(pipe, prompt, chosen, options, say)
    rows.append(artist.row("trained gates", f"{options.iterations} iterations: is each as it is alone?"))
    weights = in_order(pipe.gate_weights().where(branch="prompt").means(), list(chosen))
    rows += _rows_after(artist, pipe, list(chosen))
    files = {
        "picture grid": out / "grid.png",
        "gate heat map": out / "gate-heat-map.png",
        "entropy curve": out / "entropy.png",
        "gates": out / "gates.safetensors",
    }
    write_picture(picture_grid(rows, title=prompt), files["picture grid"])
    heat_map = gate_heat_map(weights, list(chosen), title="Mean gate weights after training")
    write_picture(heat_map, files["gate heat map"])
    with replacing(files["entropy curve"]) as temporary:
        _entropy_figure(history, len(chosen)).savefig(temporary, dpi=120, format="png")
    pipe.save_gates(files["gates"])
    return DemoResult(files, rows, _next_steps(chosen, prompt, files["gates"]))


def default_prompt(experts: Mapping[str, StarterExpert]) -> str:
    """ "a zorin boot, a fenna cat and a kipra clock on the beach"."""
    return f"{listed([expert.text for expert in experts.values()])} on the beach"


def concepts_of(experts: Mapping[str, StarterExpert]) -> dict[str, Concept]:
    """What the trainer needs to know of the starter's experts, with their reference pictures."""
    return {
        name: Concept(
            name,
            expert.text,
            expert.class_text,
            [open_picture(path) for path in expert.references],
            kind_of(expert.text, expert.kind),
        )
        for name, expert in experts.items()
    }


def region_strips(names: Sequence[str], height: int, width: int) -> dict[str, Image.Image]:
    """Region masks that cut the picture into upright strips of one width, left to right, one per name."""
    edges = [round(width * i / len(names)) for i in range(len(names) + 1)]
    masks = {}
    for name, start, end in zip(names, edges[:-1], edges[1:], strict=True):
        area = np.zeros((height, width), dtype=np.uint8)
        area[:, start:end] = 255
        masks[name] = Image.fromarray(area, mode="L")
    return masks


class _Artist:
    """Draws the same prompt on the same seeds, with whatever mixture is asked for.

    Args:
        pipe, prompt, options, say: as in `run_demo`.
        rows: how many rows there will be, for the time that is left.
    """

    def __init__(
        self, pipe: StableDiffusionMoLEPipeline, prompt: str, options: DemoOptions, say: Say, rows: int
    ) -> None:
        self.pipe, self.prompt, self.options, self.say = pipe, prompt, options, say
        self._rows, self._done, self._seconds = rows, 0, 0.0

    def row(self, label: str, note: str, captions: Sequence[str] = (), **settings: Any) -> GridRow:
        """The prompt on every seed."""
        seeds = self.options.seeds
        with self._counted(label, len(seeds)):
            pictures = self._draw([self.prompt] * len(seeds), seeds, **settings)
        return GridRow(label, pictures, note, captions)

    def alone(self, experts: Mapping[str, StarterExpert]) -> GridRow:
        """Each expert in full with a prompt of its own, on the first seed."""
        with self._counted("each alone", len(experts)):
            pictures = [
                self._draw(
                    [default_prompt({name: expert})],
                    self.options.seeds[:1],
                    mixture="la",
                    active_experts=[name],
                )[0]
                for name, expert in experts.items()
            ]
        return GridRow("each alone", pictures, "one expert at a time: what the others are held against")

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        return draw(
            self.pipe,
            prompts,
            seeds,
            num_inference_steps=self.options.steps,
            guidance_scale=GUIDANCE,
            guidance_rescale=RESCALE,
            **settings,
        )

    @contextmanager
    def _counted(self, label: str, count: int) -> Iterator[None]:
        """Says what is drawn, and how long the other rows will take."""
        start = time.monotonic()
        self.say(f"Drawing {count} pictures: {label} ...")
        yield
        self._done, self._seconds = self._done + 1, self._seconds + time.monotonic() - start
        left = (self._rows - self._done) * self._seconds / self._done
        self.say(f"  row {self._done} of {self._rows}, about {left:.0f} s of drawing left")


def _choose(names: tuple[str, ...] | None) -> dict[str, StarterExpert]:
    known = starter_experts()
    chosen = names or tuple(default_experts())
    for name in chosen:
        if name not in known:
            raise UnknownExpertError(name, list(known))
    return {name: known[name] for name in chosen}


def _reference_row(experts: Mapping[str, StarterExpert]) -> GridRow:
    shown = [expert for expert in experts.values() if expert.references]
    return GridRow(
        "what the experts know",
        [open_picture(expert.references[0]) for expert in shown],
        "one reference picture each",
        [expert.trigger for expert in shown],
    )


def _rows_before(artist: _Artist, n_experts: int) -> list[GridRow]:
    seeds = [f"seed {seed}" for seed in artist.options.seeds]
    return [
        artist.row("no expert", "the base model", seeds, mixture="none"),
        artist.row("added up (LA)", "every expert in full: are all there, and whole?", mixture="la"),
        artist.row("averaged (NLA)", f"each at 1/{n_experts}: is any as it is alone?", mixture="nla"),
        artist.row("auto", "not trained on these: words and places by the prompt", mixture="auto"),
    ]


def _rows_after(artist: _Artist, pipe: StableDiffusionMoLEPipeline, names: list[str]) -> list[GridRow]:
    rows = [
        artist.row(
            f"without {masked}",
            "the same gates, this expert masked: are the others untouched?",
            active_experts=[n for n in names if n != masked],
        )
        for masked in names
    ]
    height, width = own_size(pipe)
    rows.append(
        artist.row(
            "region masks",
            f"each confined to a strip, left to right: {', '.join(names)}",
            region_masks=region_strips(names, height, width),
        )
    )
    return rows


def _train(
    pipe: StableDiffusionMoLEPipeline,
    prompt: str,
    experts: Mapping[str, StarterExpert],
    options: DemoOptions,
    say: Say,
) -> Sequence[Mapping[str, Any]]:
    """Train the gates in place, or go on where a run stopped; returns the trainer's history."""
    folder = options.out / "training"
    if options.fresh and folder.exists():
        shutil.rmtree(folder)
    with _timed(say, f"Training gates, {options.iterations} iterations"):
        result = pipe.train_gates(
            prompt,
            concepts=concepts_of(experts),
            config=TrainingConfig(iterations=options.iterations),
            checkpoint_dir=folder,
        )
    return result.history


def _entropy_figure(history: Sequence[Mapping[str, Any]], n_experts: int) -> Any:
    seen = [entry for entry in history if "entropy" in entry]
    return entropy_curve(
        [entry["iteration"] for entry in seen], [entry["entropy"] for entry in seen], n_experts
    )


def _next_steps(experts: Mapping[str, StarterExpert], prompt: str, gates: Path) -> list[str]:
    others = [
        name for name, expert in starter_experts().items() if expert.kind == "concept" and name not in experts
    ]
    names = list(experts)
    return [
        f"mole demo --experts {','.join((others + names)[:3])} --out demo-2    other experts of the starter",
        f"mole inspect {gates}    what the gates file holds",
        "In Python:",
        "    from mole_diffusion import StableDiffusionMoLEPipeline",
        f"    pipe = StableDiffusionMoLEPipeline.from_starter(experts={names!r})",
        f"    pipe.load_gates({str(gates)!r})",
        f"    pipe({json.dumps(prompt)}, active_experts={names[:2]!r}).images[0].show()",
    ]


@contextmanager
def _timed(say: Say, what: str) -> Iterator[None]:
    start = time.monotonic()
    say(f"{what} ...")
    yield
    say(f"  done in {time.monotonic() - start:.0f} s")

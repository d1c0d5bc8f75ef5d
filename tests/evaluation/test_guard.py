"""A network that guided a training is never a metric, whatever it is called."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mole_diffusion import ConfigError
from mole_diffusion.evaluation.pictures import run
from mole_diffusion.evaluation.pictures.protocol import load_protocol
from mole_diffusion.starter import starter_dir

Write = Callable[..., Path]


def guided(folder: Path, **training: Any) -> dict[str, Any]:
    return {"name": "gates", "training": {"objective": "clip", "clip": f"local-dir:{folder}", **training}}


def run_with(write_protocol: Write, tmp_path: Path, scoring: str, method: Any) -> None:
    protocol = load_protocol(
        write_protocol(methods=[method], masks=[], metrics={"clip": [scoring], "judge": None})
    )
    run.evaluate(protocol, tmp_path / "out", device=torch.device("cpu"), say=lambda line: None, shown=False)


@pytest.mark.parametrize("objective", ["clip", "both", "released"])
def test_the_guide_itself_is_refused_before_anything_is_drawn(
    write_protocol: Write, world: Path, tmp_path: Path, objective: str
) -> None:
    guide = world / "clip_guide"
    method = guided(guide, objective=objective)
    with pytest.raises(ConfigError, match=r"holds the network that guides \['gates'\]"):
        run_with(write_protocol, tmp_path, f"local-dir:{guide}", method)
    assert not (tmp_path / "out").exists()


def test_a_copy_in_half_precision_under_other_names_is_refused(
    write_protocol: Write, world: Path, tmp_path: Path
) -> None:
    disguised = tmp_path / "disguised"
    shutil.copytree(world / "clip_guide", disguised)
    weights = load_file(disguised / "open_clip_model.safetensors")
    save_file(
        {name: value.half() for name, value in weights.items()}, disguised / "open_clip_model.safetensors"
    )
    with pytest.raises(ConfigError, match="score with another one"):
        run_with(write_protocol, tmp_path, f"local-dir:{disguised}", guided(world / "clip_guide"))


def test_one_shared_tower_is_enough(write_protocol: Write, world: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(world / "clip_score", mixed)
    own = load_file(mixed / "open_clip_model.safetensors")
    guide = load_file(world / "clip_guide" / "open_clip_model.safetensors")
    visual = {name: value for name, value in guide.items() if name.startswith("visual.")}
    assert visual
    save_file({**own, **visual}, mixed / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match="holds the network that guides"):
        run_with(write_protocol, tmp_path, f"local-dir:{mixed}", guided(world / "clip_guide"))


def test_the_starters_clip_is_the_guide_where_none_is_named(write_protocol: Write, tmp_path: Path) -> None:
    method = {"name": "gates", "training": {"objective": "both"}}
    with pytest.raises(ConfigError, match="holds the network that guides"):
        run_with(write_protocol, tmp_path, f"local-dir:{starter_dir() / 'clip'}", method)


def test_another_clip_may_score_and_so_may_any_where_nothing_is_guided(
    write_protocol: Write, world: Path
) -> None:
    from mole_diffusion.evaluation.pictures.guard import refuse_guides
    from mole_diffusion.evaluation.pictures.scorers import ClipScorer

    cpu = torch.device("cpu")
    guide, other = (f"local-dir:{world / name}" for name in ("clip_guide", "clip_score"))
    towers = {clip: ClipScorer(clip, cpu).hashes for clip in (guide, other)}
    protocol = load_protocol(write_protocol(masks=[], methods=[guided(world / "clip_guide")]))
    refuse_guides(protocol, {other: towers[other]})
    with pytest.raises(ConfigError, match="fool it"):
        refuse_guides(protocol, towers)
    refuse_guides(load_protocol(write_protocol()), towers)

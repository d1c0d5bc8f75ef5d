"""Candidates that experts drew, ranked by a CLIP of random weights and by how they cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig
from mole_diffusion.pictures.training.clip_guidance import ClipGuide
from mole_diffusion.pictures.training.collage import cut_out
from mole_diffusion.pictures.training.ranking import agreement, best, rank_candidates, standing

BLUE = (150, 190, 230)


def test_the_best_are_kept_in_their_order() -> None:
    assert best(torch.tensor([0.1, 3.0, -1.0, 2.0]), 2) == [1, 3]
    assert best(torch.tensor([1.0, 2.0]), 5) == [0, 1]


def test_no_term_outweighs_another() -> None:
    small, large = torch.tensor([0.0, 1e-3, 2e-3]), torch.tensor([200.0, 100.0, 0.0])
    torch.testing.assert_close(standing([small, large]), torch.zeros(3), atol=1e-4, rtol=0)


def test_what_looks_like_the_others_agrees_with_them() -> None:
    alike = torch.tensor([[1.0, 0.0], [0.96, 0.28], [0.96, -0.28]])
    found = agreement(torch.cat([alike, torch.tensor([[0.0, 1.0]])]))
    assert int(found.argmin()) == 3
    assert float(agreement(alike)[0]) == pytest.approx(0.96)


def test_what_cannot_be_cut_out_comes_last(clip_folder: str, picture: Callable[..., torch.Tensor]) -> None:
    guide = ClipGuide.load(clip_folder, torch.device("cpu"))
    boots = [picture("boot", x, BLUE) for x in (10, 12, 14, 16)]
    pictures = torch.stack([boots[0], torch.full_like(boots[0], 0.5), *boots[1:]])
    cutouts = [cut_out(picture) for picture in pictures]
    assert [cutout.trusted for cutout in cutouts] == [True, False, True, True, True]
    scores = rank_candidates(guide, pictures, cutouts, "a boot", "a boot")
    assert int(scores.argmin()) == 1
    assert best(scores, 4) == [0, 2, 3, 4]


def test_so_many_of_all_candidates_are_kept(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Callable[..., TrainingConfig]
) -> None:
    silent = [Concept(c.name, c.text, c.class_text) for c in concepts]

    def drawn(**changes: Any) -> dict[str, torch.Tensor]:
        config = tiny(ranking_clip=clip_folder, collage_background="base", **changes)
        trainer = GateTrainer(pipe, "a zorin boot and a vim cat", silent, config)
        trainer.objective.prepare()
        return trainer.objective.pictures.state_dict()

    everything, kept = drawn(drawn_pictures=6), drawn(drawn_pictures=2, candidates=3)
    assert {name: len(pictures) for name, pictures in kept.items()} == {"boot\n0": 2, "cat\n0": 2, "\n0": 2}
    for name in ("boot\n0", "cat\n0"):
        found = [any(torch.equal(one, other) for other in everything[name]) for one in kept[name]]
        assert found == [True, True]


def test_a_ranking_clip_of_three_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranking_clip is .*; allowed are a model name and a pair"):
        TrainingConfig(ranking_clip=("a", "b", "c"))

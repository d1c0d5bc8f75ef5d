"""What gates learn from seven kinds of pictures of subjects in a style: `python bench/styled_sources.py`.

by auto             as `auto` draws the subject in the style, which is how training does it
together            by the subject's expert and the style's with fixed weights, as training did it before
plain               the subject's reference pictures as they are, on the style's backgrounds
plain and together  both
recoloured          reference pictures, six tenths of the way to the colours of the style's pictures
redrawn             the subject alone, recoloured, then noised and drawn to the end by both experts
rendered            the starter's own artwork drawn in the style: perfect pictures, which no user has

The protocol is `styled-sources.yaml` beside this file; the folder is one of `mole evaluate`. `rendered` needs
the artwork of the repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mole_diffusion.evaluation.pictures import run
from mole_diffusion.evaluation.pictures.measures import PICTURES
from mole_diffusion.evaluation.pictures.protocol import load_protocol
from mole_diffusion.evaluation.results import Results
from mole_diffusion.pictures.opening import pick_device
from mole_diffusion.pictures.training import objectives
from mole_diffusion.pictures.training.sources import ConceptPictures
from tools.starter import world

#: Share of their own colours that recoloured subjects keep, before they are redrawn and where they are not.
KEPT, KEPT_REDRAWN = 0.4, 0.25
#: How far the noise goes from which they are redrawn, and the scale of the subject's expert then.
STRENGTH, OWN = 0.58, 0.8
#: Scales of the subject's expert and of the style's, in the first and in the second half of the steps.
HALVES = ((0.8, 1.2), (1.2, 0.8))
#: Rendered pictures of each subject for each prompt.
RENDERED = 6


def recoloured(pictures: Tensor, like: Tensor, kept: float) -> Tensor:
    """Pictures (n, 3, H, W) in 0..1 with the mean and covariance of other pictures' colours, in part.

    Args:
        pictures: whose shapes stay.
        like: whose colours are taken.
        kept: share of their own colours that stays, from 0 to 1.
    """
    (mean, own), (wanted, other) = _colours(pictures), _colours(like)
    change = _power(other, 0.5) @ _power(own, -0.5)
    flat = change @ (pictures.permute(1, 0, 2, 3).flatten(1) - mean) + wanted
    moved = flat.view(3, len(pictures), *pictures.shape[2:]).permute(1, 0, 2, 3).clamp(0, 1)
    return kept * pictures + (1 - kept) * moved


def _colours(pictures: Tensor) -> tuple[Tensor, Tensor]:
    flat = pictures.permute(1, 0, 2, 3).flatten(1)
    mean = flat.mean(1, keepdim=True)
    return mean, (flat - mean) @ (flat - mean).T / flat.shape[1] + 1e-5 * torch.eye(3)


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = vectors @ torch.diag(values.clamp_min(1e-6).pow(power)) @ vectors.T
    return result


class Plain(ConceptPictures):
    """Reference pictures, on the style's backgrounds."""

    kept = 1.0

    def prepare(self, *, backgrounds: bool) -> None:
        """Draw the backgrounds alone."""
        self._draw(list(self._background_batches()))
        for index, prompt in enumerate(self.prompts):
            for name in prompt.subjects:
                own = self._references[name]
                self._drawn[name, index] = (
                    own if self.kept == 1 else recoloured(own, self._drawn["", index], self.kept)
                )


class Recoloured(Plain):
    """The same, in part in the style's colours."""

    kept = KEPT


class Anew(ConceptPictures):
    """Subjects in a style, drawn in another way than training draws them."""

    #: Added to the training's seed.
    seed = 1

    @torch.no_grad()
    def prepare(self, *, backgrounds: bool) -> None:
        """Draw as training does, and each subject in a style anew."""
        super().prepare(backgrounds=backgrounds)
        draws = torch.Generator().manual_seed(self._bench.seed + self.seed)
        for index, prompt in enumerate(self.prompts):
            for name in prompt.subjects if prompt.styles else ():
                count = len(self._drawn[name, index])
                self._drawn[name, index] = self._anew(name, index, count, draws)

    def _anew(self, name: str, index: int, count: int, draws: torch.Generator) -> Tensor:
        """(count, 3, H, W) of a subject for the prompt of this index."""
        raise NotImplementedError

    def _to_the_end(
        self, latents: Tensor, texts: list[str], parts: Sequence[tuple[Tensor, dict[str, float]]]
    ) -> Tensor:
        """Pictures of latents, from the times and scales of the experts of each part of the way."""
        bench = self._bench
        with bench.autocast():
            for times, mixture in parts:
                with bench.composing(mixture=mixture):
                    latents = bench.sampler.run(latents, times, *bench.encode_texts(texts))
            pictures = bench.denoiser.decode(latents)
        return (pictures.float().clamp(0, 1) * 255).round().cpu() / 255


class Together(Anew):
    """Both experts at fixed weights, more of the style in the first half of the steps."""

    def _anew(self, name: str, index: int, count: int, draws: torch.Generator) -> Tensor:
        bench, prompt = self._bench, self.prompts[index]
        times, styles = bench.denoiser.schedule(bench.settings.sampling_steps), prompt.styles
        half = len(times) // 2
        mixtures = [{name: own, **dict.fromkeys(styles, style / len(styles))} for own, style in HALVES]
        parts = list(zip((times[:half], times[half:]), mixtures, strict=True))
        texts = [prompt.only([name, *styles])] * count
        return self._to_the_end(bench.sampler.noise(count, draws), texts, parts)


class Both(Together):
    """Reference pictures, and as many that the experts draw together."""

    def prepare(self, *, backgrounds: bool) -> None:
        """Draw together, and join the references."""
        super().prepare(backgrounds=True)
        for index, prompt in enumerate(self.prompts):
            for name in prompt.subjects:
                drawn = self._drawn[name, index]
                self._drawn[name, index] = torch.cat([self._references[name][: len(drawn)], drawn])


class Redrawn(Anew):
    """Subjects alone, recoloured, noised and drawn to the end by both experts."""

    seed = 3

    def _anew(self, name: str, index: int, count: int, draws: torch.Generator) -> Tensor:
        bench, denoiser, prompt = self._bench, self._bench.denoiser, self.prompts[index]
        alone = bench.draw([prompt.only([name])] * count, draws, active_experts=[name])
        start = recoloured(alone, self._drawn["", index], KEPT_REDRAWN)
        times = denoiser.schedule(bench.settings.sampling_steps)
        first = len(times) - round(len(times) * STRENGTH)
        latents = bench.encode_pictures(start).float()
        noise = torch.randn(latents.shape, generator=draws).to(latents)
        latents = denoiser.noisy(latents, noise, times[first].expand(count).to(latents.device))
        texts = [prompt.only([name, *prompt.styles])] * count
        mixture = {name: OWN, **dict.fromkeys(prompt.styles, 1.0)}
        return self._to_the_end(latents, texts, [(times[first:], mixture)])


class Rendered(ConceptPictures):
    """The artwork of the subjects, drawn in the style."""

    def prepare(self, *, backgrounds: bool) -> None:
        """Render; backgrounds are those of the same pictures."""
        rng = np.random.default_rng(1)
        for index, prompt in enumerate(self.prompts):
            place = next(key for key, words in world.BACKGROUNDS.items() if words in prompt.text)
            (style,) = prompt.styles
            made = {name: self._rendered(name, place, style, rng) for name in prompt.subjects}
            self._drawn |= {(name, index): pictures for name, pictures in made.items()}
            self._drawn["", index] = torch.cat(list(made.values()))

    @staticmethod
    def _rendered(name: str, place: str, style: str, rng: np.random.Generator) -> Tensor:
        pictures = []
        for _ in range(RENDERED):
            scene = world.draw_scene([world.Thing(name, world.SUBJECT_STYLE)], place, rng)
            pixels = np.array(world.apply_style(scene.pixels, style))
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        return torch.stack(pictures)


KINDS: dict[str, type[ConceptPictures]] = {
    "by auto": ConceptPictures,
    "together": Together,
    "plain": Plain,
    "plain and together": Both,
    "recoloured": Recoloured,
    "redrawn": Redrawn,
    "rendered": Rendered,
}


def main() -> None:
    """Train, draw, measure and write tables; what is there already is not made again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/styled-sources"))
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these, separated by commas")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is there")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    protocol = load_protocol(Path(__file__).with_name("styled-sources.yaml"))
    for kind in () if given.report else given.kinds.split(","):
        setattr(objectives, "ConceptPictures", KINDS[kind])  # noqa: B010
        device = torch.device(pick_device(given.device))
        run.evaluate(protocol.restricted(None, (kind,), None), given.out, device=device)
    run.write_report(protocol, given.out, Results(given.out, PICTURES).read())


if __name__ == "__main__":
    main()

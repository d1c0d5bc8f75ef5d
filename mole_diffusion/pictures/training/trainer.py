"""The gate trainer: everything is frozen but the gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mole_diffusion.core.errors import NoExpertsError, TrainingError
from mole_diffusion.core.functional import balance_loss, entropy
from mole_diffusion.core.mixture import Mixture
from mole_diffusion.pictures.training.clip_guidance import ClipGuide
from mole_diffusion.pictures.training.clip_objective import BothObjectives, ClipObjective
from mole_diffusion.pictures.training.concepts import (
    Concept,
    as_concepts,
    concepts_from_experts,
    read_prompts,
)
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.losses import mean_per_gate
from mole_diffusion.pictures.training.objectives import CollageObjective, LossTerms, TrainingObjective
from mole_diffusion.pictures.training.sources import ConceptPictures
from mole_diffusion.pictures.training.workbench import Workbench, tensor_picture
from mole_diffusion.training import state as training_state
from mole_diffusion.training.progress import (
    Clock,
    HistoryFile,
    HistoryRow,
    Interrupt,
    ProgressBar,
    TrainingEvent,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Args:
        history: A row per iteration: iteration (from 1), loss, parts, balance, entropy, weights, seconds.
        gates: The gates file, where the trainer has a folder.
        stopped: Whether it was asked to stop before its last iteration.
        passes: UNet passes with and without gradient, and pictures decoded for CLIP.
    """

    history: list[HistoryRow]
    gates: Path | None
    stopped: bool
    passes: dict[str, int]


class GateTrainer:
    """Trains the gates of a pipeline for prompts that name several concepts.

    Networks and experts stay bitwise as they are; only the parameters of the gates change.

    Args:
        pipe: A ``StableDiffusionMoLEPipeline`` with its experts loaded.
        prompts: One or several prompts. Class words are replaced by the trigger phrases where triggers are
            missing.
        concepts: What each expert knows: :class:`Concept` objects, or a mapping from expert name to a
            Concept, to a dictionary of its fields or to its phrase. None takes the triggers from the
            experts' files.
        config: The settings; None is ``TrainingConfig()``.
        callback: Called with a :class:`TrainingEvent` after every iteration; ``False`` ends the training,
            which keeps what it has.
        checkpoint_dir: Folder for checkpoints, gates, history and previews; None keeps everything in memory.

    Raises:
        NoExpertsError: if the pipeline has no experts.
        ConfigError: if prompts and concepts do not fit together.
        TrainingError: if the pipeline's scheduler cannot be trained with, or there is one expert alone.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        *,
        callback: Callable[[TrainingEvent], Any] | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> None:
        if not pipe.mixtures:
            raise NoExpertsError(
                "train_gates: no experts are loaded, and gates belong to experts: call load_expert() first"
            )
        if len(pipe.experts) == 1:
            raise TrainingError(
                f"train_gates: {next(iter(pipe.experts))!r} is the only expert and needs no gates;"
                " load two or more"
            )
        self.config = config or TrainingConfig()
        if concepts is None:
            concepts = concepts_from_experts(pipe.experts)
        self.concepts = as_concepts(concepts, list(pipe.experts))
        self.prompts = read_prompts(prompts, self.concepts)
        self._pipe = pipe
        self._callback = callback
        self._folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self._bench = Workbench(pipe, self.prompts, self.concepts, self.config, _decoder(pipe, self.config))
        self._pictures = ConceptPictures(self._bench)
        self._guide = _guide(self._bench) if self.config.uses_clip else None
        self._objective = _objective(self._bench, self._pictures, self._guide)
        self._stopping = False

    def stop(self) -> None:
        """End the training after the running iteration; may be called from another thread."""
        self._stopping = True

    def train(self, resume: bool | None = None) -> TrainingResult:
        """Train, or go on with a training.

        Args:
            resume: True goes on from the checkpoint in ``checkpoint_dir``, False begins anew; None goes on
                where there is a checkpoint of the same training.

        Raises:
            TrainingError: if ``resume`` is True and there is no checkpoint of the same training, or a loss
                is no number.
            KeyboardInterrupt: after Ctrl-C; the checkpoint holds everything up to there.
        """
        saved = self._saved(resume)
        self._stopping = False
        groups = training_state.parameter_groups(self._trained, self.config)
        gates = [parameter for group in groups for parameter in group["params"]]
        with ExitStack() as stack:
            stack.enter_context(training_state.only_gates_train(self._frozen(), gates))
            stack.enter_context(training_state.resting(self._pipe.mixtures, self._trained))
            wanted = self.config.gradient_checkpointing
            networks = [self._pipe.unet, self._bench.decoder] if self.config.uses_clip else [self._pipe.unet]
            stack.enter_context(training_state.gradient_checkpointing(networks, wanted))
            stack.enter_context(training_state.full_precision([self._pipe.vae, self._bench.decoder]))
            stack.enter_context(self._pipe.composing())
            run = _Run(torch.optim.Adam(groups), gates, [])
            run.optimiser.zero_grad(set_to_none=True)
            if saved is not None:
                self._restore(run, saved)
            else:
                self._pictures.prepare(backgrounds=self.config.needs_backgrounds)
                self._objective.prepare()
            self._iterate(run)
        return TrainingResult(
            run.history,
            self._folder / training_state.GATES_FILE if self._folder else None,
            len(run.history) < self.config.iterations,
            self._bench.counter.state_dict(),
        )

    def _iterate(self, run: _Run) -> None:
        """The loop: iterations, checkpoints, callbacks."""
        config, first = self.config, len(run.history)
        run.clock = Clock(run.history[-1]["seconds"] if run.history else 0.0)
        file = HistoryFile(self._folder / training_state.HISTORY_FILE if self._folder else None, run.history)
        interrupt = Interrupt()
        with self._saving(run, interrupt), ProgressBar(config.iterations, first, config.progress) as bar:
            for iteration in range(first, config.iterations):
                run.complete = False
                row = self._iteration(run, iteration)
                run.history.append(row)
                run.complete = True
                file.append(row)
                bar.update(row)
                done = iteration + 1
                if done % config.checkpoint_every == 0 and done < config.iterations:
                    self._checkpoint(run)
                left = run.clock.left(done - first, config.iterations - done)
                if self._tell(row, left) is False or self._stopping or interrupt.asked:
                    break

    def _iteration(self, run: _Run, iteration: int) -> HistoryRow:
        """One iteration: losses, backward, updates; returns its history row."""
        factor = training_state.learning_rate_factor(self.config, iteration)
        for group in run.optimiser.param_groups:
            group["lr"] = group["full_lr"] * factor
        terms = [self._backward(run, term, iteration) for term in self._objective.losses(iteration)]
        weights = mean_per_gate([gate.detach() for gate in self._live_weights()])
        names = {name for term in terms for name in term.parts}
        parts = {
            name: _mean([term.parts[name] for term in terms if name in term.parts]) for name in sorted(names)
        }
        balance = parts.pop("balance")
        return {
            "iteration": iteration + 1,
            "loss": sum(float(term.loss) for term in terms) / sum(term.update for term in terms),
            "parts": parts,
            "balance": balance,
            "entropy": float(torch.stack([entropy(gate.detach()) for gate in self._live_weights()]).mean()),
            "weights": dict(zip(self.concepts, weights.mean(dim=0).tolist(), strict=True)),
            "seconds": round(run.clock.seconds, 3),
        }

    def _backward(self, run: _Run, terms: LossTerms, iteration: int) -> LossTerms:
        """Backward on one loss, with the balance loss where an update follows; returns it as numbers."""
        loss, parts = terms.loss, dict(terms.parts)
        if terms.update:
            balance = self._balance()
            parts["balance"] = float(balance.detach())
            loss = loss + self.config.alpha * balance
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {float(loss.detach())} in iteration {iteration + 1}: {parts}")
        loss.backward()  # type: ignore[no-untyped-call]
        if terms.update:
            nn.utils.clip_grad_norm_(run.gates, self.config.gradient_clip)
            run.optimiser.step()
            run.optimiser.zero_grad(set_to_none=True)
        return LossTerms(loss.detach(), parts, terms.update)

    def _balance(self) -> Tensor:
        """The balance loss of the last forward, 0 where all experts are used equally."""
        weights = mean_per_gate(self._live_weights())
        if self.config.balance == "average":
            return balance_loss(weights, normalised=True)
        return torch.stack([balance_loss(gate, normalised=True) for gate in weights]).mean()

    @property
    def _trained(self) -> dict[str, Mixture]:
        """The mixtures whose gates train."""
        return training_state.trained(self._pipe.mixtures, self.config)

    def _live_weights(self) -> list[Tensor]:
        """Weights (batch, experts) of every trained gate in the last forward, with gradient."""
        return [gate for mixture in self._trained.values() for gate in mixture.live_weights().values()]

    def _tell(self, row: HistoryRow, left: float) -> Any:
        """Draw a preview where one is due and call the callback; returns what it says."""
        preview, every, done = None, self.config.preview_every, row["iteration"]
        if every and done % every == 0:
            preview = self._preview(done)
        if self._callback is None:
            return None
        return self._callback(TrainingEvent(done, self.config.iterations, row, left, preview))

    def _preview(self, iteration: int) -> Image:
        draws = torch.Generator().manual_seed(self.config.seed)
        picture = tensor_picture(self._bench.draw([self.prompts[0].text], draws)[0])
        if self._folder is not None:
            path = self._folder / "previews" / f"{iteration:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        return picture

    @contextmanager
    def _saving(self, run: _Run, interrupt: Interrupt) -> Iterator[None]:
        """Write a checkpoint at the end, however it ends, unless an iteration was cut in the middle."""
        try:
            with interrupt.watching():
                yield
        finally:
            if run.complete:
                self._checkpoint(run)
        if interrupt.asked:
            raise KeyboardInterrupt

    def _checkpoint(self, run: _Run) -> None:
        if self._folder is None:
            return
        mixtures = self._pipe.mixtures
        state = {
            "facts": self._facts(),
            "gates": {part: mixture.gates.state_dict() for part, mixture in mixtures.items()},
            "optimiser": run.optimiser.state_dict(),
            "draws": self._bench.draws.state_dict(),
            "pictures": self._pictures.state_dict(),
            "objective": self._objective.state_dict(),
            "passes": self._bench.counter.state_dict(),
            "history": run.history,
        }
        training_state.save_state(self._folder, state)
        metadata = {"training": self.config.to_json(), "iterations": str(len(run.history))}
        self._pipe.save_gates(self._folder / training_state.GATES_FILE, metadata=metadata)

    def _restore(self, run: _Run, saved: Mapping[str, Any]) -> None:
        for part, mixture in self._pipe.mixtures.items():
            mixture.gates.load_state_dict(saved["gates"][part])
        run.optimiser.load_state_dict(saved["optimiser"])
        self._bench.draws.load_state_dict(saved["draws"])
        self._pictures.load_state_dict(saved["pictures"])
        self._objective.load_state_dict(saved["objective"])
        self._bench.counter.load_state_dict(saved["passes"])
        run.history.extend(saved["history"])

    def _saved(self, resume: bool | None) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None to begin anew."""
        saved = (
            training_state.load_state(self._folder)
            if self._folder is not None and resume is not False
            else None
        )
        if saved is None:
            if resume:
                raise TrainingError(f"resume is True, and there is no checkpoint in {self._folder}")
            return None
        different = training_state.differences(self._facts(), saved["facts"])
        if not different:
            return saved
        message = "\n  - ".join([f"the checkpoint in {self._folder} is of another training", *different])
        if resume:
            raise TrainingError(message)
        logger.warning("%s\nbeginning anew", message)
        return None

    def _facts(self) -> dict[str, Any]:
        """What makes this training this training; equal facts and a checkpoint go on to equal gates."""
        return {
            **self.config.facts(),
            "prompts": [prompt.text for prompt in self.prompts],
            "concepts": [[c.name, c.text, c.class_text, len(c.references)] for c in self.concepts.values()],
            "experts": [[name, expert.sha256, expert.scale] for name, expert in self._pipe.experts.items()],
            "gates": {part: mixture.config.to_json() for part, mixture in self._pipe.mixtures.items()},
        }

    def _frozen(self) -> list[nn.Module]:
        """Every network that takes part."""
        parts = (*self._pipe._networks(), "vae")
        networks = [getattr(self._pipe, part, None) for part in parts] + [self._bench.decoder]
        networks += [self._guide.model] if self._guide is not None else []
        return list({id(network): network for network in networks if network is not None}.values())


@dataclass
class _Run:
    """What changes from iteration to iteration."""

    optimiser: torch.optim.Optimizer
    gates: list[nn.Parameter]
    history: list[HistoryRow]
    clock: Clock = field(default_factory=Clock)
    complete: bool = True


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _decoder(pipe: Any, config: TrainingConfig) -> Any:
    """What decodes for CLIP."""
    if config.decoder is None:
        return pipe.vae
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(config.decoder).to(pipe.unet.device)


def _guide(bench: Workbench) -> ClipGuide:
    """The guiding CLIP; the starter's by default."""
    from mole_diffusion.starter import starter_dir

    clip = bench.config.clip
    return ClipGuide.load(f"local-dir:{starter_dir() / 'clip'}" if clip is None else clip, bench.device)


def _objective(bench: Workbench, pictures: ConceptPictures, guide: ClipGuide | None) -> TrainingObjective:
    collages = CollageObjective(bench, pictures)
    if guide is None:
        return collages
    guided = ClipObjective(bench, pictures, guide)
    return BothObjectives(bench, collages, guided) if bench.config.objective == "both" else guided

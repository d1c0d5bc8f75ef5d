"""The trainer: what changes, what does not, checkpoints, stops and reports."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion import MoLEConfig, StableDiffusionMoLEPipeline
from mole_diffusion.core.errors import ConfigError, NoExpertsError, TrainingError
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig, TrainingEvent
from mole_diffusion.pictures.training.trainer import trained_parts
from mole_diffusion.training.gates import Gates

PROMPT = "a zorin boot and a vim cat"
Tiny = Callable[..., TrainingConfig]
Values = Callable[[Any], dict[str, torch.Tensor]]


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in networks(pipe).items() for k, v in m.state_dict().items()}


def factors(pipe: Any) -> list[torch.Tensor]:
    return [
        tensor.clone()
        for expert in pipe.experts.values()
        for matrices in expert.factors.values()
        for pair in matrices.values()
        for tensor in (pair.down, pair.up)
    ]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def fresh(pipe: Any) -> Callable[[], Any]:
    """`fresh()`: the pipeline with new gates."""

    def renew() -> Any:
        pipe.configure(pipe.mole_config)
        return pipe

    return renew


@pytest.mark.parametrize("objective", ["collage", "clip"])
def test_only_gates_change(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny, gate_values: Values, objective: str
) -> None:
    pipe.unet.train()
    pipe.vae.decoder.requires_grad_(False)
    flags = {n: [p.requires_grad for p in m.parameters()] for n, m in networks(pipe).items()}
    before, experts, gates = weights(pipe), factors(pipe), gate_values(pipe)
    config = tiny(objective=objective, clip=clip_folder)
    trainer = GateTrainer(pipe, PROMPT, concepts, config)
    trainer.train()
    assert_equal(weights(pipe), before)
    assert all(torch.equal(a, b) for a, b in zip(experts, factors(pipe), strict=True))
    changed = {name for name, value in gate_values(pipe).items() if not torch.equal(value, gates[name])}
    fixed = {name for name in gates if name.startswith("text_encoder") and name.endswith("strength")}
    assert changed == set(gates) - fixed, "every gate has moved"
    assert {n: [p.requires_grad for p in m.parameters()] for n, m in networks(pipe).items()} == flags
    assert pipe.unet.training
    assert all(p.grad is None for m in networks(pipe).values() for p in m.parameters())


def test_the_optimiser_holds_exactly_the_gates(pipe: Any, tiny: Tiny) -> None:
    config = tiny(gate_lr=3e-3, scalar_lr=7e-3)
    groups = Gates(pipe.mixtures, config).optimiser().param_groups
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {
        id(p): 7e-3 if name.split(".")[-1] in ("strength", "log_temperature") else 3e-3
        for mixture in pipe.mixtures.values()
        for name, p in mixture.gates.named_parameters()
    }
    assert held == expected


def test_gates_of_the_text_encoder_can_stay_as_they_are(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    before = {name: value.clone() for name, value in pipe.mixtures["text_encoder"].gates.state_dict().items()}
    result = GateTrainer(pipe, PROMPT, concepts, tiny(iterations=2, text_encoder_gates=False)).train()
    assert len(result.history) == 2
    after = pipe.mixtures["text_encoder"].gates.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in pipe.mixtures["text_encoder"].parameters()), "flags are put back"
    assert any(p.abs().sum() > 0 for p in pipe.mixtures["unet"].parameters() if p.dim() > 1)


def test_gates_of_a_text_encoder_train_where_there_are_no_others(pipe: Any, tiny: Tiny) -> None:
    alone = {"text_encoder": pipe.mixtures["text_encoder"]}
    assert trained_parts(alone, tiny(text_encoder_gates=False)) == ["text_encoder"]
    assert trained_parts(pipe.mixtures, tiny(text_encoder_gates=False)) == ["unet"]
    assert trained_parts(pipe.mixtures, tiny()) == ["unet", "text_encoder"]


def test_balance_of_every_gate_sees_what_the_average_does_not(
    pipe: Any, tiny: Tiny, concepts: list[Concept]
) -> None:
    """Half of the gates choose the first expert and half the second: balanced on average, not one by one."""
    for i, group in enumerate(pipe.mixtures["unet"].groups):
        sign = 1.0 if i % 2 else -1.0
        with torch.no_grad():
            for name, parameter in group.gate.named_parameters():
                if name.endswith("projection"):
                    parameter.zero_()
                    parameter[..., 0] = 40 * sign
                    parameter[..., 1] = -40 * sign
    balances = {
        kind: GateTrainer(pipe, PROMPT, concepts, tiny(iterations=1, balance=kind))
        .train()
        .history[0]["balance"]
        for kind in ("average", "per_gate")
    }
    assert balances["per_gate"] > 2 * balances["average"]


def test_flattened_gates_have_a_rate_of_their_own(pipe: Any, tiny: Tiny) -> None:
    pipe.configure(MoLEConfig(pooling="flatten", learn_strength=False, learn_temperature=False))
    groups = Gates(pipe.mixtures, tiny(flatten_lr=2e-5)).optimiser().param_groups
    assert {group["lr"] for group in groups} == {2e-5}


def test_cosine_ends_at_zero() -> None:
    config = TrainingConfig(iterations=10)
    assert [config.rate(i) for i in (0, 5)] == pytest.approx([1.0, 0.5])
    assert config.rate(10) == pytest.approx(0)
    assert TrainingConfig(schedule="constant").rate(399) == 1


@pytest.mark.parametrize("objective", ["collage", "both"])
def test_six_iterations_are_three_and_three(
    fresh: Callable[[], Any],
    concepts: list[Concept],
    clip_folder: str,
    tiny: Tiny,
    gate_values: Values,
    tmp_path: Path,
    objective: str,
) -> None:
    # One concept draws its own pictures, the other has references.
    mixed = [concepts[0], Concept("cat", "a vim cat", "a cat")]
    config = tiny(objective=objective, clip=clip_folder, iterations=6, clip_from=0.3, seed=11)
    pipe = fresh()
    whole = GateTrainer(pipe, PROMPT, mixed, config).train()
    expected = gate_values(pipe)

    def until_three(event: TrainingEvent) -> bool:
        return event.iteration < 3

    first = GateTrainer(fresh(), PROMPT, mixed, config, callback=until_three, checkpoint_dir=tmp_path).train()
    assert first.stopped
    assert len(first.history) == 3
    torch.manual_seed(12345)
    pipe = fresh()
    result = GateTrainer(pipe, PROMPT, mixed, config, checkpoint_dir=tmp_path).train(resume=True)
    assert not result.stopped
    assert_equal(gate_values(pipe), expected)
    for row, other in zip(whole.history, result.history, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert whole.passes["with_gradient"] == result.passes["with_gradient"]


def test_stop_from_elsewhere_keeps_what_there_is(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(iterations=50), callback=lambda _: trainer.stop())
    result = trainer.train()
    assert result.stopped
    assert len(result.history) == 1
    assert result.gates is None


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(
    pipe: Any,
    fresh: Callable[[], Any],
    concepts: list[Concept],
    tiny: Tiny,
    gate_values: Values,
    tmp_path: Path,
    how: str,
) -> None:
    config = tiny(iterations=4)
    GateTrainer(fresh(), PROMPT, concepts, config).train()
    expected = gate_values(pipe)

    def interrupt(event: TrainingEvent) -> None:
        if event.iteration == 2:
            if how == "exception":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        GateTrainer(fresh(), PROMPT, concepts, config, callback=interrupt, checkpoint_dir=tmp_path).train()
    assert signal.getsignal(signal.SIGINT) is handler
    again = fresh()
    result = GateTrainer(again, PROMPT, concepts, config, checkpoint_dir=tmp_path).train()
    assert len(result.history) == 4
    assert_equal(gate_values(again), expected)


def test_a_fault_in_an_iteration_keeps_the_last_checkpoint(
    pipe: Any, concepts: list[Concept], tiny: Tiny, tmp_path: Path
) -> None:
    def spoil(event: TrainingEvent) -> None:
        if event.iteration == 3:
            next(iter(pipe.mixtures["unet"].gates.parameters())).data.fill_(float("nan"))

    trainer = GateTrainer(
        pipe,
        PROMPT,
        concepts,
        tiny(iterations=5, checkpoint_every=2),
        callback=spoil,
        checkpoint_dir=tmp_path,
    )
    with pytest.raises(TrainingError, match="the loss is nan in iteration 4"):
        trainer.train()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["history"]) == 2
    assert all(bool(v.isfinite().all()) for gates in state["learner"].values() for v in gates.values())
    assert not list(tmp_path.glob("*.tmp"))


def test_files_and_reports(
    pipe: Any,
    fresh: Callable[[], Any],
    concepts: list[Concept],
    tiny: Tiny,
    gate_values: Values,
    tmp_path: Path,
) -> None:
    events: list[TrainingEvent] = []
    config = tiny(iterations=4, checkpoint_every=3, preview_every=2)
    result = pipe.train_gates(PROMPT, concepts, config, callback=events.append, checkpoint_dir=tmp_path)
    trained = gate_values(pipe)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["entropy"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[0]["weights"] == pytest.approx({"boot": 0.5, "cat": 0.5}, abs=1e-3)
    assert rows[0]["balance"] == pytest.approx(0, abs=1e-5)
    assert sum(rows[-1]["weights"].values()) == pytest.approx(1)
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["parts"]["collage"] + 0.5 * rows[-1]["balance"])
    assert [event.preview is not None for event in events] == [False, True, False, True]
    with Image.open(tmp_path / "previews" / "00004.png") as preview:
        assert preview.size == (32, 32)
    assert events[-1].seconds_left == 0
    assert result.gates == tmp_path / "gates.safetensors"
    metadata = fresh().load_gates(result.gates)
    assert metadata["iterations"] == "4"
    assert_equal(gate_values(pipe), trained)


def test_previews_do_not_change_the_training(
    fresh: Callable[[], Any], concepts: list[Concept], tiny: Tiny, gate_values: Values
) -> None:
    pipe = fresh()
    GateTrainer(pipe, PROMPT, concepts, tiny()).train()
    expected = gate_values(pipe)
    GateTrainer(fresh(), PROMPT, concepts, tiny(preview_every=1)).train()
    assert_equal(gate_values(pipe), expected)


def test_another_training_is_not_gone_on_with(
    fresh: Callable[[], Any], concepts: list[Concept], tiny: Tiny, tmp_path: Path
) -> None:
    GateTrainer(fresh(), PROMPT, concepts, tiny(iterations=1), checkpoint_dir=tmp_path).train()
    other = GateTrainer(fresh(), PROMPT, concepts, tiny(iterations=2, seed=5), checkpoint_dir=tmp_path)
    with pytest.raises(TrainingError, match="seed: 5 now, 0 in the checkpoint"):
        other.train(resume=True)
    assert len(other.train().history) == 2
    nowhere = GateTrainer(fresh(), PROMPT, concepts, tiny(), checkpoint_dir=tmp_path / "empty")
    with pytest.raises(TrainingError, match="resume is True, and there is no checkpoint in"):
        nowhere.train(resume=True)


def test_a_kill_while_pictures_are_drawn_costs_the_last_batch(
    fresh: Callable[[], Any], tiny: Tiny, tmp_path: Path, gate_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concepts without references: the experts draw them, and the base its backgrounds."""
    phrases = {"boot": "a zorin boot", "cat": "a vim cat"}
    settings = tiny(iterations=1, drawn_pictures=10, collage_background="base")
    told: list[tuple[int, int]] = []
    whole = GateTrainer(fresh(), PROMPT, phrases, settings, preparing=lambda *at: told.append(at))
    expected = whole.train()
    gates = gate_values(whole._pipe)
    assert told == [(i, len(told)) for i in range(1, len(told) + 1)]
    assert len(told) >= 3
    stopped = GateTrainer(fresh(), PROMPT, phrases, settings, checkpoint_dir=tmp_path)
    draw, drawn = stopped.objective.bench.draw, []

    def break_off(*args: Any, **kwargs: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(stopped.objective.bench, "draw", break_off)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert [path.name for path in tmp_path.iterdir()] == ["preparation.pt"]
    told.clear()
    again = GateTrainer(
        fresh(), PROMPT, phrases, settings, checkpoint_dir=tmp_path, preparing=lambda *at: told.append(at)
    )
    result = again.train()
    assert told[0][0] == 3, "two batches were there"
    assert result.passes == expected.passes
    assert_equal(gate_values(again._pipe), gates)
    assert not (tmp_path / "preparation.pt").exists()


def test_a_newer_checkpoint_is_refused(
    pipe: Any, concepts: list[Concept], tiny: Tiny, tmp_path: Path
) -> None:
    torch.save({"format_version": 99}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="format version 99; this version reads 2"):
        GateTrainer(pipe, PROMPT, concepts, tiny(), checkpoint_dir=tmp_path).train()


@pytest.mark.parametrize("objective", ["collage", "clip"])
def test_gradient_checkpointing_trains_the_same(
    fresh: Callable[[], Any],
    concepts: list[Concept],
    clip_folder: str,
    tiny: Tiny,
    gate_values: Values,
    objective: str,
) -> None:
    found = []
    for wanted in (False, True):
        pipe = fresh()
        # Steps large enough to see a difference, and before Adam divides small gradients by themselves.
        config = tiny(objective=objective, clip=clip_folder, iterations=2, gradient_checkpointing=wanted)
        GateTrainer(pipe, PROMPT, concepts, config).train()
        found.append(gate_values(pipe))
        assert not pipe.unet.is_gradient_checkpointing
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=1e-3)


def test_autocast_keeps_gates_in_float32(
    pipe: Any, concepts: list[Concept], tiny: Tiny, gate_values: Values
) -> None:
    result = GateTrainer(pipe, PROMPT, concepts, tiny(autocast=True)).train()
    assert len(result.history) == 4
    assert {value.dtype for value in gate_values(pipe).values()} == {torch.float32}


def test_the_bar_shows_losses(pipe: Any, concepts: list[Concept], tiny: Tiny, capsys: Any) -> None:
    GateTrainer(pipe, PROMPT, concepts, tiny(progress=True)).train()
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "entropy 0.6" in shown.err
    assert not shown.out


def test_balance_loss_keeps_experts_in_use(
    fresh: Callable[[], Any], concepts: list[Concept], tiny: Tiny
) -> None:
    spread = {}
    for alpha in (0.0, 5.0):
        config = tiny(iterations=40, gate_lr=5e-2, alpha=alpha, redraw_every=100)
        history = GateTrainer(fresh(), PROMPT, concepts, config).train().history
        # The weights wander about the middle; how far they come from it counts, not where they end.
        spread[alpha] = max(abs(row["weights"]["boot"] - 0.5) for row in history)
    assert spread[5.0] < spread[0.0]


def test_what_cannot_start(components: Any, pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    empty = StableDiffusionMoLEPipeline(**components, requires_safety_checker=False)
    with pytest.raises(NoExpertsError, match="no experts are loaded"):
        GateTrainer(empty, PROMPT, concepts, tiny())
    with pytest.raises(ConfigError, match=r"without concept: \['cat'\]"):
        GateTrainer(pipe, PROMPT, concepts[:1], tiny())
    for gate in pipe.mixtures["unet"].gates.parameters():
        gate.data = gate.data.double()
    with pytest.raises(TrainingError, match=r"gates are trained in torch\.float32"):
        GateTrainer(pipe, PROMPT, concepts, tiny()).train()
    pipe.unload_expert("cat")
    with pytest.raises(TrainingError, match="'boot' is the only expert and needs no gates"):
        GateTrainer(pipe, "a zorin boot", concepts[:1], tiny())

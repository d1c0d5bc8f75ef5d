"""What the objectives do to the gates of a real, tiny pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from learning import losses_before_and_after, promises_kept

from mole_diffusion import MoLEConfig
from mole_diffusion.core.auto import AutoSettings
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig
from mole_diffusion.pictures.training.rollout import Sampler

PROMPT = "a zorin boot and a vim cat"
Tiny = Callable[..., TrainingConfig]


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_collages_teach_the_gates(pipe: Any, concepts: list[Concept], tiny: Tiny, pooling: str) -> None:
    pipe.configure(MoLEConfig(pooling=pooling))
    config = tiny(iterations=20, collage_batch=4, redraw_every=100, alpha=0.0, gate_lr=3e-2)
    before, after = losses_before_and_after(pipe, PROMPT, concepts, config)
    assert after < before * 0.99


@pytest.mark.parametrize("objective", ["clip", "released"])
def test_clip_teaches_the_gates(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny, objective: str
) -> None:
    """In one step, so that all of the way from the noise to the loss carries gradient."""
    settings = {"objective": objective, "clip": clip_folder, "sampling_steps": 1}
    kept = promises_kept(pipe, PROMPT, concepts, tiny(**settings))
    assert any(abs(ratio - 1) < 0.25 for ratio in kept), kept
    config = tiny(**settings, iterations=20, alpha=0.0, gate_lr=1e-2)
    before, after = losses_before_and_after(pipe, PROMPT, concepts, config)
    assert after < before


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_the_gradient_of_collages_is_that_of_their_loss(
    pipe: Any, concepts: list[Concept], tiny: Tiny, prior: float
) -> None:
    kept = promises_kept(pipe, PROMPT, concepts, tiny(prior_weight=prior))
    assert any(abs(ratio - 1) < 0.1 for ratio in kept), kept


def test_every_gate_gets_gradient_and_nothing_else_does(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny
) -> None:
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(objective="both", clip=clip_folder, clip_from=0.0))
    trainer.objective.prepare()
    for module in trainer.objective.networks:
        module.requires_grad_(False)
    for term in trainer.objective.losses(0):
        term.loss.backward()
    for part, mixture in pipe.mixtures.items():
        for name, gate in mixture.gates.named_parameters():
            # At uniform weights the temperature has no gradient: all logits are zero.
            if "temperature" not in name:
                assert gate.grad is not None, f"{part}.{name}"
                assert float(gate.grad.abs().sum()) > 0, f"{part}.{name}"
    assert all(p.grad is None for module in trainer.objective.networks for p in module.parameters())


def test_terms_of_clip_guidance_have_weights(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny
) -> None:
    def loss(**weights: float) -> float:
        config = tiny(objective="clip", clip=clip_folder, contrast_weight=0.0, **weights)
        trainer = GateTrainer(pipe, PROMPT, concepts, config)
        trainer.objective.prepare()
        (term,) = trainer.objective.losses(0)
        loss = float(term.loss.detach())
        wanted = (
            weights["global_weight"] * term.parts["global"] + weights["local_weight"] * term.parts["local"]
        )
        assert loss == pytest.approx(wanted)
        return loss

    whole = loss(global_weight=1.0, local_weight=0.0)
    crops = loss(global_weight=0.0, local_weight=1.0)
    assert loss(global_weight=2.0, local_weight=0.5) == pytest.approx(2 * whole + crops / 2)


def first_terms(pipe: Any, concepts: list[Concept], config: TrainingConfig) -> list[Any]:
    """The losses of the first iteration, of fresh gates."""
    trainer = GateTrainer(pipe, PROMPT, concepts, config)
    trainer.objective.prepare()
    with torch.no_grad():
        return list(trainer.objective.losses(0))


def test_the_background_of_collages_has_a_weight(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """The loss is a mean over the picture, so it lies between that inside and that of the whole."""
    inside, half, whole = (
        first_terms(pipe, concepts, tiny(outside_weight=weight))[0].parts["collage"] for weight in (0, 0.5, 1)
    )
    assert inside != pytest.approx(whole, rel=1e-3)
    assert min(inside, whole) < half < max(inside, whole)


def test_guidance_on_top_of_collages_has_a_weight(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny
) -> None:
    settings = {"objective": "both", "clip": clip_folder, "clip_from": 0.0}
    once = first_terms(pipe, concepts, tiny(**settings))
    twice = first_terms(pipe, concepts, tiny(**settings, clip_weight=2.0))
    assert [term.update for term in twice] == [False, True]
    assert float(twice[0].loss) == pytest.approx(float(once[0].loss))
    assert float(twice[1].loss) == pytest.approx(2 * float(once[1].loss))
    later = first_terms(pipe, concepts, tiny(**{**settings, "clip_from": 0.5}))
    assert [term.update for term in later] == [True]


def test_cost_in_passes(pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny) -> None:
    collages = GateTrainer(pipe, PROMPT, concepts, tiny()).train()
    assert collages.passes == {"with_gradient": 4, "without_gradient": 0, "decoded": 0}
    paper = GateTrainer(pipe, PROMPT, concepts, tiny(objective="clip", clip=clip_folder)).train()
    assert paper.passes["with_gradient"] == 4
    assert paper.passes["decoded"] == 4
    deeper = tiny(objective="clip", clip=clip_folder, truncated_steps=2, sampling_steps=10, iterations=1)
    assert GateTrainer(pipe, PROMPT, concepts, deeper).train().passes["with_gradient"] == 2
    walk = tiny(objective="released", clip=clip_folder, rollout="walk", iterations=1, batch_size=1)
    result = GateTrainer(pipe, PROMPT, concepts, walk).train()
    assert 20 <= result.passes["with_gradient"] <= 50
    assert result.passes["decoded"] == result.passes["with_gradient"]


def test_experts_draw_alone_where_there_are_no_references(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    silent = [Concept(c.name, c.text, c.class_text) for c in concepts]
    config = tiny(collage_background="base", guidance=3.0)

    def drawn() -> dict[str, torch.Tensor]:
        trainer = GateTrainer(pipe, [PROMPT, "a vim cat"], silent, config)
        trainer.objective.pictures.prepare(backgrounds=True)
        return trainer.objective.pictures.state_dict()

    before = drawn()
    assert {key: len(value) for key, value in before.items()} == {
        "boot\n0": 2,
        "cat\n0": 1,
        "cat\n1": 1,
        "\n0": 1,
        "\n1": 1,
    }
    for mixture in pipe.mixtures.values():
        for gate in mixture.gates.parameters():
            gate.data.add_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)))
    after = drawn()
    for key, value in before.items():
        assert (value.int() - after[key].int()).abs().max() <= 1, (
            "gates have no part in what one expert draws"
        )
    assert not torch.equal(before["boot\n0"][0], before["cat\n0"][0])


def test_subjects_of_a_styled_prompt_are_drawn_in_the_style(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    boot, text = concepts[0], "a zorin boot at night in vim style"
    styled = {"boot": boot, "cat": Concept("cat", "in vim style", "")}
    config = tiny(collage_background="base", drawn_pictures=4, pool_size=2, autocast=False)
    trainer = GateTrainer(pipe, text, styled, config)
    drawn: list[tuple[list[str], dict[str, Any]]] = []
    draw = trainer.objective.bench.draw
    trainer.objective.bench.draw = (  # type: ignore[method-assign]
        lambda texts, draws, **told: (drawn.append((texts, told)), draw(texts, draws, **told))[1]
    )
    trainer.objective.prepare()
    phrases = {"boot": "a zorin boot", "cat": "in vim style"}
    # Gates cannot learn what is led on in the middle of a picture.
    settings = AutoSettings(style_inside=0.6, balance=0.0)
    auto = AutoMixture(settings, phrases=phrases, styles=["cat"])
    assert drawn == [
        ([text] * 4, {"mixture": auto, "active_experts": ["boot", "cat"]}),
        (["a boot at night in vim style"] * 4, {"mixture": {"cat": 1.0}}),
    ]
    made, caption = trainer.objective.task.make_collage(0)  # type: ignore[attr-defined]
    assert caption == text
    # One place for one subject, and none for the style.
    assert float(made.inside.mean()) < 0.5


def test_a_prompt_without_its_style_takes_the_references(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    styled = {"boot": concepts[0], "cat": Concept("cat", "in vim style", "")}
    trainer = GateTrainer(pipe, ["a zorin boot in vim style", "a zorin boot"], styled, tiny())
    trainer.objective.prepare()
    pictures = trainer.objective.pictures
    assert {*pictures.state_dict()} == {"boot\n0"}
    assert len(pictures.of("boot", 1)) == len(concepts[0].references)
    assert not torch.equal(pictures.of("boot", 0)[0], pictures.of("boot", 1)[0])


def test_references_can_be_demanded(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    mixed = [concepts[0], Concept("cat", "a vim cat", "a cat")]
    trainer = GateTrainer(pipe, PROMPT, mixed, tiny(collage_source="references"))
    with pytest.raises(ConfigError, match="collage_source is 'references', and concept 'cat' has none"):
        trainer.train()


def test_the_pool_is_made_anew_bit_by_bit(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(pool_size=6, collage_batch=2, redraw_every=1))
    trainer.objective.prepare()
    before = trainer.objective.task.state_dict()["latents"].clone()
    for iteration in (0, 1):
        list(trainer.objective.losses(iteration))
    after = trainer.objective.task.state_dict()["latents"]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, True, False, False, False, False]


def test_a_short_training_makes_the_collages_it_learns_from_and_a_longer_one_adds_the_rest(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    def trainer(iterations: int) -> GateTrainer:
        settings = {"pool_size": 6, "collage_batch": 2, "redraw_every": 9, "iterations": iterations}
        return GateTrainer(pipe, PROMPT, concepts, tiny(**settings))

    short = trainer(2).objective
    short.prepare()
    state = short.state_dict()
    kept = state["task"]["latents"].clone()
    assert len(kept) == 4
    longer = trainer(400).objective
    longer.load_state_dict(state)
    list(longer.losses(2))
    pool = longer.task.state_dict()
    assert len(pool["latents"]) == len(pool["covers"]) == len(pool["captions"]) == 6
    assert torch.equal(pool["latents"][:4], kept)
    assert pool["latents"][4:].abs().sum(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("layout", ["scene", "strips"])
def test_collages_follow_the_order_of_the_prompt(
    pipe: Any, concepts: list[Concept], tiny: Tiny, layout: str
) -> None:
    config = tiny(collage_layouts=(layout,), box_jitter=0.0, resolution=64)
    for prompt, first in ((PROMPT, "boot"), ("a vim cat and a zorin boot", "cat")):
        trainer = GateTrainer(pipe, prompt, concepts, config)
        trainer.objective.pictures.prepare(backgrounds=False)
        made, _ = trainer.objective.task.make_collage(0)  # type: ignore[attr-defined]
        left, right = made.pixels[:, 36, 16], made.pixels[:, 36, 48]
        is_boot = [float(side[1]) < 0.4 for side in (left, right)]
        assert is_boot == ([True, False] if first == "boot" else [False, True])


def test_a_prompt_of_many_concepts_is_learned_in_parts(
    pipe: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    def captions(**changes: Any) -> set[str]:
        trainer = GateTrainer(
            pipe, f"{PROMPT} at night", concepts, tiny(collage_layouts=("scene",), **changes)
        )
        trainer.objective.prepare()
        return set(trainer.objective.task.state_dict()["captions"])

    parts = {"a zorin boot at night", "a vim cat at night"}
    assert captions(collage_objects=1, pool_size=12) == parts
    assert captions() == captions(collage_objects=2) == {f"{PROMPT} at night"}
    boxes = ((0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0))
    assert captions(collage_objects=1, collage_boxes=boxes) == {f"{PROMPT} at night"}

    config = tiny(collage_objects=1, prior_weight=1.0, iterations=2)
    assert GateTrainer(pipe, PROMPT, concepts, config).train().passes["with_gradient"] == 2


def test_own_boxes_replace_the_table(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    boxes = ((0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0))
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(collage_boxes=boxes, box_jitter=0.0, resolution=64))
    trainer.objective.pictures.prepare(backgrounds=False)
    inside = trainer.objective.task.make_collage(0)[0].inside[0]  # type: ignore[attr-defined]
    assert inside[:26, :26].mean() > 0.5
    assert inside[:32, 32:].sum() == 0


def test_the_prior_pulls_towards_the_base(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    changes = {"alpha": 0.0, "iterations": 25, "gate_lr": 3e-2, "scalar_lr": 1e-1, "prior_weight": 100.0}
    result = GateTrainer(pipe, PROMPT, concepts, tiny(**changes)).train()
    assert result.passes["without_gradient"] == 25
    priors = [row["parts"]["prior"] for row in result.history]
    assert sum(priors[-5:]) < sum(priors[:5])


def test_empty_prompts_train_without_words(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    seen: list[str] = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda texts, *args, **kwargs: (seen.extend(texts), encode(texts, *args, **kwargs))[
        1
    ]
    GateTrainer(pipe, PROMPT, concepts, tiny(empty_prompts=1.0)).train()
    assert set(seen) == {""}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_latents_and_targets_agree(pipe: Any, prediction: str) -> None:
    """What is exactly the target leads back to the clean latents, and over the schedule to the picture."""
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler(prediction_type=prediction)
    denoiser = denoiser_of(pipe)
    times = denoiser.schedule(10)
    draws = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 4, 4, generator=draws), torch.randn(2, 4, 4, 4, generator=draws)
    latents = denoiser.noisy(clean, noise, times[:1])
    for time, following in zip(times, [*times[1:], None], strict=True):
        target = denoiser.target(clean, noise, time[None])
        latents, found = denoiser.step(target, time, latents)
        torch.testing.assert_close(found, clean, atol=2e-3, rtol=1e-3)
        if following is not None:
            expected = denoiser.noisy(clean, noise, following[None])
            torch.testing.assert_close(latents, expected, atol=2e-3, rtol=1e-3)
    assert denoiser.times_at(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 500, 999]


def test_sampling_is_that_of_the_pipeline(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """The trainer's sampler and diffusers' own loop draw the same picture."""
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(guidance=3.0))
    ours = trainer.objective.bench.draw([PROMPT], torch.Generator().manual_seed(4))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    theirs = pipe(
        PROMPT, num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="pt", mixture="gates"
    ).images
    torch.testing.assert_close(ours, theirs, atol=1 / 200, rtol=0)


def test_rescaled_guidance_has_the_deviation_of_the_plain_prediction(pipe: Any) -> None:
    """As diffusers' `guidance_rescale`."""
    denoiser = denoiser_of(pipe, None)
    latents = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    text, time = denoiser.encode_texts(["a zorin boot", "a vim cat"]), torch.tensor(500)
    empty = denoiser.encode_texts([""])
    with torch.no_grad():
        plain = Sampler(denoiser, 1.0).predict(latents, time, text, empty)
        guided = Sampler(denoiser, 7.0).predict(latents, time, text, empty)
        rescaled = Sampler(denoiser, 7.0, rescale=0.7).predict(latents, time, text, empty)
    torch.testing.assert_close(rescaled, rescale_noise_cfg(guided, plain, 0.7), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rescaled, guided, atol=1e-3)


def test_flow_matching_is_refused(pipe: Any, concepts: list[Concept], tiny: Tiny) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TrainingError, match="scheduler FlowMatchEulerDiscreteScheduler with prediction type"):
        GateTrainer(pipe, PROMPT, concepts, tiny())


def test_a_small_decoder_can_stand_in_for_the_vae(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny, tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(
        tmp_path
    )
    decoded: list[torch.Size] = []
    pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(torch.Size([])))
    config = tiny(objective="clip", clip=clip_folder, decoder=str(tmp_path), iterations=2)
    result = GateTrainer(pipe, PROMPT, concepts, config).train()
    assert result.passes["decoded"] == 2
    assert decoded == []


@pytest.mark.parametrize("objective", ["collage", "clip"])
def test_a_pipeline_in_half_precision_trains(
    pipe: Any, concepts: list[Concept], clip_folder: str, tiny: Tiny, objective: str
) -> None:
    pipe.to(torch.bfloat16)
    result = GateTrainer(
        pipe, PROMPT, concepts, tiny(objective=objective, clip=clip_folder, iterations=2)
    ).train()
    assert len(result.history) == 2
    assert {p.dtype for m in pipe.mixtures.values() for p in m.gates.parameters()} == {torch.float32}

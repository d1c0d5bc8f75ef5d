"""Gates of FLUX.1 and Chroma, trained by flow matching."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learning import losses_before_and_after
from tiny.flux import (
    FLUX_TARGETS,
    make_chroma_components,
    make_flux_components,
    write_transformer_lora,
)

from mole_diffusion import ChromaMoLEPipeline, FluxMoLEPipeline, MoLEConfig, TrainingError
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig

PROMPT = "a zorin boot and a vim cat"
Tiny = Callable[..., TrainingConfig]


@pytest.fixture(scope="module", params=["flux", "schnell", "chroma"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes a pipeline with two experts."""
    folder = tmp_path_factory.mktemp("flux")
    if request.param == "chroma":
        cls, components = ChromaMoLEPipeline, make_chroma_components()
    else:
        cls = FluxMoLEPipeline
        components = make_flux_components(folder / "tokenizer", guidance=request.param == "flux")
    files = {
        name: write_transformer_lora(folder / f"{name}.safetensors", components, seed, 1 + seed, FLUX_TARGETS)
        for seed, name in enumerate(("boot", "cat"), 1)
    }

    def built() -> Any:
        pipe = cls(**copy.deepcopy(components))
        pipe.set_progress_bar_config(disable=True)
        for name, path in files.items():
            pipe.load_expert(path, name=name)
        return pipe

    return built


def test_collages_teach_the_gates(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    config = tiny(iterations=16, collage_batch=4, redraw_every=100, alpha=0.0, gate_lr=3e-2, resolution=32)
    before, after = losses_before_and_after(make(), PROMPT, concepts, config)
    assert after < before * 0.99


def test_every_gate_gets_gradient_and_nothing_else_does(
    make: Any, concepts: list[Concept], tiny: Tiny
) -> None:
    pipe = make()
    trainer = GateTrainer(pipe, PROMPT, concepts, tiny(empty_prompts=0.0, resolution=32))
    trainer.objective.prepare()
    for module in trainer.objective.networks:
        module.requires_grad_(False)
    for term in trainer.objective.losses(0):
        term.loss.backward()
    assert list(pipe.mixtures) == ["transformer"]
    for name, gate in pipe.mixtures["transformer"].gates.named_parameters():
        if "temperature" not in name:
            assert gate.grad is not None, name
            # Text tokens of the last block reach the picture through nobody.
            if name != "single_transformer_blocks__1.context_projection":
                assert float(gate.grad.abs().sum()) > 0, name
    assert all(p.grad is None for module in trainer.objective.networks for p in module.parameters())


def test_training_draws_what_the_pipeline_draws(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """Same noise, same steps, same guidance, embedded or in two passes."""
    pipe = make()
    config = tiny(guidance=3.0, resolution=32)
    bench = GateTrainer(pipe, PROMPT, concepts, config).objective.bench
    found = bench.draw([PROMPT], torch.Generator().manual_seed(4))
    noise = torch.randn(1, *bench.denoiser.latent_shape, generator=torch.Generator().manual_seed(4))
    packed = pipe._pack_latents(noise, *noise.shape)
    steps = bench.settings.sampling_steps
    guided: dict[str, Any] = {"guidance_scale": 3.0}
    if not pipe.transformer.config.get("guidance_embeds") and isinstance(pipe, FluxMoLEPipeline):
        guided = {"true_cfg_scale": 3.0, "negative_prompt": ""}
    drawn = {"height": 32, "width": 32, "output_type": "pt", "mixture": "gates", **guided}
    expected = pipe(PROMPT, latents=packed, num_inference_steps=steps, **drawn).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)
    # Guidance that is embedded costs no second pass.
    assert bench.counter.without_gradient == steps
    reads = bool(pipe.transformer.config.get("guidance_embeds"))
    assert bench.denoiser.guided(3.0) == (1.0 if reads else 3.0)


def test_noise_and_targets_are_those_of_the_scheduler(make: Any) -> None:
    pipe = make()
    denoiser = denoiser_of(pipe, (32, 32))
    latents, noise = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=0.0)
    times = scheduler.sigmas[:3]
    expected = scheduler.scale_noise(latents, scheduler.timesteps, noise)
    torch.testing.assert_close(denoiser.noisy(latents, noise, times), expected)
    torch.testing.assert_close(denoiser.target(latents, noise, times), noise - latents)
    # From the velocity that it should say one step of any length comes out at the picture.
    levels = denoiser.schedule(4)
    assert levels[0] == 1
    _, clean = denoiser.step(noise - latents, levels[1], denoiser.noisy(latents, noise, levels[1:2]))
    torch.testing.assert_close(clean, latents)
    drawn = denoiser.random_times(2000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() < 0.01
    assert 0.99 < drawn.max() <= 1
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    assert denoiser.times_at(torch.tensor([0.25])).tolist() == [0.25]
    # A fixed shift belongs to training too.
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.0)
    assert float(denoiser.times_at(torch.tensor([0.25]))) == pytest.approx(0.5)


def test_gates_find_the_expert_that_the_answer_is_made_of(make: Any) -> None:
    """The velocity to learn is what one expert alone says."""
    pipe = make()
    pipe.configure(MoLEConfig(strength=1.0, learn_strength=False))
    denoiser = denoiser_of(pipe, (32, 32))
    denoiser.guided(3.5)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *denoiser.latent_shape, generator=draws)
    times = torch.tensor([0.8, 0.4])
    mixture = pipe.mixtures["transformer"]
    for module in denoiser.networks.values():
        module.requires_grad_(False)
    with torch.no_grad():
        text = denoiser.encode_texts(["a boot", "a cat"])
        with pipe.composing(active_experts=["boot"]):
            target = denoiser.predict(latents, times, text)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = (denoiser.predict(latents, times, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    # Rows and text tokens have their way to the picture through these.
    found = {name: float(weights.detach()[:, 0].mean()) for name, weights in mixture.live_weights().items()}
    image = [share for name, share in found.items() if not name.endswith(".context")]
    # Half is where they begin; how far forty steps go depends on the machine and the libraries.
    assert min(image) > 0.5, found
    assert max(image) > 0.8, found
    assert sum(image) / len(image) > 0.7, found


def test_schedulers_of_diffusions_are_refused(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    from diffusers import DDIMScheduler

    pipe = make()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(TrainingError, match="DDIMScheduler cannot be trained with"):
        GateTrainer(pipe, PROMPT, concepts, tiny())


def test_recomputing_of_chroma_is_refused(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """diffusers forgets the mask of the text there; FLUX.1 has none."""
    pipe = make()
    config = tiny(iterations=1, resolution=32, gradient_checkpointing=True)
    trainer = GateTrainer(pipe, PROMPT, concepts, config)
    if isinstance(pipe, ChromaMoLEPipeline):
        with pytest.raises(TrainingError, match="gradient_checkpointing cannot be used with Chroma"):
            trainer.train()
    else:
        assert len(trainer.train().history) == 1
    assert not pipe.transformer.is_gradient_checkpointing

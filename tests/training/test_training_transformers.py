"""Gates of families whose texts go through a language model, trained by flow matching."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learning import losses_before_and_after
from tiny.denoising import FAMILIES
from tiny.flux import write_transformer_lora

from mole_diffusion import AnimaMoLEPipeline, Krea2MoLEPipeline, MoLEConfig, QwenImageMoLEPipeline
from mole_diffusion.pictures.components import guidance_arguments
from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.training import Concept, GateTrainer, TrainingConfig

PROMPT = "a zorin boot and a vim cat"
Tiny = Callable[..., TrainingConfig]
# Whose texts go through a language model.
TRAINED = ("anima", "klein", "krea-2", "qwen-image", "z-image")


@pytest.fixture(scope="module", params=TRAINED)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes a pipeline with two experts."""
    folder = tmp_path_factory.mktemp("family")
    family = FAMILIES[request.param]
    cls, made, targets = family.cls, family.make(folder), family.targets
    files = {
        name: write_transformer_lora(folder / f"{name}.safetensors", made, seed, 1 + seed, targets)
        for seed, name in enumerate(("boot", "cat"), 1)
    }

    def built() -> Any:
        pipe = cls(**copy.deepcopy(made))
        pipe.set_progress_bar_config(disable=True)
        for name, path in files.items():
            pipe.load_expert(path, name=name)
        return pipe

    return built


def test_collages_teach_the_gates(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    config = tiny(iterations=16, collage_batch=4, redraw_every=100, alpha=0.0, gate_lr=3e-2, resolution=32)
    before, after = losses_before_and_after(make(), PROMPT, concepts, config)
    assert after < before * 0.99


def test_training_draws_what_the_pipeline_draws(make: Any, concepts: list[Concept], tiny: Tiny) -> None:
    """Same noise, same steps, same guidance, as the family counts it."""
    pipe = make()
    config = tiny(guidance=2.0, resolution=32)
    bench = GateTrainer(pipe, PROMPT, concepts, config).objective.bench
    found = bench.draw([PROMPT], torch.Generator().manual_seed(4))
    noise = torch.randn(1, *bench.denoiser.latent_shape, generator=torch.Generator().manual_seed(4))
    steps = bench.settings.sampling_steps
    if isinstance(pipe, (Krea2MoLEPipeline, QwenImageMoLEPipeline)):
        noise = pipe._pack_latents(noise, *noise.shape)
    noise = noise.unsqueeze(2) if isinstance(pipe, AnimaMoLEPipeline) else noise
    options = {**guidance_arguments(pipe, 2.0), "output_type": "pt", "height": 32, "width": 32}
    options["mixture"] = "gates"
    expected = pipe(prompt=PROMPT, latents=noise, num_inference_steps=steps, **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)


def test_gates_find_the_expert_that_the_answer_is_made_of(make: Any) -> None:
    """The velocity to learn is what one expert alone says."""
    pipe = make()
    pipe.configure(MoLEConfig(strength=1.0, learn_strength=False))
    denoiser = denoiser_of(pipe, (32, 32))
    denoiser.guided(2.0)
    latents = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.8, 0.4])
    mixture = pipe.mixtures["transformer"]
    for module in denoiser.networks.values():
        module.requires_grad_(False)
    with torch.no_grad():
        text = denoiser.encode_texts(["a boot", "a cat"])
        text = Condition({name: one[:, :24] for name, one in text.tensors.items()})  # the rest is padding
        with pipe.composing(active_experts=["boot"]):
            target = denoiser.predict(latents, times, text)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    losses = []
    for _ in range(60):
        loss = (denoiser.predict(latents, times, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    found = {name: float(weights.detach()[:, 0].mean()) for name, weights in mixture.live_weights().items()}
    # Text tokens of the last blocks have no way to the picture.
    image = [share for name, share in found.items() if not name.endswith(".context")]
    assert sum(image) / len(image) > 0.6, found

"""Gates of transformers, trained on ComfyUI's own objects: what diffusers would train."""

import json
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from conftest import part
from inside_flux import LOADERS, close, experts_of
from safetensors.torch import load_file
from tiny_models import transformers

from mole_diffusion import MoLEConfig, TrainingConfig, read_gates_header
from mole_diffusion.core.errors import TrainingError
from mole_diffusion.pictures.auto import AutoMixture
from mole_diffusion.pictures.denoiser import Condition
from mole_diffusion.pictures.training.trainer import GateTrainer
from tools import encoded, hooks, sample

PROMPT = "a sks dog and a sks cat"


@pytest.mark.parametrize("name", LOADERS)
def test_predictions_and_gradients_are_those_of_diffusers(
    name: str, oracle: Path, starter: tuple[Any, Any, Any]
) -> None:
    """With gates that say something, for what a loss says to them."""
    folder = oracle / "transformers" / name
    with torch.inference_mode():
        model = LOADERS[name](folder)
    with torch.inference_mode(False), torch.enable_grad():
        answers = load_file(folder / "answers.safetensors")
        copy = part("native").TrainingCopy(model, *starter[1:], experts_of(folder), MoLEConfig())
        copy.ensemble.load_gates(folder / "gates.safetensors")
        real = torch.ones(answers["text"].shape[:2], dtype=torch.int8)
        pooled = answers.get("pooled", torch.zeros(2, 0))
        told = Condition({"text": answers["text"], "real": real, "pooled": pooled})
        assert copy.denoiser.guided(3.5) == (1.0 if "guidance" in answers else 3.5)
        if name == "anima":
            with pytest.raises(TrainingError, match="its attention there has no gradients"):
                copy.denoiser.check_trainable()
            return
        found = copy.denoiser.predict(answers["latents"], answers["timesteps"], told)
        assert close(found, answers["gated"])
        found.square().mean().backward()
        gradients = load_file(folder / "gradients.safetensors")
        ours = dict(copy.mixtures["transformer"].gates.named_parameters())
        assert {key for key, value in ours.items() if value.grad is not None} == gradients.keys()
        for key, expected in gradients.items():
            assert (ours[key].grad - expected).norm() <= 1e-3 * expected.norm() + 1e-6, key
        assert not any(value.is_inference() for value in copy.denoiser.network.parameters())
    assert hooks(model.model.diffusion_model) == 0


def test_texts_and_predictions_are_those_of_the_sampler(tiny: Any) -> None:
    """Of texts that are of different lengths."""
    _, (model, clip, vae), pair = tiny
    mixed, mixed_clip = part("apply").apply_experts(model, clip, pair, None)
    texts = [PROMPT, "", f"{PROMPT} on the beach", PROMPT]
    with torch.inference_mode(False), torch.no_grad():
        copy = part("native").TrainingCopy(model, clip, vae, pair, MoLEConfig.uniform())
        denoiser = copy.denoiser
        denoiser.guided(3.5)
        told = denoiser.encode_texts(texts)
        latents = torch.randn(4, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
        times = torch.tensor([0.9, 0.4, 0.7, 0.2])
        found = denoiser.predict(latents, times, told)
    comfy.model_management.load_models_gpu([mixed])
    for row, text in enumerate(texts):
        ((tokens, facts),), _ = encoded(mixed_clip, text)
        # As a sampler asks the model what to tell the network.
        own = latents[row : row + 1]
        facts = {**facts, "guidance": 3.5, "noise": own, "device": own.device, "cross_attn": tokens}
        told_by_comfy = mixed.model.extra_conds(**facts)
        given = {
            key: one.process_cond(batch_size=1, device=own.device).cond for key, one in told_by_comfy.items()
        }
        clean = mixed.model.apply_model(own, times[row : row + 1], **given)
        velocity = (own - clean) / times[row]
        assert (velocity - found[row : row + 1]).abs().max() < 1e-4 * velocity.abs().max(), text
    comfy.model_management.unload_all_models()


def test_gates_find_the_expert_that_the_answer_is_made_of(tiny: Any) -> None:
    _, model, pair = tiny
    with torch.inference_mode(False), torch.enable_grad():
        copy = part("native").TrainingCopy(*model, pair, MoLEConfig(strength=1.0, learn_strength=False))
        denoiser, mixture = copy.denoiser, copy.mixtures["transformer"]
        latents = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([0.8, 0.4])
        with torch.no_grad(), copy.composing(active_experts=["dog"]):
            told = denoiser.encode_texts(["a dog", "a cat"])
            target = denoiser.predict(latents, times, told)
        optimizer = torch.optim.Adam(mixture.parameters(), lr=0.05)
        losses = []
        for _ in range(24):
            loss = (denoiser.predict(latents, times, told) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        weights = [float(found.detach()[:, 0].mean()) for found in mixture.live_weights().values()]
    assert losses[-1] < 0.5 * losses[0]
    assert sum(weights) / len(weights) > 0.6
    assert max(weights) > 0.9


def test_the_node_trains_saves_and_applies(tiny: Any, tmp_path: Path) -> None:
    family, model, pair = tiny
    before = [value.clone() for value in model[0].model.state_dict().values()]
    module, config = (
        part("nodes_train"),
        TrainingConfig(iterations=2, batch=2, drawn_pictures=1, sampling_steps=2, progress=False),
    )
    with torch.inference_mode(False), torch.enable_grad():
        copy = part("native").TrainingCopy(*model, pair, MoLEConfig())
        concepts = module.read_concepts("", pair, {})
        result = module.train(copy, [PROMPT], concepts, config, tmp_path, lambda _: None)
    assert len(result.history) == 2
    header = read_gates_header(tmp_path / "gates.safetensors")
    assert set(header.parts) == {"transformer", *(["text_encoder"] if family == "flux" else [])}
    # Networks that read guidance are trained at what they are drawn with.
    assert json.loads(header.metadata["training"])["guidance"] == (3.5 if family == "flux" else 4.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].model.state_dict().values(), strict=True))
    gates = part("experts").GatesFile(tmp_path / "gates.safetensors")
    mixed, clip = part("apply").apply_experts(*model[:2], pair, gates)
    plain = sample(model[0], encoded(model[1], PROMPT), size=64, cfg=1.0)
    assert (sample(mixed, encoded(clip, PROMPT), size=64, cfg=1.0) - plain).abs().max() > 1e-3


def test_subjects_in_a_style_are_drawn_by_the_words_of_their_prompt(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, model, pair = tiny
    config = TrainingConfig(iterations=2, sampling_steps=3, autocast=False, progress=False)
    with torch.inference_mode(False), torch.no_grad():
        copy = part("native").TrainingCopy(*model, pair, MoLEConfig())
        bench = GateTrainer(copy, PROMPT, config=config, denoiser=copy.denoiser).objective.bench

        def drawn(text: str, mixture: Any) -> torch.Tensor:
            return bench.draw([text], torch.Generator().manual_seed(4), mixture=mixture)

        auto = AutoMixture(styles=["cat"])
        assert not torch.equal(drawn(PROMPT, auto), drawn(PROMPT, AutoMixture()))
        assert torch.equal(drawn("the beach", auto), drawn("the beach", "none"))
        # Nearly as if it were alone: the empty prompt, which guidance leads away from, does without it.
        cat, alone, base = (drawn("a sks cat", one) for one in (auto, {"cat": 1.0}, "none"))
        assert (cat - alone).abs().mean() < 0.6 * (cat - base).abs().mean()
        assert copy.denoiser.reader is None
    assert "cannot be read" not in caplog.text


def test_models_that_read_another_picture_and_other_codecs_are_refused(
    starter: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    settings = {**transformers.FLUX, "in_channels": 2 * transformers.CHANNELS}
    with torch.inference_mode():
        model, clip, vae = transformers.load("flux")
        control = transformers.model_of(transformers.TinyFlux, settings)
        other = transformers.codec(4)
    with torch.inference_mode(False):
        denoiser = part("native").denoiser_of(control, clip, vae)
        with pytest.raises(TrainingError, match="reads another picture beside the latents"):
            denoiser.check_trainable()
        with pytest.raises(TrainingError, match="makes latents of 4 channels, this MODEL reads 16"):
            part("native").denoiser_of(model, clip, other).check_trainable()

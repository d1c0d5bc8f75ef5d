"""Training of an expert: what it learns, what it leaves alone, and that a stopped training goes on."""

import json

import pytest
import torch
import transformers.integrations.peft
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image, ImageDraw
from pipeline_helpers import build
from safetensors.torch import load_file
from typer.testing import CliRunner

from mole_diffusion.cli import app
from mole_diffusion.core.errors import ConfigError, TrainingError
from mole_diffusion.pictures.training.expert_trainer import ExpertTrainer, ExpertTrainingConfig


def drawings():
    """Two pictures of a red disc."""
    pictures = []
    for x in (6, 12):
        picture = Image.new("RGB", (32, 32), (200, 220, 250))
        ImageDraw.Draw(picture).ellipse((x, 8, x + 14, 22), fill=(220, 20, 30))
        pictures.append(picture)
    return pictures


def settings(**changes):
    return ExpertTrainingConfig(**{"steps": 6, "learning_rate": 1e-2, "rank": 2, **changes})


def weights(pipe):
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    return {f"{n}.{k}": v.clone() for n, m in networks.items() for k, v in m.state_dict().items()}


def test_the_loss_falls_the_base_stays_and_the_file_is_an_expert(pipe, plain, draw, tmp_path):
    out = tmp_path / "boot.safetensors"
    before, base = weights(pipe), draw(pipe, "a red boot")
    config = settings(steps=60, batch_size=4)
    losses = ExpertTrainer(pipe, drawings(), "a red boot", "a boot", config).train(out, tmp_path / "state")
    assert len(losses) == 60
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    after = weights(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(draw(pipe, "a red boot"), base, rtol=0, atol=0)
    expert = pipe.load_expert(out)
    assert expert.triggers == ("a red boot",)
    assert not expert.report.ignored
    assert {f.rank for matrices in expert.factors.values() for f in matrices.values()} == {2}
    ours = draw(pipe, "a red boot")
    assert (ours - base).abs().max() > 1e-3
    plain.load_lora_weights(out)
    torch.testing.assert_close(draw(plain, "a red boot"), ours, rtol=0, atol=1e-3)


def test_no_version_of_peft_is_too_old_for_transformers(pipe, plain, draw, tmp_path, monkeypatch):
    """transformers raises its lower bound of PEFT from time to time; what we need of PEFT is older."""
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "999.0")
    with pytest.raises((ImportError, ValueError), match="999"):
        pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]))
    out = tmp_path / "boot.safetensors"
    ExpertTrainer(pipe, drawings(), "a red boot", config=settings()).train(out, tmp_path / "state")
    assert not any("lora_" in name for name, _ in pipe.text_encoder.named_modules())
    assert set(pipe.load_expert(out).factors) == {"unet", "text_encoder"}


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_a_stopped_training_ends_as_a_straight_one(pipe, tmp_path, prior):
    config = settings(prior_weight=prior, prior_pictures=2)

    def trainer():
        return ExpertTrainer(pipe, drawings(), "a red boot", "a boot", config)

    straight = trainer().train(tmp_path / "a.safetensors", tmp_path / "a")

    def interrupt(done, total, loss):
        if done == 3:
            signal_self()

    with pytest.raises(KeyboardInterrupt):
        trainer().train(tmp_path / "b.safetensors", tmp_path / "b", callback=interrupt)
    assert not (tmp_path / "b.safetensors").exists()
    assert not hasattr(pipe.unet, "peft_config")
    torch.manual_seed(99)
    assert trainer().train(tmp_path / "b.safetensors", tmp_path / "b") == straight
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def signal_self():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def test_prior_preservation_changes_the_result(pipe, tmp_path):
    results = []
    for prior in (0.0, 1.0):
        config = settings(steps=2, prior_weight=prior, prior_pictures=2)
        trainer = ExpertTrainer(pipe, drawings(), "a red boot", "a boot", config)
        results.append(trainer.train(tmp_path / "x.safetensors", tmp_path / f"{prior}"))
    assert results[0] != results[1]


def test_refusals(pipe, loaded, tmp_path):
    with pytest.raises(TrainingError, match="train on the base alone"):
        ExpertTrainer(loaded, drawings(), "a red boot")
    loaded.eject()
    with pytest.raises(ConfigError, match="0 pictures of 'a red boot'"):
        ExpertTrainer(pipe, [], "a red boot")
    with pytest.raises(ConfigError, match="class_text is empty"):
        ExpertTrainer(pipe, drawings(), "a red boot", config=settings(prior_weight=1.0))
    with pytest.raises(ConfigError, match="rank is 0"):
        settings(rank=0)
    with pytest.raises(ConfigError, match="learning_rate is 0"):
        settings(learning_rate=0)
    out = tmp_path / "boot.safetensors"
    ExpertTrainer(pipe, drawings(), "a red boot", config=settings(steps=1)).train(out, tmp_path / "state")
    longer = ExpertTrainer(pipe, drawings(), "a red boot", config=settings(steps=2))
    assert len(longer.train(out, tmp_path / "state")) == 2
    other = ExpertTrainer(pipe, drawings(), "a red boot", config=settings(steps=2, rank=3))
    with pytest.raises(TrainingError, match="rank: 3 now, 2 in the checkpoint"):
        other.train(out, tmp_path / "state")
    assert len(other.train(out, tmp_path / "state", fresh=True)) == 2


def test_command(components, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "pictures"
    build(StableDiffusionPipeline, components).save_pretrained(model)
    folder.mkdir()
    out = tmp_path / "out" / "boot.safetensors"
    command = ["train-expert", str(folder), "a red boot", "--model", str(model), "--out", str(out)]
    command += ["--steps", "3", "--rank", "2", "--json"]
    empty = CliRunner().invoke(app, command)
    assert empty.exit_code == 1
    assert "has no pictures" in empty.stderr
    for i, picture in enumerate(drawings()):
        picture.save(folder / f"{i}.png")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["expert"] == str(out)
    assert said["steps"] == 3
    assert len(load_file(out)) > 0
    (folder / "2.png").write_text("no picture")
    broken = CliRunner().invoke(app, command)
    assert broken.exit_code == 1
    assert "cannot be read as a picture" in broken.stderr

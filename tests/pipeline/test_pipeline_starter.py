"""`from_starter`: on a small folder of the same layout, and on the real one where it is built."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from mole_diffusion import starter
from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.pictures.pipelines import StableDiffusionMoLEImg2ImgPipeline, StableDiffusionMoLEPipeline
from mole_diffusion.starter import location

real = pytest.mark.skipif(
    not (starter.starter_dir() / "model_index.json").is_file(),
    reason="the starter is not built in assets/starter",
)


@pytest.fixture
def folder(tmp_path, plain, lora_files, monkeypatch):
    """A starter of the tiny networks and four experts: a style and the three concepts."""
    plain.save_pretrained(tmp_path)
    home = tmp_path / "experts"
    home.mkdir()
    catalogue = {}
    for name in ("ink", "boot", "cat", "clock"):
        shutil.copy(lora_files.get(name, lora_files["cat"]), home / f"{name}.safetensors")
        (home / name).mkdir()
        for i in (10, 2, 1):
            Image.new("RGB", (8, 8)).save(home / name / f"{i}.png")
        catalogue[name] = {
            "kind": "style" if name == "ink" else "concept",
            "trigger": f"zorin {name}",
            "class": name,
            "text": f"a zorin {name}",
            "class_text": f"a {name}",
            "description": f"a glossy {name}",
        }
    (home / "experts.json").write_text(json.dumps(catalogue))
    monkeypatch.setattr(location, "starter_dir", lambda: tmp_path)
    return tmp_path


def test_catalogue(folder) -> None:
    known = starter.starter_experts(folder)
    assert list(known) == ["ink", "boot", "cat", "clock"]
    boot = known["boot"]
    assert (boot.kind, boot.trigger, boot.class_name) == ("concept", "zorin boot", "boot")
    assert (boot.text, boot.class_text, boot.description) == ("a zorin boot", "a boot", "a glossy boot")
    assert boot.path.is_file()
    assert [path.name for path in boot.references] == ["1.png", "2.png", "10.png"]
    assert starter.default_experts(folder) == ["boot", "cat", "clock"]


def test_default_is_three_concepts(folder, loaded, draw) -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter()
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.experts) == ["boot", "cat", "clock"]
    assert pipe.safety_checker is None
    torch.testing.assert_close(draw(pipe, guidance_rescale=0.0), draw(loaded), rtol=0, atol=1e-6)


def test_default_gates_are_loaded_where_the_starter_has_them(folder, loaded, draw) -> None:
    with torch.no_grad():
        for parameter in loaded.mixtures["unet"].parameters():
            parameter.add_(0.3)
    loaded.save_gates(folder / "experts" / "gates.safetensors")
    pipe = StableDiffusionMoLEPipeline.from_starter()
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipe, guidance_rescale=0.0), draw(loaded), rtol=0, atol=1e-6)


def test_chosen_experts(folder) -> None:
    assert list(StableDiffusionMoLEPipeline.from_starter([]).experts) == []
    assert list(StableDiffusionMoLEPipeline.from_starter(["cat", "ink"]).experts) == ["cat", "ink"]
    assert list(StableDiffusionMoLEPipeline.from_starter("all").experts) == ["ink", "boot", "cat", "clock"]
    with pytest.raises(UnknownExpertError, match=r"'bot'.*'boot'"):
        StableDiffusionMoLEPipeline.from_starter(["bot"])


def test_dtype(folder) -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter(["cat"], torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16


def test_missing_starter_says_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(location, "starter_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no model_index.json in {tmp_path}"):
        StableDiffusionMoLEPipeline.from_starter()
    with pytest.raises(FileNotFoundError, match=r"experts\.json does not exist"):
        starter.starter_experts(tmp_path)


@real
def test_real_starter_draws_with_its_experts() -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter()
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.experts) == 3
    known = starter.starter_experts()
    prompt = " and ".join(known[name].text for name in pipe.experts)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    gated = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images
    base = pipe(prompt, generator=torch.Generator().manual_seed(0), mixture="none", **settings).images
    assert gated.shape == (1, 3, 128, 128)
    assert (gated - base).abs().max() > 0.01


@real
def test_every_real_expert_loads_whole() -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter("all")
    for name, expert in starter.starter_experts().items():
        assert not pipe.experts[name].report.ignored
        assert len(expert.references) == 5
    StableDiffusionPipeline.from_pretrained(starter.starter_dir(), safety_checker=None)


@real
def test_the_starter_draws_with_its_own_guidance_unless_told(tmp_path) -> None:
    pipe = StableDiffusionMoLEPipeline.from_starter(["boot", "clock"])
    pipe.set_progress_bar_config(disable=True)

    def drawn(one, *args, **kwargs):
        settings = {"num_inference_steps": 2, "output_type": "pt", **kwargs}
        return one("a zorin boot", *args, **settings, generator=torch.Generator().manual_seed(3)).images

    own = drawn(pipe, guidance_scale=2.0, guidance_rescale=0.7)
    assert torch.equal(drawn(pipe), own)
    other = drawn(pipe, guidance_scale=7.5)
    assert not torch.equal(other, own)
    assert torch.equal(other, drawn(pipe, guidance_scale=7.5, guidance_rescale=0.7))
    shared = StableDiffusionMoLEPipeline.from_pipe(pipe)
    assert torch.equal(drawn(shared), own)
    picture = StableDiffusionMoLEImg2ImgPipeline.from_pipe(pipe)
    assert picture.call_defaults["guidance_scale"] == 2.0
    assert not StableDiffusionMoLEPipeline.call_defaults

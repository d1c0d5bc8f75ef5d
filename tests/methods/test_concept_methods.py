"""SVDiff, Textual Inversion and Custom Diffusion on a tiny pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mole_diffusion import load_expert
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.methods import PrepareOptions, load_prepared, prepare
from mole_diffusion.methods.custom_diffusion import constrained, trained_processors, wording_of
from mole_diffusion.methods.replaced import Wording, attention
from mole_diffusion.methods.svdiff import Spectrum
from mole_diffusion.pictures.training import Concept
from mole_diffusion.pictures.training.workbench import picture_tensor

TRAINED = {"svdiff": 3e-2, "textual_inversion": 3e-2, "custom_diffusion": 1e-2}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of trained concepts for all tests."""
    return tmp_path_factory.mktemp("concepts")


def options_for(method: str, cache: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"steps": 6, "rate": TRAINED[method], "cache": cache, **changes})


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything that a method might leave behind."""
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {
        "parameters": {(p, n): v for p, net in networks.items() for n, v in net.named_parameters()},
        "values": {(p, n): v.clone() for p, net in networks.items() for n, v in net.state_dict().items()},
        "processors": dict(pipe.unet.attn_processors),
        "words": len(pipe.tokenizer),
        "tokenizer": pipe.tokenizer,
        "rows": pipe.text_encoder.config.vocab_size,
        "grad": [p.requires_grad for p in pipe.unet.parameters()],
        "own": set(vars(pipe)),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(now["parameters"]) == list(before["parameters"])
    assert all(now["parameters"][k] is before["parameters"][k] for k in before["parameters"])
    assert list(now["values"]) == list(before["values"])
    assert all(torch.equal(now["values"][k], before["values"][k]) for k in before["values"])
    for name in ("processors", "words", "rows", "grad", "own"):
        assert now[name] == before[name], name
    assert now["tokenizer"] is before["tokenizer"]


@pytest.mark.parametrize("method", TRAINED)
def test_trains_draws_and_leaves_nothing(pipe, draw, concepts, tiny, cache, method, tmp_path) -> None:
    before_picture, before = draw(pipe), snapshot(pipe)
    base = draw(pipe, mixture="none")
    prepared = prepare(
        method, pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options_for(method, cache)
    )
    assert_same(snapshot(pipe), before)
    picture = draw(pipe, mixture=prepared)
    assert (picture - base).abs().max() > 1e-3
    assert_same(snapshot(pipe), before)
    torch.testing.assert_close(draw(pipe), before_picture, rtol=0, atol=0)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        draw(pipe, mixture=prepared, callback_on_step_end=fail)
    assert_same(snapshot(pipe), before)
    torch.testing.assert_close(draw(pipe), before_picture, rtol=0, atol=0)
    torch.testing.assert_close(draw(pipe, mixture=load_prepared(tmp_path)), picture, rtol=0, atol=0)
    torch.testing.assert_close(draw(pipe, mixture=prepared), picture, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="is one piece"):
        draw(pipe, mixture=prepared, active_experts=["cat"])
    prior = 0 if method == "textual_inversion" else 2 * 3
    assert prepared.unet_passes == {"with_gradient": 18, "without_gradient": 3 * prior}


@torch.no_grad()
def denoising_loss(pipe: Any, concept: Concept, mixture: Any) -> float:
    """Mean squared error on the concept's pictures, on fixed noise over the whole schedule."""
    draws = torch.Generator().manual_seed(11)
    pixels = torch.stack([picture_tensor(picture, (32, 32)) for picture in concept.references] * 20)
    latents = pipe.vae.encode(pixels * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=draws)
    timesteps = torch.linspace(5, 995, len(latents)).long()
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    with pipe.composing(mixture=mixture):
        text = pipe.encode_prompt(concept.text, "cpu", 1, False)[0].expand(len(latents), -1, -1)
        predicted = pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
    return float((predicted - pipe.scheduler.get_velocity(latents, noise, timesteps)).square().mean())


@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss(pipe, concepts, tiny, method, tmp_path) -> None:
    for name in ("cat", "clock"):
        pipe.unload_expert(name)  # one concept is enough
    concept = concepts["boot"]
    options = options_for(method, tmp_path, steps=40)
    prepared = prepare(method, pipe, concepts={"boot": concept}, config=tiny(), options=options)
    before, after = denoising_loss(pipe, concept, "none"), denoising_loss(pipe, concept, prepared)
    assert after < (0.999 if method == "textual_inversion" else 0.98) * before
    (facts,) = (tmp_path / method).glob("*.json")
    assert len(json.loads(facts.read_text())["losses"]) == 40


@pytest.mark.parametrize("method", TRAINED)
def test_a_concept_is_trained_once_for_all_sets(pipe, concepts, tiny, cache, method) -> None:
    options = options_for(method, cache)
    prepare(method, pipe, concepts=concepts, config=tiny(), options=options)
    times = {path: path.stat().st_mtime_ns for path in (cache / method).iterdir()}
    pipe.unload_expert("clock")
    fewer = {name: concepts[name] for name in ("boot", "cat")}
    prepared = prepare(method, pipe, concepts=fewer, config=tiny(), options=options)
    assert {path: path.stat().st_mtime_ns for path in (cache / method).iterdir()} == times
    assert prepared.unet_passes["with_gradient"] == 12  # what the two had cost
    spent = sum(
        json.loads(next((cache / method).glob(f"{name}-*.json")).read_text())["seconds"] for name in fewer
    )
    assert 0 < spent <= prepared.seconds
    pictures = {**fewer, "cat": Concept("cat", "a vim cat", "a cat", concepts["cat"].references[:1])}
    prepare(method, pipe, concepts=pictures, config=tiny(), options=options)
    assert len(list((cache / method).iterdir())) == len(times) + 2


def test_pictures_can_be_given_with_captions(pipe, concepts, tiny, tmp_path) -> None:
    bare = {name: Concept(name, c.text, c.class_text) for name, c in concepts.items()}
    with pytest.raises(ConfigError, match=r"concept 'boot' has no reference pictures; 'svdiff'"):
        prepare("svdiff", pipe, concepts=bare, config=tiny(), options=options_for("svdiff", tmp_path))
    pictures = {name: [(p, f"{c.text} in the snow") for p in c.references] for name, c in concepts.items()}
    options = options_for("svdiff", tmp_path, steps=1, pictures=pictures)
    assert prepare("svdiff", pipe, concepts=bare, config=tiny(), options=options).method == "svdiff"


def test_no_shift_is_the_base_bitwise(pipe, draw, concepts, tiny, cache, tmp_path) -> None:
    options = options_for("svdiff", cache)
    prepare("svdiff", pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options)
    path = tmp_path / "shifts.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in load_file(path).items()}, path)
    found = draw(pipe, mixture=load_prepared(tmp_path))
    torch.testing.assert_close(found, draw(pipe, mixture="none"), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 3, 3)])
def test_shifted_weight_is_the_paper_s(shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum.of(weight)
    shift = torch.linspace(-9, 1, len(spectrum.s))  # the first ones fall below zero
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    expected = (u @ torch.diag(torch.relu(s + shift)) @ vh).view(shape)
    torch.testing.assert_close(spectrum.shifted(shift), expected, atol=1e-5, rtol=0)
    assert torch.equal(spectrum.shifted(torch.zeros_like(s)), weight)


def test_shifts_of_concepts_add_up(pipe, draw, concepts, tiny, cache, tmp_path) -> None:
    options = options_for("svdiff", cache)
    prepare("svdiff", pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options)
    picture = draw(pipe, mixture=load_prepared(tmp_path))
    path = tmp_path / "shifts.safetensors"
    tensors = load_file(path)
    total: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.split("/", 1)[1]
        total[name] = total.get(name, torch.zeros_like(value)) + value
    layers = dict(pipe.unet.named_modules()) | {"": nn.Identity()}
    with torch.no_grad():
        for name, shift in total.items():
            part, layer = name.split("/")
            module = layers[layer] if part == "unet" else pipe.text_encoder.get_submodule(layer)
            u, s, vh = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
            module.weight.copy_((u @ torch.diag(torch.relu(s + shift)) @ vh).view(module.weight.shape))
    torch.testing.assert_close(draw(pipe, mixture="none"), picture, atol=2e-3, rtol=0)


def test_the_new_word_takes_the_phrase_s_place(pipe, plain, draw, concepts, tiny, cache, tmp_path) -> None:
    options = options_for("textual_inversion", cache)
    prepared = prepare(
        "textual_inversion", pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options
    )
    assert prepared.details["wording"] == {
        "zorin boot": "<boot>",
        "vim cat": "<cat>",
        "kipra clock": "<clock>",
    }
    words = load_file(tmp_path / "words.safetensors")
    for word, vector in words.items():
        plain.load_textual_inversion({word: vector}, token=word)
    expected = draw(plain, prompt="a <boot> a <cat> a <clock>")
    torch.testing.assert_close(draw(pipe, mixture=prepared), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["textual_inversion", "custom_diffusion"])
def test_words_that_experts_bring_along_are_not_in_the_way(
    pipe, draw, concepts, tiny, cache, lora_files, method, tmp_path
) -> None:
    options = options_for(method, cache)
    prepared = prepare(method, pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options)
    expected = draw(pipe, mixture=prepared)
    pipe.eject()
    for name, path in lora_files.items():
        expert = load_expert(path, name=name)
        vectors = {"text_encoder": torch.ones(1, 24)} if name == "cat" else {}
        pipe.add_expert(replace(expert, embeddings={"zip": vectors} if vectors else {}))
    before = draw(pipe, prompt="a zip cat")
    torch.testing.assert_close(draw(pipe, mixture=prepared), expected, rtol=0, atol=0)
    torch.testing.assert_close(draw(pipe, prompt="a zip cat"), before, rtol=0, atol=0)
    again = prepare(
        method, pipe, concepts=concepts, config=tiny(), options=options_for(method, tmp_path / "x")
    )
    torch.testing.assert_close(draw(pipe, mixture=again), expected, rtol=0, atol=0)


def test_untrained_attention_is_the_base(pipe, draw) -> None:
    base = draw(pipe, mixture="none")
    with attention(pipe.unet, trained_processors(pipe.unet)):
        torch.testing.assert_close(draw(pipe, mixture="none"), base, rtol=0, atol=2e-4)
    torch.testing.assert_close(draw(pipe, mixture="none"), base, rtol=0, atol=0)


def test_merged_file_is_custom_diffusion_of_diffusers(pipe, plain, draw, concepts, tiny, cache, tmp_path):
    options = options_for("custom_diffusion", cache)
    prepared = prepare(
        "custom_diffusion", pipe, concepts=concepts, config=tiny(), folder=tmp_path, options=options
    )
    tensors = load_file(tmp_path / "custom_diffusion.safetensors")
    words = {key: tensors.pop(key) for key in list(tensors) if key.startswith("<")}
    for word, vector in words.items():
        plain.load_textual_inversion({word: vector}, token=word)
    before = dict(plain.unet.attn_processors)
    rest = {name: {} for name in before if f"{name}.to_k_custom_diffusion.weight" not in tensors}
    plain.unet.load_attn_procs({**tensors, **rest}, _pipeline=plain)
    expected = draw(plain, prompt="a <boot> boot a <cat> cat a <clock> clock")
    torch.testing.assert_close(draw(pipe, mixture=prepared), expected, rtol=0, atol=2e-4)


def test_constrained_optimum() -> None:
    draws = torch.Generator().manual_seed(1)
    base, others, targets = (
        torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ((5, 8), (40, 8), (3, 8))
    )
    wanted = torch.randn(3, 5, generator=draws, dtype=torch.float64)
    weight = constrained(base, others, targets, wanted, ridge=1e-9)
    torch.testing.assert_close(targets @ weight.T, wanted, atol=1e-6, rtol=0)

    def cost(candidate: torch.Tensor) -> float:
        return float((others @ (candidate - base).T).square().sum())

    # No other weight that fulfils the constraint is nearer.
    free = torch.linalg.svd(targets).Vh[3:]
    for _ in range(5):
        step = 0.01 * torch.randn(5, len(free), generator=draws, dtype=torch.float64) @ free
        assert cost(weight + step) > cost(weight)
    same = constrained(base, others, targets, targets @ base.T)
    torch.testing.assert_close(same, base, atol=1e-9, rtol=0)


def test_merge_of_one_concept_is_that_concept_on_its_own_text(pipe, concepts, tiny, cache, tmp_path) -> None:
    for name in ("cat", "clock"):
        pipe.unload_expert(name)
    options = options_for("custom_diffusion", cache)
    one = {"boot": concepts["boot"]}
    prepare("custom_diffusion", pipe, concepts=one, config=tiny(), folder=tmp_path, options=options)
    merged = load_file(tmp_path / "custom_diffusion.safetensors")
    (file,) = (
        path for path in (cache / "custom_diffusion").glob("boot-*.safetensors") if path.stat().st_size
    )
    own = load_file(file)
    pipe.load_textual_inversion({"<boot>": own.pop("word")}, token="<boot>")
    with pipe.composing(mixture="none"):
        text = pipe.encode_prompt("a <boot> boot", "cpu", 1, False)[0][0, 2:5].detach()
    for key, weight in own.items():
        torch.testing.assert_close(text @ merged[key].T, text @ weight.T, atol=1e-3, rtol=0)


def test_merge_stays_bounded_where_concepts_ask_for_different_outputs_of_nearly_the_same_input() -> None:
    draws = torch.Generator().manual_seed(2)
    base, others = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ((5, 16), (6, 16)))
    first = torch.randn(1, 16, generator=draws, dtype=torch.float64)
    targets = torch.cat([first, first + 1e-5])
    wanted = targets @ base.T + torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert (constrained(base, others, targets, wanted) - base).norm() < 2 * base.norm()


@pytest.mark.parametrize(
    ("text", "class_text", "expected"),
    [
        ("a zorin boot", "a boot", ("zorin boot", "<x> boot")),
        (
            "a pair of rysa sunglasses",
            "a pair of sunglasses",
            ("pair of rysa sunglasses", "pair of <x> sunglasses"),
        ),
        ("a dog", "a dog", ("dog", "<x> dog")),
        ("in zaphel style", "in style", ("in zaphel style", "in <x> style")),
        ("an ohwx sks cat", "a cat", ("ohwx sks cat", "<x> cat")),
    ],
)
def test_wording_of_custom_diffusion(text, class_text, expected) -> None:
    assert wording_of(Concept("x", text, class_text)) == expected


def test_wording_replaces_whole_phrases_only() -> None:
    wording = Wording({"zorin boot": "<boot>", "boot": "<any>", "sks": "<s>"})
    assert wording("A Zorin boot, bootlace, desks and a boot") == "A <boot>, bootlace, desks and a <any>"


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        PrepareOptions(steps=0)
    with pytest.raises(ConfigError, match="rate is 0"):
        PrepareOptions(rate=0)

"""Families whose texts go through a language model, in whole pipelines; diffusers and PEFT are the oracle."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_checks import check_auto, words_of
from diffusers import AnimaModularPipeline, ChromaPipeline, DiffusionPipeline, ModularPipeline
from pipeline_helpers import CLOSE, train_a_little, with_adapters
from tiny.qwen import (
    make_anima_components,
    make_flux2_components,
    make_krea2_components,
    make_qwen_image_components,
    make_z_image_components,
)
from tiny.sd import drawing, random_lora

import mole_diffusion
from mole_diffusion import MoLEConfig
from mole_diffusion.pictures.denoisers import denoiser_of
from mole_diffusion.pictures.opening import open_base

NAMES = ["boot", "cat"]
Z_IMAGE_TARGETS = [
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "all_x_embedder.2-1", "cap_embedder.1"),
]


@dataclass(frozen=True)
class Known:
    """What the tests know of a family.

    Attributes:
        components: networks and all else, always the same.
        targets: of LoRA files.
        blocks: names of gates, for image and for text.
        kinds: what its pipelines begin from, beside a text.
        guided: options for a negative prompt that counts.
        unguided: options for none.
        packs: whether a pipeline wants latents packed.
    """

    components: Callable[[], dict[str, Any]]
    targets: list[str]
    blocks: tuple[str, ...]
    kinds: tuple[str, ...] = ("Img2Img", "Inpaint")
    guided: dict[str, Any] = field(default_factory=dict)
    unguided: dict[str, Any] = field(default_factory=dict)
    packs: bool = False


FLUX2_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_v_proj"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "to_qkv_mlp_proj"),
    *(f"single_transformer_blocks.{block}.attn.to_out" for block in (0, 1)),
]
QWEN_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"),
    *("img_mlp.net.2", "txt_mlp.net.2"),
]
KREA2_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0", "ff.gate", "ff.up", "ff.down"),
    *("text_fusion.projector", "txt_in.linear_1"),
]
ANIMA_TARGETS = [
    *(f"attn{number}.to_{x}" for number in (1, 2) for x in ("q", "k", "v", "out.0")),
    *("ff.net.0.proj", "ff.net.2"),
]
KNOWN = {
    "Anima": Known(
        make_anima_components,
        ANIMA_TARGETS,
        ("transformer_blocks.0", "transformer_blocks.0.context", "transformer_blocks.1.context"),
        kinds=(),
        guided={"negative_prompt": "dull", "guidance_scale": 2.0},
        unguided={"guidance_scale": 1.0},
    ),
    "Krea2": Known(
        make_krea2_components,
        KREA2_TARGETS,
        ("transformer_blocks.0", "transformer_blocks.0.context", "text_fusion.layerwise_blocks.0"),
        kinds=(),
        guided={"negative_prompt": "dull", "guidance_scale": 2.0},
        unguided={"guidance_scale": 0.0},
        packs=True,
    ),
    "QwenImage": Known(
        make_qwen_image_components,
        QWEN_TARGETS,
        ("transformer_blocks.0", "transformer_blocks.0.context", "transformer_blocks.0.context"),
        guided={"negative_prompt": "dull", "true_cfg_scale": 2.0},
        unguided={"true_cfg_scale": 1.0},
        packs=True,
    ),
    "Flux2": Known(
        partial(make_flux2_components, guidance=True),
        FLUX2_TARGETS,
        ("transformer_blocks.0", "transformer_blocks.0.context", "single_transformer_blocks.1.context"),
        kinds=(),
        unguided={"guidance_scale": 4.0},
    ),
    "Flux2Klein": Known(
        make_flux2_components,
        FLUX2_TARGETS,
        ("transformer_blocks.0", "transformer_blocks.0.context", "single_transformer_blocks.1.context"),
        kinds=("Inpaint",),
        guided={"guidance_scale": 2.0},
        unguided={"guidance_scale": 1.0},
    ),
    "ZImage": Known(
        make_z_image_components,
        Z_IMAGE_TARGETS,
        ("layers.0", "layers.1.context", "context_refiner.0"),
        guided={"negative_prompt": "dull", "guidance_scale": 2.0},
        unguided={"guidance_scale": 0.0},
    ),
}


class Family:
    """A base and its LoRA files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.known = name, KNOWN[name]
        self.components = self.known.components()
        self.files = {}
        for seed, expert in enumerate(NAMES, 1):
            torch.manual_seed(seed)
            layers, settings = random_lora(self.components["transformer"], self.known.targets, 2 + seed)
            file = self.files[expert] = folder / f"{expert}.safetensors"
            self._writer().save_lora_weights(
                folder,
                weight_name=file.name,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=settings,
            )

    def of(self, kind: str = "") -> Any:
        """Our class."""
        return getattr(mole_diffusion, f"{self.name}MoLE{kind}Pipeline")

    def _writer(self) -> Any:
        """A class of diffusers that writes LoRAs; none does for Anima, but with the same names."""
        return ChromaPipeline if self.name == "Anima" else self.of().diffusers_class

    def plain(self, kind: str = "") -> Any:
        return self._build(self.of(kind).diffusers_class)

    def loaded(self, *, trained: bool = True) -> Any:
        pipe = self._build(self.of())
        for name, path in self.files.items():
            pipe.load_expert(path, name=name)
        if trained:
            train_a_little(pipe)
        return pipe

    def _build(self, cls: type) -> Any:
        pipe = cls(**copy.deepcopy(self.components))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, prompt: Any = "a boot and a cat", **options: Any) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 48}
        given = {**settings, **self.known.unguided, **options}
        # Pipelines write into lists of prompts.
        prompt = list(prompt) if isinstance(prompt, list) else prompt
        given = {"generator": torch.Generator().manual_seed(7), **given}
        pictures: torch.Tensor = pipe(prompt=prompt, **given).images
        return pictures


@pytest.fixture(scope="module", params=KNOWN)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp("family"))


def test_experts_mixtures_and_the_base(family: Family) -> None:
    pipe = family.loaded()
    assert set(pipe.mixtures) == {"transformer"}
    for options in ({}, family.known.guided):
        base = family.draw(family.plain(), **options)
        expected = family.draw(with_adapters(family.plain(), family.files, {"cat": 1.0}), **options)
        assert (expected - base).abs().max() > 0.01
        torch.testing.assert_close(family.draw(pipe, active_experts=["cat"], **options), expected, **CLOSE)
        for _ in range(2):
            torch.testing.assert_close(family.draw(pipe, mixture="none", **options), base, rtol=0, atol=0)
        assert (family.draw(pipe, **options) - base).abs().max() > 0.01
    half = family.draw(with_adapters(family.plain(), family.files, dict.fromkeys(NAMES, 0.5)))
    torch.testing.assert_close(family.draw(pipe, mixture="nla"), half, **CLOSE)
    pipe.configure(MoLEConfig(composition="output", strength=1.0))
    one = family.draw(with_adapters(family.plain(), family.files, {"boot": 1.0}))
    torch.testing.assert_close(family.draw(pipe, active_experts=["boot"]), one, **CLOSE)
    base = family.draw(family.plain())
    pipe.eject()
    torch.testing.assert_close(family.draw(pipe), base, rtol=0, atol=0)


def test_gates_without_training(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    pipe, plain = family.loaded(trained=False), family.plain()
    check_auto(pipe, plain, family.files, family.draw, family.known.guided, caplog)


def test_words_are_found_in_what_is_written_around_a_prompt(family: Family) -> None:
    """Language models read from left to right: rows are the same up to the first word that differs."""
    pipe = family.loaded(trained=False)
    if family.name == "Anima":
        (places, _) = words_of(pipe, "a boot and a cat", do_classifier_free_guidance=True)
        pieces = pipe.t5_tokenizer.convert_ids_to_tokens(pipe.t5_tokenizer("a boot and a cat").input_ids)
        for index, word in enumerate(NAMES):
            assert places[:, index].nonzero().flatten().tolist() == [pieces.index(f"▁{word}")]
        return
    rows = []
    for prompt in ("a boot and a cat", "a clock and a cat", "a boot and a clock"):
        encoded = pipe.encode_prompt(prompt=prompt)[0]
        rows.append((encoded if family.name != "ZImage" else torch.stack(encoded)).flatten(2)[0])
    places = words_of(pipe, "a boot and a cat")[0]
    assert len(places) == len(rows[0])
    for index, other in enumerate(rows[1:]):
        differs = (rows[0] - other).abs().amax(-1) > 1e-5
        assert places[:, index].nonzero().flatten().tolist() == [int(differs.long().argmax())]


def test_gates_are_recorded_by_step_branch_and_entry(family: Family) -> None:
    pipe = family.loaded()
    two = ["a boot", "a cat on the beach and a clock"]
    guided = family.known.guided
    named = {"negative_prompt": ["dull", "red snow"]} if "negative_prompt" in guided else {}
    assert family.draw(pipe, two, **{**guided, **named}).shape[0] == 2
    rows = pipe.gate_weights().where(network="transformer")
    assert {row.step for row in rows} == {0, 1}
    assert {row.branch for row in rows} == {"prompt", *(["negative"] if guided else [])}
    assert {row.entry for row in rows} == {0, 1}
    assert set(family.known.blocks) <= {row.group for row in rows}
    if not named:
        return

    def weights(prompt: Any, negative: Any, branch: str, entry: int) -> list[float]:
        family.draw(pipe, prompt, **{**family.known.guided, "negative_prompt": negative})
        found = pipe.gate_weights().where(branch=branch, entry=entry, step=0, group=family.known.blocks[2])
        return [row.weight for row in found]

    # Whose weights are whose: another negative prompt moves the negative's alone.
    first = weights("a boot", "dull", "prompt", 0)
    assert weights("a boot", "red snow and the beach", "prompt", 0) == pytest.approx(first, abs=1e-4)
    negative = weights("a boot", "dull", "negative", 0)
    assert weights("a boot", "red snow and the beach", "negative", 0) != pytest.approx(negative, abs=1e-4)


def test_region_masks(family: Family) -> None:
    pipe = family.loaded()
    left = torch.zeros(32, 48)
    left[:, :24] = 1
    free = family.draw(pipe)
    assert (family.draw(pipe, region_masks={"boot": left, "cat": 1 - left}) - free).abs().max() > 1e-3
    everywhere = dict.fromkeys(NAMES, torch.ones(32, 48))
    torch.testing.assert_close(family.draw(pipe, region_masks=everywhere), free, **CLOSE)


def test_from_a_picture_and_a_mask(family: Family) -> None:
    pipe = family.loaded()
    for kind in family.known.kinds:
        options: dict[str, Any] = {"image": drawing("boot", 8).resize((48, 32)), "strength": 0.9}
        if kind == "Inpaint":
            mask = drawing("cat", 16).resize((48, 32)).convert("L")
            options["mask_image"] = mask.point(lambda v: 255 * (v > 160))
        ours = family.of(kind).from_pipe(pipe)
        ours.set_progress_bar_config(disable=True)
        assert ours.mixtures == pipe.mixtures
        plain = family.plain(kind)
        base = family.draw(plain, **options)
        torch.testing.assert_close(family.draw(ours, mixture="none", **options), base, rtol=0, atol=0)
        expected = family.draw(with_adapters(plain, family.files, {"cat": 1.0}), **options)
        torch.testing.assert_close(family.draw(ours, active_experts=["cat"], **options), expected, **CLOSE)
        assert (expected - base).abs().max() > 0.01
        if ours.as_large_as_its_picture:
            unsaid = {**options, "height": None, "width": None}
            torch.testing.assert_close(family.draw(ours, active_experts=["cat"], **unsaid), expected, **CLOSE)


def test_gates_folders_and_exports(family: Family, tmp_path: Path) -> None:
    pipe = family.loaded()
    pipe.save_gates(tmp_path / "gates.safetensors")
    expected = family.draw(pipe)
    pipe.save_pretrained(tmp_path / "model")
    if family.name == "Anima":
        assert type(ModularPipeline.from_pretrained(str(tmp_path / "model"))) is AnimaModularPipeline
    else:
        assert type(DiffusionPipeline.from_pretrained(tmp_path / "model")) is pipe.diffusers_class
    again = open_base(str(tmp_path / "model"))
    assert type(again) is family.of()
    for name, path in family.files.items():
        again.load_expert(path, name=name)
    again.load_gates(tmp_path / "gates.safetensors")
    torch.testing.assert_close(family.draw(again), expected, rtol=0, atol=1e-5)
    again.configure(MoLEConfig(strength=1.0))
    file = tmp_path / "static.safetensors"
    report = again.export_lora(file, prompts="a boot and a cat", steps=2, size=(32, 48))
    # Fresh gates are 1/N everywhere: the frozen mixture is the mixture.
    assert report.noise_difference < 1e-4
    nla = family.draw(again, mixture="nla")
    torch.testing.assert_close(
        family.draw(with_adapters(family.plain(), {"static": file}, {"static": 1.0})), nla, **CLOSE
    )


def test_training_says_to_the_network_what_the_pipeline_says(family: Family) -> None:
    """Steps of the pipeline are steps of the denoiser, and the velocity leads from noise to picture."""
    pipe = family.loaded()
    denoiser = denoiser_of(pipe, (32, 48))
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text, latents = denoiser.encode_texts(["a boot", ""]), noise
        for time in denoiser.schedule(2):
            denoiser.guided(family.known.unguided[pipe.guided_by])
            latents, _ = denoiser.step(denoiser.predict(latents, time, text[:1]), time, latents)
        found = denoiser.decode(latents)
    packed = pipe._pack_latents(noise, *noise.shape) if family.known.packs else noise
    packed = packed.unsqueeze(2) if family.name == "Anima" else packed
    expected = family.draw(pipe, "a boot", latents=packed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    latents = torch.randn_like(noise)
    clean = denoiser.encode(torch.rand(1, 3, 32, 48))
    assert clean.shape == noise.shape
    times = torch.tensor([0.75])
    torch.testing.assert_close(denoiser.noisy(clean, noise, times), 0.25 * clean + 0.75 * noise)
    torch.testing.assert_close(denoiser.target(clean, noise, times), noise - clean)

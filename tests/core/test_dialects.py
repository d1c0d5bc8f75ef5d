"""Files of every dialect for every Stable Diffusion act as they do in diffusers, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch
from packaging.version import Version
from tiny.families import (
    ATTENTION_LEAVES,
    DIFFUSERS,
    KOHYA_1,
    KOHYA_XL,
    Factors,
    Parts,
    dotted,
    flat,
    ldm_names,
    make_factors,
    make_parts,
    run_part,
    with_diffusers,
    write,
)
from torch import Tensor, nn

from mole_diffusion import Expert, MoLEConfig, inject
from mole_diffusion.core.inspection import describe_expert

FAMILIES = ("sd15", "sd21", "sdxl")
KOHYA_SUFFIXES = (".lora_down.weight", ".lora_up.weight")
PEFT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def families() -> dict[str, Parts]:
    return {family: make_parts(family) for family in FAMILIES}


def kohya(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    prefixes = KOHYA_XL if "text_encoder_2" in parts else KOHYA_1
    return write(factors, flat(prefixes), *KOHYA_SUFFIXES)


def kohya_ldm(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    prefixes = KOHYA_XL if "text_encoder_2" in parts else KOHYA_1
    return write(factors, flat(prefixes, ldm_names(parts["unet"])), *KOHYA_SUFFIXES)


def diffusers_new(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    return write(factors, dotted(DIFFUSERS), *PEFT_SUFFIXES)


def diffusers_old(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    suffixes = (".lora.down.weight", ".lora.up.weight")
    text = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    unet = {key: pair for key, pair in factors.items() if key[0] == "unet"}
    rest = {key: pair for key, pair in factors.items() if key[0] != "unet"}
    return write(unet, dotted(DIFFUSERS), *suffixes) | write(rest, dotted(DIFFUSERS), *text)


def processors(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    def module_of(part: str, name: str) -> str:
        holder, leaf = name.removesuffix(".0").rsplit(".", 1)
        return f"unet.{holder}.processor.{leaf}_lora"

    return write(factors, module_of, ".down.weight", ".up.weight")


def peft(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    return write(factors, lambda part, name: f"base_model.model.{part}.{name}", *PEFT_SUFFIXES)


def ldm(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    prefixes = {
        "unet": "diffusion_model.",
        "text_encoder": "text_encoder.",
        "text_encoder_2": "text_encoder_2.",
    }
    return write(factors, dotted(prefixes, ldm_names(parts["unet"])), *PEFT_SUFFIXES)


def checkpoint(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    """Names as in a whole checkpoint, as A1111's tools write them."""
    xl = "text_encoder_2" in parts
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    prefixes = {"unet": "model.diffusion_model.", "text_encoder": first, "text_encoder_2": "text_encoder_2."}
    return write(factors, dotted(prefixes, ldm_names(parts["unet"])), *KOHYA_SUFFIXES)


def openclip(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    """OpenCLIP's names for the second text encoder; its q, k and v are fused and cannot be named apart."""
    names = {"out_proj": "attn_out_proj", "fc1": "mlp_c_fc", "fc2": "mlp_c_proj"}

    def module_of(part: str, name: str) -> str:
        index, leaf = name.split(".")[2], names[name.rsplit(".", 1)[1]]
        return f"lora_te2_transformer_resblocks_{index}_{leaf}"

    return write(factors, module_of, *KOHYA_SUFFIXES)


def onetrainer(factors: Factors, parts: Parts) -> dict[str, Tensor]:
    prefixes = {"unet": "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
    return write(factors, dotted(prefixes), *KOHYA_SUFFIXES)


def half(dtype: torch.dtype) -> Callable[[Factors, Parts], dict[str, Tensor]]:
    return lambda factors, parts: {key: value.to(dtype) for key, value in kohya(factors, parts).items()}


def everything(part: str, name: str) -> bool:
    """All that diffusers' own layers can carry: the text projection is outside of what it converts."""
    return name != "text_projection"


def kohya_writes(part: str, name: str) -> bool:
    """With diffusers' blocks kohya writes SD 1.x and 2.x; diffusers misreads `add_embedding_linear_1`."""
    return everything(part, name) and not name.startswith("add_embedding")


def kohya_ldm_writes(part: str, name: str) -> bool:
    """diffusers takes LDM's upsampler after blocks without attention (child 1) for an attention.

    The dialects "LDM" and "checkpoint" below have it, under the same names.
    """
    return everything(part, name) and "upsamplers" not in name


def attention(part: str, name: str) -> bool:
    return part == "unet" and name.endswith(ATTENTION_LEAVES)


def second_text(part: str, name: str) -> bool:
    return part == "text_encoder_2" and name.endswith(("out_proj", "fc1", "fc2"))


@dataclass(frozen=True)
class Dialect:
    """How a file is written, of which matrices, with which alphas, and for which families diffusers reads it.

    Where it cannot (its converters know neither PEFT's `base_model.`, nor dotted LDM names, nor OneTrainer's
    `clip_l.`, nor OpenCLIP's names), the oracle is diffusers with the same factors in its own names. Its own
    names have no alphas besides the header's, so there the alphas are multiplied in. The same holds for
    alphas that differ from matrix to matrix: diffusers gives PEFT patterns of names that no attention matrix
    has ("...processor.to_q_lora.down.weight"), and fails. LDM's blocks it renames for SDXL alone: the
    pipeline of SD 1.x and 2.x does not tell its converter the UNet's config.
    """

    write: Callable[[Factors, Parts], dict[str, Tensor]]
    wanted: Callable[[str, str], bool] = everything
    alphas: str = "differ"
    native: tuple[str, ...] = ()
    said: str = "kohya"


DIALECTS = {
    "kohya": Dialect(kohya, kohya_writes, "same", native=FAMILIES),
    "kohya, LDM blocks": Dialect(
        kohya_ldm, kohya_ldm_writes, "same", native=("sdxl",), said="kohya, LDM blocks"
    ),
    "kohya, no alpha": Dialect(kohya, kohya_writes, "none", native=FAMILIES),
    "kohya, alphas differ": Dialect(kohya_ldm, said="kohya, LDM blocks"),
    "kohya, fp16": Dialect(half(torch.float16), kohya_writes, "same", native=FAMILIES),
    "kohya, bf16": Dialect(half(torch.bfloat16), kohya_writes, "same", native=FAMILIES),
    "diffusers": Dialect(diffusers_new, alphas="none", native=FAMILIES, said="diffusers, PEFT keys"),
    "diffusers, old": Dialect(diffusers_old, alphas="none", native=FAMILIES, said="diffusers"),
    "attention processors": Dialect(
        processors, attention, "none", native=FAMILIES, said="diffusers, attention processors"
    ),
    "PEFT": Dialect(peft, said="PEFT"),
    "LDM": Dialect(ldm, said="ComfyUI, LDM blocks"),
    "checkpoint": Dialect(checkpoint, said="checkpoint, LDM blocks"),
    "OneTrainer": Dialect(onetrainer, said="OneTrainer"),
    "OpenCLIP": Dialect(openclip, second_text, said="kohya, the makers' names"),
}


def plain(factors: Factors) -> dict[str, Tensor]:
    """The same LoRA in diffusers' names, with the alphas multiplied in."""
    scaled = {}
    for (part, name), pair in factors.items():
        scale = 1.0 if pair.alpha is None else pair.alpha / pair.down.shape[0]
        module = dotted(DIFFUSERS)(part, name)
        scaled[f"{module}.lora_A.weight"] = pair.down
        scaled[f"{module}.lora_B.weight"] = pair.up * scale
    return scaled


def outputs(parts: Parts, expert: Expert) -> dict[str, Tensor]:
    found = {}
    for part, network in parts.items():
        mixture = inject(network, [expert], MoLEConfig(), part=part) if part in expert.factors else None
        if mixture is not None:
            assert not mixture.unmatched["dog"]
        found[part] = run_part(part, network)
        if mixture is not None:
            mixture.eject()
    return found


@pytest.fixture(scope="module")
def plainly() -> dict[tuple[object, ...], dict[str, Tensor]]:
    """What diffusers makes of factors in its own names: the same for all dialects that it does not read."""
    return {}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_outputs_are_those_of_diffusers(
    dialect: str,
    family: str,
    families: dict[str, Parts],
    plainly: dict[tuple[object, ...], dict[str, Tensor]],
) -> None:
    chosen, parts = DIALECTS[dialect], families[family]
    factors = make_factors(parts, chosen.wanted, alphas=chosen.alphas)
    if not factors:
        pytest.skip("this family has no second text encoder")
    if Version(diffusers.__version__) < Version("0.40"):
        pytest.skip("before 0.40 diffusers loses matrices outside of blocks and mistakes ranks that differ")
    state = chosen.write(factors, parts)
    expert = Expert.from_state_dict(state, name="dog")
    assert set(expert.report.loaded) == set(state)
    told = describe_expert(expert).facts
    assert told["dialect"].split("; ")[0] == chosen.said
    assert told["form"] == "LoRA of ranks 1 to 3"
    ratios = [1.0 if pair.alpha is None else pair.alpha / len(pair.down) for pair in factors.values()]
    span = "1" if chosen.alphas == "none" else f"{min(ratios):.4g} to {max(ratios):.4g}, by matrix"
    assert told["strength"] == f"alpha / rank is {span}"
    assert {part: set(found) for part, found in expert.factors.items()} == {
        part: {name for other, name in factors if other == part} for part in {key[0] for key in factors}
    }
    if family in chosen.native:
        expected = with_diffusers(parts, state)
    else:
        same = (family, chosen.wanted, chosen.alphas)
        if same not in plainly:
            plainly[same] = with_diffusers(parts, plain(factors))
        expected = plainly[same]
    found = outputs(parts, expert)
    for part in parts:
        torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-5)
        if part in expert.factors:
            assert (found[part] - run_part(part, parts[part])).abs().max() > 0.01


@pytest.mark.parametrize("layers", [1, 3])
def test_ldm_blocks_follow_the_network(layers: int) -> None:
    """A UNet with another number of residual blocks per level numbers its LDM blocks in another way."""
    parts: Parts = {"unet": make_parts("sd15", layers=layers)["unet"]}
    factors = make_factors(parts)
    renamed = Expert.from_state_dict(kohya_ldm(factors, parts), name="dog")
    expected = outputs(parts, Expert.from_state_dict(kohya(factors, parts), name="dog"))
    torch.testing.assert_close(outputs(parts, renamed)["unet"], expected["unet"], rtol=0, atol=0)


def test_text_projection() -> None:
    """diffusers leaves it out; the oracle is the merged weight."""
    parts: Parts = {"text_encoder_2": make_parts("sdxl")["text_encoder_2"]}
    factors = make_factors(parts, lambda part, name: name == "text_projection")
    state = write(factors, lambda part, name: "lora_te2_text_projection", *KOHYA_SUFFIXES)
    found = outputs(parts, Expert.from_state_dict(state, name="dog"))["text_encoder_2"]
    (pair,) = factors.values()
    weight = parts["text_encoder_2"].get_parameter("text_projection.weight")
    with torch.no_grad():
        weight += pair.up @ pair.down * (pair.alpha or 0.0) / pair.down.shape[0]
    torch.testing.assert_close(found, run_part("text_encoder_2", parts["text_encoder_2"]))


def test_bundled_embeddings(families: dict[str, Parts]) -> None:
    state = kohya(make_factors({"unet": families["sd15"]["unet"]}, attention), families["sd15"])
    bundle = {
        "bundle_emb.zorin boot.clip_l": torch.ones(2, 16),
        "bundle_emb.zorin boot.clip_g": torch.ones(2, 24),
        "bundle_emb.v1.5 kipra.string_to_param.*": torch.ones(16),
        "bundle_emb.zorin boot.clip_l_out": torch.ones(2, 16),
    }
    expert = Expert.from_state_dict(
        state | bundle, name="dog", metadata={"modelspec.trigger_phrase": "a boot"}
    )
    assert expert.triggers == ("zorin boot", "v1.5 kipra", "a boot")
    shapes = {
        word: {part: tuple(vectors.shape) for part, vectors in networks.items()}
        for word, networks in expert.embeddings.items()
    }
    assert shapes == {
        "zorin boot": {"text_encoder": (2, 16), "text_encoder_2": (2, 24)},
        "v1.5 kipra": {"text_encoder": (1, 16)},
    }
    assert list(expert.report.ignored) == ["bundle_emb.zorin boot.clip_l_out"]
    assert len(expert.report.loaded) == len(state) + 3


def test_networks_of_both_transformers(families: dict[str, Parts]) -> None:
    """transformers 4 keeps a text encoder's layers under `text_model.`, 5 does not."""
    network = families["sd15"]["text_encoder"]
    older = nn.Module()
    older.text_model = network
    factors = make_factors({"text_encoder": network})
    expert = Expert.from_state_dict(kohya(factors, {}), name="dog")
    mixture = inject(older, [expert], MoLEConfig(), part="text_encoder")
    assert {name for group in mixture.groups for name in group.matrices} == {name for _, name in factors}
    mixture.eject()

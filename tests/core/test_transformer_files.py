"""LoRA files of denoising transformers, in every writer's form: tables, and the split delta as the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny.networks import run, with_peft
from tiny.transformers import (
    make_anima,
    make_chroma,
    make_flux,
    make_flux2,
    make_krea2,
    make_qwen_image,
    make_sd3,
    make_z_image,
)
from torch import Tensor, nn

from mole_diffusion import Expert, InjectionError, MoLEConfig, inject, load_expert
from mole_diffusion.core.bases import base_of_expert
from mole_diffusion.core.inspection import describe_file
from mole_diffusion.core.keys import parse_keys
from mole_diffusion.core.networks import map_network

from .test_invariants import assert_close, differs

Native = Mapping[str, tuple[str, ...]]

FLUX_DOUBLE: Native = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX_SINGLE: Native = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_ROOT: Native = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


@cache
def flux_names() -> dict[str, tuple[str, ...]]:
    """Black Forest Labs' name -> the matrices of diffusers that are its rows."""
    rows = (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
    )
    found = dict(FLUX_ROOT)
    for ours, theirs, names in rows:
        for block in range(2):
            for name, leaves in names.items():
                found[f"{theirs}.{block}.{name}"] = tuple(f"{ours}.{block}.{leaf}" for leaf in leaves)
    return found


@dataclass(frozen=True)
class Writer:
    """One program's form.

    Attributes:
        module: how it writes a name.
        down, up: ends of its keys.
        native: whether it has the names of the makers' own code, fused; else those of diffusers.
        alpha: whether it writes alphas.
        wanted: which matrices it trains, by their names in the file.
        said: what `inspect` calls it; the makers' names are told beside it.
    """

    module: Callable[[str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    native: bool = False
    alpha: bool = False
    wanted: Callable[[str], bool] = lambda name: True
    said: str = ""


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


KOHYA: dict[str, Any] = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": True}
WRITERS: dict[str, Writer] = {
    "diffusers": Writer(dotted("transformer."), said="diffusers, PEFT keys"),
    "PEFT": Writer(
        dotted("base_model.model."), ".lora_A.default.weight", ".lora_B.default.weight", said="PEFT"
    ),
    "DiffSynth": Writer(dotted(""), ".lora_A.default.weight", ".lora_B.default.weight", said="DiffSynth"),
    "kohya": Writer(flat("lora_unet_"), **KOHYA, native=True, said="kohya"),
    "kohya, names of diffusers": Writer(flat("lora_unet_"), **KOHYA, said="kohya"),
    "two underscores": Writer(flat("lora_unet__"), **KOHYA, native=True, said="kohya"),
    "OneTrainer": Writer(flat("lora_transformer_"), **KOHYA, said="OneTrainer"),
    "OneTrainer, dotted": Writer(dotted("transformer."), **KOHYA, said="OneTrainer"),
    "ComfyUI": Writer(dotted("diffusion_model."), native=True, said="ComfyUI"),
    "ComfyUI, names of diffusers": Writer(dotted("diffusion_model."), alpha=True, said="ComfyUI"),
    "makers' names": Writer(dotted(""), native=True, said="no prefix"),
    "makers' names, PEFT": Writer(dotted("base_model.model."), native=True, said="PEFT"),
    "checkpoint": Writer(dotted("model.diffusion_model."), **KOHYA, native=True, said="checkpoint"),
    "LyCORIS": Writer(flat("lycoris_"), **KOHYA, said="LyCORIS"),
    "old diffusers": Writer(dotted("transformer."), ".lora.down.weight", ".lora.up.weight", said="diffusers"),
}


def check_told(path: Path, family: str, writer: Writer, *, makers: bool) -> None:
    """Family, writer, form and strength of a file as `mole inspect` says them."""
    told = describe_file(path).facts
    assert told["base"] == family
    assert told["dialect"] == (f"{writer.said}, the makers' names" if makers else writer.said)
    assert told["form"] == "LoRA of ranks 1 to 3"
    assert told["strength"] == f"alpha / rank is {0.5 if writer.alpha else 1}"


def plain(network: nn.Module, writer: Writer) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names in a writer's file and the matrices of the network that they are."""
    sites = {site.name for site in map_network(network).sites}
    names = flux_names() if writer.native else {name: (name,) for name in sites}
    for name, matrices in names.items():
        if writer.wanted(name) and sites.issuperset(matrices):
            yield name, matrices


def write(network: nn.Module, writer: Writer, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file, and the delta of each matrix of diffusers' network."""
    draws = torch.Generator().manual_seed(seed)
    state, deltas = {}, {}
    for index, (name, matrices) in enumerate(plain(network, writer)):
        shapes = [network.get_submodule(matrix).weight.shape for matrix in matrices]
        rank = 1 + index % 3
        down = torch.randn(rank, shapes[0][1], generator=draws) * 0.2
        up = torch.randn(sum(shape[0] for shape in shapes), rank, generator=draws) * 0.2
        alpha = 0.5 * rank if writer.alpha else float(rank)
        module = writer.module(name)
        state |= {f"{module}{writer.down}": down, f"{module}{writer.up}": up}
        if writer.alpha:
            state[f"{module}.alpha"] = torch.tensor(alpha)
        delta = alpha / rank * up @ down
        if "adaLN_modulation" in name:  # shift and scale change places
            delta = delta.roll(len(delta) // 2, 0)
        parts = delta.split([shape[0] for shape in shapes])
        deltas |= {matrix: part.clone() for matrix, part in zip(matrices, parts, strict=True)}
    return state, deltas


def as_peft(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The deltas as a LoRA of full rank, for the oracle."""
    state = {}
    for matrix, delta in deltas.items():
        rank = 32
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        pad = max(0, rank - len(s))
        up, down = (u * s)[:, :rank], v[:rank]
        state[f"{matrix}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, pad)).float()
        state[f"{matrix}.lora_B.weight"] = nn.functional.pad(up, (0, pad)).float()
    return state


@pytest.mark.parametrize("writer", WRITERS)
def test_every_key_is_used_and_every_delta_is_right(writer: str, tmp_path: Path) -> None:
    for network in (make_flux(), make_chroma()):
        state, deltas = write(network, WRITERS[writer])
        expert = Expert.from_state_dict(state, name="dog")
        assert set(expert.report.loaded) == set(state)
        assert not expert.report.ignored
        found = expert.factors["transformer"]
        assert set(found) == set(deltas)
        for matrix, delta in deltas.items():
            torch.testing.assert_close(found[matrix].delta(), delta, rtol=1e-5, atol=1e-6)
        expected = run(with_peft(network, {"dog": as_peft(deltas)}, {"dog": 1.0}))
        assert differs(expected, run(network))
        inject(network, [expert], MoLEConfig()).eject()
        mixture = inject(network, [expert], MoLEConfig())
        assert_close(run(network), expected)
        mixture.eject()
    save_file(state, tmp_path / "dog.safetensors")
    check_told(tmp_path / "dog.safetensors", "FLUX.1", WRITERS[writer], makers=WRITERS[writer].native)


@pytest.mark.parametrize("made", [make_flux, make_chroma, make_flux2, make_qwen_image, make_z_image])
def test_the_order_of_a_files_keys_tells_nothing(made: Callable[[], nn.Module]) -> None:
    for writer in ("PEFT", "DiffSynth", "diffusers"):
        state, _ = write(made(), WRITERS[writer])
        expected = base_of_expert(Expert.from_state_dict(state, name="dog"))
        kinds = {parsed.architecture for parsed in parse_keys(state, _shapes(state)).values()}
        assert len(kinds) == 1
        for key in state:
            last = {**{other: state[other] for other in state if other != key}, key: state[key]}
            parsed = parse_keys(last, _shapes(last))
            assert {one.architecture for one in parsed.values()} == kinds
        backwards = dict(reversed(state.items()))
        assert base_of_expert(Expert.from_state_dict(backwards, name="dog")) == expected


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def qkv(kind: str, draws: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a LyCORIS form for a fused matrix of 96 x 32 by the ends of their keys, and its delta."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws) * 0.3

    if kind == "LoKr":
        first, second = noise(8, 4), noise(12, 8)
        return {"lokr_w1": first, "lokr_w2": second}, torch.kron(first, second)
    if kind == "LoKr, factored":
        first, left, right = noise(8, 4), noise(12, 2), noise(2, 8)
        tensors = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.0)}
        return tensors, torch.kron(first, left @ right) / 2
    if kind == "LoHa":
        a, b, c, d = noise(96, 2), noise(2, 32), noise(96, 2), noise(2, 32)
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
        return tensors, (a @ b) * (c @ d) / 2
    full = noise(96, 32)
    return {"diff": full}, full


@pytest.mark.parametrize("kind", ["LoKr", "LoKr, factored", "LoHa", "full"])
@pytest.mark.parametrize(
    "prefix",
    ["lora_unet_double_blocks_1_img_attn_qkv", "diffusion_model.double_blocks.1.img_attn.qkv"],
)
def test_lycoris_of_fused_matrices_is_shared_out_by_rows(kind: str, prefix: str) -> None:
    """Kronecker and Hadamard products cannot be cut, their plain factors can."""
    tensors, delta = qkv(kind, torch.Generator().manual_seed(2))
    expert = Expert.from_state_dict({f"{prefix}.{end}": value for end, value in tensors.items()}, name="dog")
    assert not expert.report.ignored
    found = expert.factors["transformer"]
    for k, x in enumerate("qkv"):
        factors = found[f"transformer_blocks.1.attn.to_{x}"]
        torch.testing.assert_close(factors.delta(), delta[32 * k : 32 * (k + 1)], rtol=1e-4, atol=1e-6)
    inject(make_flux(), [expert], MoLEConfig())


def test_lokr_as_simpletuner_names_it() -> None:
    first, second = torch.randn(8, 4), torch.randn(4, 8)
    name = "lycoris_transformer_blocks_0_attn_to_q"
    state = {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": torch.tensor(16.0)}
    expert = Expert.from_state_dict(state, name="dog")
    (factors,) = expert.factors["transformer"].values()
    torch.testing.assert_close(factors.delta(), torch.kron(first, second), rtol=1e-5, atol=1e-6)


def test_xlabs() -> None:
    """Processors of the makers' blocks: 1 is the image, 2 the text; no alphas."""
    draws = torch.Generator().manual_seed(3)
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (96, 32, ("attn.to_q", "attn.to_k", "attn.to_v")),
        "double_blocks.0.processor.qkv_lora2": (96, 32, tuple(f"attn.add_{x}_proj" for x in "qkv")),
        "double_blocks.0.processor.proj_lora1": (32, 32, ("attn.to_out.0",)),
        "double_blocks.0.processor.proj_lora2": (32, 32, ("attn.to_add_out",)),
        "single_blocks.1.processor.qkv_lora": (96, 32, ("attn.to_q", "attn.to_k", "attn.to_v")),
        "single_blocks.1.processor.proj_lora": (32, 160, ("proj_out",)),
    }
    state, deltas = {}, {}
    for name, (out, fan_in, leaves) in shapes.items():
        down, up = torch.randn(2, fan_in, generator=draws), torch.randn(out, 2, generator=draws)
        state |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        block = "transformer_blocks.0" if name.startswith("double") else "single_transformer_blocks.1"
        parts = (up @ down).chunk(len(leaves))
        deltas |= {f"{block}.{leaf}": part for leaf, part in zip(leaves, parts, strict=True)}
    expert = Expert.from_state_dict(state, name="dog")
    assert set(expert.report.loaded) == set(state)
    assert expert.report.dialects == ("XLabs, the makers' names",)
    found = expert.factors["transformer"]
    assert set(found) == set(deltas)
    for matrix, delta in deltas.items():
        torch.testing.assert_close(found[matrix].delta(), delta, rtol=1e-5, atol=1e-6)
    inject(make_flux(), [expert], MoLEConfig())


def test_a_file_at_a_quarter_strength_is_read_as_it_stands_and_said() -> None:
    """kohya's split_qkv=True stacks q, k, v and mlp under one alpha, which nobody multiplies."""
    draws = torch.Generator().manual_seed(4)
    downs = [torch.randn(2, 32, generator=draws) for _ in range(4)]
    ups = [torch.randn(rows, 2, generator=draws) for rows in (32, 32, 32, 128)]
    name = "lora_unet_single_blocks_0_linear1"
    state = {
        f"{name}.lora_down.weight": torch.cat(downs),
        f"{name}.lora_up.weight": torch.block_diag(*ups),
        f"{name}.alpha": torch.tensor(2.0),
    }
    expert = Expert.from_state_dict(state, name="dog")
    leaves = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    for leaf, up, down in zip(leaves, ups, downs, strict=True):
        factors = expert.factors["transformer"][f"single_transformer_blocks.0.{leaf}"]
        assert factors.rank == 2
        torch.testing.assert_close(factors.delta(), up @ down / 4, rtol=1e-5, atol=1e-6)
    assert any("split_qkv=True" in note and "0.25 of what each had" in note for note in expert.report.notes)


def test_alphas_that_stand_in_the_header_alone(tmp_path: Path) -> None:
    """As diffusers writes them."""
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    name = "transformer.transformer_blocks.0.attn.to_q"
    header = '{"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": ["to_q"]}'
    file = tmp_path / "dog.safetensors"
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        file,
        metadata={"format": "pt", "lora_adapter_metadata": header},
    )
    (factors,) = load_expert(file).factors["transformer"].values()
    torch.testing.assert_close(factors.delta(), up @ down / 2, rtol=1e-5, atol=1e-6)


def test_a_control_lora_is_refused_with_a_sentence() -> None:
    """It widens what the network reads, which no gate can do."""
    network = make_flux()
    state = {
        "img_in.lora_A.weight": torch.randn(2, 32),
        "img_in.lora_B.weight": torch.randn(32, 2),
        "img_in.lora_B.bias": torch.randn(32),
        "single_blocks.0.linear2.lora_A.weight": torch.randn(2, 160),
        "single_blocks.0.linear2.lora_B.weight": torch.randn(32, 2),
        "double_blocks.0.img_attn.norm.key_norm.scale": torch.randn(16),
    }
    expert = Expert.from_state_dict(state, name="depth")
    assert list(expert.report.ignored) == ["double_blocks.0.img_attn.norm.key_norm.scale"]
    with pytest.raises(InjectionError, match=r"'x_embedder': its delta is 32 x 32, the matrix 32 x 16"):
        inject(network, [expert], MoLEConfig())


@dataclass(frozen=True)
class Family:
    """A family and its makers' names, some of them for every kind.

    Attributes:
        make: a network of diffusers.
        family: what `inspect` calls it.
        native: the makers' name -> matrices of diffusers that are its rows.
        swapped: those of them whose halves change places.
    """

    make: Callable[[], nn.Module]
    family: str
    native: Native
    swapped: tuple[str, ...] = ()


def inside(rows: Mapping[str, str], block: Native) -> dict[str, tuple[str, ...]]:
    """Names of block 0 of rows of blocks: the makers' name of a row -> that of diffusers."""
    return {
        f"{theirs}.0.{name}": tuple(f"{ours}.0.{leaf}" for leaf in leaves)
        for theirs, ours in rows.items()
        for name, leaves in block.items()
    }


SD3_BLOCK: Native = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
}
Z_IMAGE_BLOCK: Native = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    **{f"feed_forward.w{x}": (f"feed_forward.w{x}",) for x in (1, 2, 3)},
}
FLUX2_DOUBLE: Native = {
    **{
        name: FLUX_DOUBLE[name] for name in ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj")
    },
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
OTHERS = {
    "flux.2": Family(
        make_flux2,
        "FLUX.2",
        {
            **inside({"double_blocks": "transformer_blocks"}, FLUX2_DOUBLE),
            **inside(
                {"single_blocks": "single_transformer_blocks"},
                {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
            ),
            "img_in": ("x_embedder",),
            "txt_in": ("context_embedder",),
            "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
            "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
            "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
            "single_stream_modulation.lin": ("single_stream_modulation.linear",),
            "final_layer.linear": ("proj_out",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        },
        ("final_layer.adaLN_modulation.1",),
    ),
    "sd3": Family(make_sd3, "Stable Diffusion 3", inside({"joint_blocks": "transformer_blocks"}, SD3_BLOCK)),
    "krea-2": Family(
        make_krea2,
        "Krea 2",
        {
            **inside(
                {
                    "blocks": "transformer_blocks",
                    "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
                    "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
                },
                {
                    **{f"attn.w{x}": (f"attn.to_{x}",) for x in "qkv"},
                    "attn.gate": ("attn.to_gate",),
                    "attn.wo": ("attn.to_out.0",),
                    **{f"mlp.{x}": (f"ff.{x}",) for x in ("gate", "up", "down")},
                },
            ),
            "first": ("img_in",),
            "last.linear": ("final_layer.linear",),
            "tmlp.0": ("time_embed.linear_1",),
            "tproj.1": ("time_mod_proj",),
            "txtmlp.3": ("txt_in.linear_2",),
            "txtfusion.projector": ("text_fusion.projector",),
        },
    ),
    "anima": Family(
        make_anima,
        "Anima",
        {
            **inside(
                {"blocks": "transformer_blocks"},
                {
                    **{f"self_attn.{x}_proj": (f"attn1.to_{x}",) for x in "qkv"},
                    **{f"cross_attn.{x}_proj": (f"attn2.to_{x}",) for x in "qkv"},
                    "self_attn.output_proj": ("attn1.to_out.0",),
                    "cross_attn.output_proj": ("attn2.to_out.0",),
                    "mlp.layer1": ("ff.net.0.proj",),
                    "mlp.layer2": ("ff.net.2",),
                    "adaln_modulation_self_attn.1": ("norm1.linear_1",),
                    "adaln_modulation_cross_attn.2": ("norm2.linear_2",),
                    "adaln_modulation_mlp.2": ("norm3.linear_2",),
                },
            ),
            "x_embedder.proj.1": ("patch_embed.proj",),
            "t_embedder.1.linear_2": ("time_embed.t_embedder.linear_2",),
            "final_layer.adaln_modulation.1": ("norm_out.linear_1",),
            "final_layer.linear": ("proj_out",),
        },
    ),
    "qwen-image": Family(
        make_qwen_image,
        "Qwen-Image",
        {
            f"{name}": (name,)
            for name in (
                *(
                    f"transformer_blocks.0.attn.{leaf}"
                    for leaf in ("to_q", "add_k_proj", "to_out.0", "to_add_out")
                ),
                *(
                    f"transformer_blocks.1.{leaf}"
                    for leaf in ("img_mod.1", "txt_mod.1", "txt_mlp.net.0.proj")
                ),
                *("transformer_blocks.1.img_mlp.net.2", "txt_in", "img_in", "proj_out", "norm_out.linear"),
            )
        },
    ),
    "z-image": Family(
        make_z_image,
        "Z-Image",
        {
            **inside({row: row for row in ("layers", "noise_refiner", "context_refiner")}, Z_IMAGE_BLOCK),
            "layers.1.adaLN_modulation.0": ("layers.1.adaLN_modulation.0",),
            "x_embedder": ("all_x_embedder.2-1",),
            "cap_embedder.1": ("cap_embedder.1",),
            "t_embedder.mlp.2": ("t_embedder.mlp.2",),
            "final_layer.linear": ("all_final_layer.2-1.linear",),
            "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        },
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, writer: str, tmp_path: Path) -> None:
    known, form = OTHERS[name], WRITERS[writer]
    network = known.make()
    names = known.native
    if not form.native:
        linear = (site.name for site in map_network(network).sites)
        names = {one: (one,) for one in linear if network.get_submodule(one).weight.dim() == 2}
    draws = torch.Generator().manual_seed(1)
    state, deltas = {}, {}
    for index, (module, matrices) in enumerate(names.items()):
        rows = [network.get_submodule(matrix).weight.shape[0] for matrix in matrices]
        fan_in = network.get_submodule(matrices[0]).weight.shape[1]
        rank = 1 + index % 3
        down = torch.randn(rank, fan_in, generator=draws) * 0.2
        up = torch.randn(sum(rows), rank, generator=draws) * 0.2
        state |= {f"{form.module(module)}{form.down}": down, f"{form.module(module)}{form.up}": up}
        delta = up @ down
        if form.alpha:
            state[f"{form.module(module)}.alpha"] = torch.tensor(0.5 * rank)
            delta = delta / 2
        if module in known.swapped:
            delta = delta.roll(len(delta) // 2, 0)
        deltas |= dict(zip(matrices, delta.split(rows), strict=True))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "dog.safetensors")
    expert = load_expert(tmp_path / "dog.safetensors")
    assert set(expert.report.loaded) == set(state)
    found = expert.factors["transformer"]
    assert set(found) == set(deltas)
    for matrix, delta in deltas.items():
        torch.testing.assert_close(found[matrix].delta(), delta, rtol=1e-5, atol=1e-6)
    expected = run(with_peft(network, {"dog": as_peft(deltas)}, {"dog": 1.0}))
    inject(network, [expert], MoLEConfig())
    assert_close(run(network), expected)
    # Qwen-Image's makers have the names of diffusers.
    makers = form.native and name != "qwen-image"
    check_told(tmp_path / "dog.safetensors", known.family, form, makers=makers)


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "LoHa", "full"])
def test_families_whose_makers_use_the_same_names_are_told_by_shapes(kind: str) -> None:
    """FLUX.1's `linear1` has seven times as many outputs as inputs, FLUX.2's nine times."""
    for factor, family, make in ((7, "FLUX.1", make_flux), (9, "FLUX.2", make_flux2)):
        draws = torch.Generator().manual_seed(2)
        rows = 32 * factor
        tensors = {
            "LoRA": {"lora_A.weight": (2, 32), "lora_B.weight": (rows, 2)},
            "LoKr": {"lokr_w1": (8, 8), "lokr_w2_a": (rows // 8, 2), "lokr_w2_b": (2, 4)},
            "LoHa": {
                **{f"hada_w{x}_a": (rows, 2) for x in (1, 2)},
                **{f"hada_w{x}_b": (2, 32) for x in (1, 2)},
            },
            "full": {"diff": (rows, 32)},
        }[kind]
        state = {
            f"diffusion_model.single_blocks.1.linear1.{end}": torch.randn(*shape, generator=draws) * 0.5
            for end, shape in tensors.items()
        }
        expert = Expert.from_state_dict(state, name="dog")
        assert base_of_expert(expert).family == family
        network = make()
        before = run(network)
        inject(network, [expert], MoLEConfig())
        assert differs(run(network), before)
    # With names of attention in double blocks alone a file is for either.
    state = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(1, 32),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(96, 1),
    }
    expert = Expert.from_state_dict(state, name="dog")
    for network in (make_flux(), make_flux2()):
        inject(network, [expert], MoLEConfig()).eject()


def test_second_attentions_are_told_by_what_they_read() -> None:
    """Anima's read the text, of another width; those of SD 3.5 medium the image again."""
    for make, family in ((make_anima, "Anima"), (make_sd3, "Stable Diffusion 3")):
        network = make()
        state = {}
        for leaf in ("attn2.to_k", "ff.net.2"):
            rows, columns = network.get_submodule(f"transformer_blocks.0.{leaf}").weight.shape
            name = f"transformer.transformer_blocks.0.{leaf}"
            state |= {
                f"{name}.lora_A.weight": torch.ones(2, columns),
                f"{name}.lora_B.weight": torch.ones(rows, 2),
            }
        expert = Expert.from_state_dict(state, name="dog")
        assert base_of_expert(expert).family == family
        inject(network, [expert], MoLEConfig())


def test_what_is_no_lora_is_told_by_name() -> None:
    name = "transformer.transformer_blocks.0.attn"
    odd = {
        f"{name}.to_k.oft_blocks": "OFT changes the base's weights by a factor",
        f"{name}.to_v.a1.weight": "GLoRA",
        f"{name}.to_out.0.on_input": "(IA)^3",
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm.w_norm": "normalisation layers",
    }
    pair = {f"{name}.to_q.lora_A.weight": torch.ones(2, 32), f"{name}.to_q.lora_B.weight": torch.ones(32, 2)}
    expert = Expert.from_state_dict(pair | {key: torch.ones(2, 4, 4) for key in odd}, name="dog")
    assert set(expert.report.loaded) == set(pair)
    assert set(expert.report.ignored) == set(odd)
    for key, reason in odd.items():
        assert reason in expert.report.ignored[key]

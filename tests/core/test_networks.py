"""The registry of networks: whose names a file has, and which kind a network is."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from tiny.joint_table import JOINT_TABLE
from tiny.networks import make_joint
from torch import Tensor, nn

from mole_diffusion import Expert
from mole_diffusion.core import networks
from mole_diffusion.core.keys import factor_keys, parse_key, parse_keys
from mole_diffusion.core.networks import families, foreign
from mole_diffusion.core.networks.base import Forward
from mole_diffusion.core.networks.stacks import Blocks, Leaf, Stack


@pytest.fixture
def cousin() -> Iterator[Stack]:
    """Another network that has blocks of the joint network's name, with leaves of its own too."""
    row = Blocks("joined", (Leaf("attn.to_q"), Leaf("attn.to_k"), Leaf("ff.up"), Leaf("ff.down")))
    table = dataclasses.replace(JOINT_TABLE, name="cousin", blocks=(row,), before=(), after=())
    networks.register(table)
    yield table
    networks.unregister("cousin")


def pair(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}


def test_the_kind_that_knows_more_of_a_file_is_meant(cousin: Stack) -> None:
    shared = pair("transformer.joined.0.attn.to_q")
    ours = shared | pair("transformer.joined.0.attn.to_v") | pair("transformer.joined.0.narrow")
    theirs = shared | pair("transformer.joined.0.ff.up") | pair("transformer.joined.0.ff.down")
    for state, kind in ((ours, "joint"), (theirs, "cousin"), (shared, "joint")):
        assert {parsed.architecture for parsed in parse_keys(state).values()} == {kind}
        expert = Expert.from_state_dict(state, name="dog")
        assert expert.architectures == {"transformer": kind}
        assert set(expert.report.loaded) == set(state)
    # Both know the name; alone it belongs to whom is asked first.
    assert parse_key("transformer.joined.0.attn.to_q.lora_A.weight").architecture == "joint"


def test_registering() -> None:
    assert networks.by_name("joint") is JOINT_TABLE
    networks.register(JOINT_TABLE)
    with pytest.raises(ValueError, match="an architecture named 'joint' is registered already"):
        networks.register(dataclasses.replace(JOINT_TABLE))
    assert networks.by_name("gone") is None
    networks.unregister("gone")


def test_names_go_both_ways() -> None:
    matrices = {
        "unet": "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
        "text_encoder": "encoder.layers.3.mlp.fc1",
        "text_encoder_2": "text_projection",
        "transformer": "apart.0.text.to_k",
    }
    leaves = {"unet": "attn1.to_out.0", "text_encoder": "mlp.fc1", "transformer": "text.to_k"}
    for slot, matrix in matrices.items():
        for dialect in ("diffusers", "kohya"):
            for key in factor_keys(slot, matrix, dialect, xl=True).values():
                parsed = parse_key(key)
                assert (parsed.network, parsed.matrix) == (slot, matrix)
        architecture = networks.of_matrices([matrix])
        assert architecture is not None
        assert slot in architecture.slots
        assert architecture.leaf(matrix) == leaves.get(slot, matrix)
    assert networks.of_matrices(["somewhere.else"]) is None


def test_a_network_under_the_names_of_another_host() -> None:
    """Rows of blocks, leaves and matrices outside may have other names, and the whole a module around it."""
    blocks = JOINT_TABLE.blocks
    row = dataclasses.replace(
        blocks[1], also=("single",), names={**blocks[1].names, "attn.proj": "attn.out", "mlp.up": "wide"}
    )
    table = dataclasses.replace(
        JOINT_TABLE, name="natively", blocks=(blocks[0], row), names={"img_in": "image_in"}
    )
    network = nn.Module()
    network.inner = make_joint()
    network.inner.single, network.inner.img_in = network.inner.joined, network.inner.image_in
    del network.inner.joined, network.inner.image_in
    for block in network.inner.single:
        block.attn.proj, block.mlp = block.attn.out, nn.ModuleDict({"up": block.wide})
        del block.attn.out, block.wide
    sites = {site.name: site for site in table.sites(network)}
    assert set(sites) == {site.name for site in JOINT_TABLE.sites(make_joint())}
    assert list(sites) == [site.name for site in JOINT_TABLE.sites(make_joint())]
    assert sites["joined.1.attn.to_k"].path == "inner.single.1.attn.qkv"
    assert sites["joined.1.attn.to_k"].rows == slice(16, 32)
    assert sites["joined.0.wide"].path == "inner.single.0.mlp.up"
    assert sites["image_in"].path == "inner.img_in"
    for flat, matrix in (("single_1_attn_proj", "joined.1.attn.out"), ("img_in", "image_in")):
        assert [place.matrix for place in table.read(flat)] == [matrix]


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["double_blocks_0_img_attn_qkv", "double_blocks_0_txt_mlp_0"], families.FLUX1),
        (
            ["transformer_single_transformer_blocks_3_attn_to_q", "transformer_blocks_0_ff_context_net_2"],
            families.FLUX1,
        ),
        (["transformer_blocks_0_attn_add_q_proj", "transformer_blocks_0_attn_to_q"], families.SD3),
        (["joint_blocks_0_x_block_attn_qkv"], families.SD3),
        (["double_blocks_0_img_attn_qkv", "double_stream_modulation_img_lin"], families.FLUX2),
        (["double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_fc1"], families.HUNYUAN_VIDEO),
        (["transformer_blocks_0_attn_to_q", "transformer_blocks_0_img_mlp_net_0_proj"], families.QWEN_IMAGE),
        (["layers_0_attention_to_q", "layers_0_feed_forward_w1"], families.Z_IMAGE),
        (["blocks_0_self_attn_q", "blocks_0_ffn_0"], families.WAN),
        (["blocks_0_self_attn_q_proj", "llm_adapter_blocks_0_self_attn_q_proj"], families.ANIMA),
        (["blocks_0_attn_wq"], families.KREA2),
        (["down_blocks_0_attentions_0_transformer_blocks_0_attn2_somewhere", "lora_te1_whatever"], None),
        ([], None),
    ],
)
def test_families_without_an_architecture_are_told_by_names(names: list[str], family: str | None) -> None:
    assert foreign.foreign_family(names) == family


def test_timesteps_of_every_unit() -> None:
    assert Forward(time=250, noise=1000.0).timestep == 0.25
    assert Forward(time=0.25).timestep == 0.25
    assert Forward(time=0.25, clean=1.0, noise=0.0).timestep == 0.75
    assert Forward().timestep is None
    steps = torch.arange(1000)
    found = Forward(time=steps, noise=1000.0).timestep
    assert isinstance(found, Tensor)
    assert torch.equal(found, steps.float() / 1000)


# What only a UNet has, and what only CLIP has; outside of the networks' room, what any of them has.
UNET_WORDS = (
    r"unet|(?:down|up)_blocks|mid_block|(?:input|output)_blocks|middle_block|attn[12]\b|attentions|resnets"
    r"|(?:down|up)samplers?\b|time_emb|conv_in|add_embedding|proj_in"
)
CLIP_WORDS = (
    r"text_model|text_encoder|resblocks|clip_[lg]\b|\btext_projection|self_attn|\b[qkv]_proj|out_proj"
)
BLOCK_WORDS = r"transformer_blocks|(?:double|single)_blocks|\bfc[12]\b"
CORE = Path(networks.__file__).parents[1]


def words(pattern: str, files: Iterable[Path]) -> list[str]:
    """Where a word stands in these files."""
    return [
        f"{path.relative_to(CORE)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]


def test_each_network_is_told_of_in_its_own_file_alone() -> None:
    files = set(CORE.rglob("*.py"))
    room = set((CORE / "networks").rglob("*.py"))
    unet = set((CORE / "networks" / "unet").rglob("*.py"))
    clip, foreign_names = CORE / "networks" / "clip.py", CORE / "networks" / "foreign.py"
    registry = CORE / "networks" / "__init__.py"
    # Trainers call every denoiser a unet.
    transformers = CORE / "networks" / "transformers.py"
    assert len(files) > len(room) > len(unet) > 1
    assert words(f"{UNET_WORDS}|{CLIP_WORDS}|{BLOCK_WORDS}", files - room) == []
    # Three transformers have some of these names themselves.
    sd3, krea2, anima = (CORE / "networks" / f"{name}.py" for name in ("sd3", "krea2", "anima"))
    assert words(UNET_WORDS, room - unet - {registry, transformers, sd3, krea2, anima}) == []
    assert words(UNET_WORDS.replace("attn[12]", "attn1"), {sd3}) == []
    assert words(UNET_WORDS.replace("|time_emb", ""), {krea2}) == []
    assert (
        words(UNET_WORDS.replace("|time_emb", "").replace(r"|attn[12]\b", "").replace("unet|", ""), {anima})
        == []
    )
    assert words(CLIP_WORDS, room - unet - {clip, foreign_names, anima}) == []
    assert words(CLIP_WORDS.replace("|self_attn", ""), {anima}) == []
    # The registry names the kinds and no more; the search does find what it looks for.
    assert len(words(UNET_WORDS, {registry})) == 2
    assert words(UNET_WORDS, unet)
    assert words(CLIP_WORDS, {clip})


def test_no_name_of_a_part_decides() -> None:
    """What a host calls a network says nothing of what it is."""
    compared = [
        f"{path.name}:{node.lineno}"
        for path in CORE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops)
        for side in (node.left, *node.comparators)
        if ast.unparse(side).split(".")[-1] in ("part", "slot", "network")
    ]
    assert compared == []

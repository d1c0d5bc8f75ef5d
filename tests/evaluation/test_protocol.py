"""Protocols: what ships, what is refused and how, and what a set of experts becomes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import ConfigError, MoLEConfig, UnknownExpertError
from mole_diffusion.evaluation.pictures.protocol import load_protocol, shipped_protocols
from mole_diffusion.evaluation.pictures.sets import fill, make_scene
from mole_diffusion.evaluation.pictures.stage import check_methods
from mole_diffusion.pictures.training import TrainingConfig
from tools.starter.world import TRIPLES

Write = Callable[..., Path]


def test_shipped_protocols_can_be_read_and_name_methods_that_exist() -> None:
    assert {"paper", "starter"} <= set(shipped_protocols())
    for name in shipped_protocols():
        check_methods(load_protocol(name))
    for name in ("paper", "starter"):
        protocol = load_protocol(name)
        assert (len(protocol.sets), len(protocol.prompts)) == (15, 5)


def test_the_starters_protocol_is_the_papers_triples() -> None:
    protocol = load_protocol("starter")
    assert tuple(chosen.experts for chosen in protocol.sets) == TRIPLES
    assert protocol.seeds.count == 20
    scene = make_scene(protocol, protocol.sets[0])
    assert scene.prompts[0] == "a zorin boot, a vekka monster and a kipra clock on the beach"
    assert scene.class_prompts[0] == "a boot, a monster and a clock on the beach"
    assert scene.captions(0) == {
        "text": scene.class_prompts[0],
        "described": "a glossy 3d boot, a glossy 3d monster and a glossy 3d clock on the beach",
    }
    assert scene.captions(0, "clock")["described"] == "a boot, a monster and a glossy 3d clock on the beach"
    assert scene.alone_prompt(0, "clock") == "a boot, a monster and a kipra clock on the beach"
    assert [len(concept.references) for concept in scene.concepts.values()] == [5, 5, 5]
    assert [len(concept.references) for concept in scene.training_concepts(1).values()] == [1, 1, 1]


def test_variants_change_settings_of_gates_and_training(write_protocol: Write) -> None:
    methods: list[Any] = [
        {"name": "paper", "base": "gates", "mole": {"preset": "paper"}, "training": {"preset": "paper"}},
        {"name": "pooled", "base": "gates", "mole": {"pooling": "mean"}, "training": {"iterations": 7}},
        {"name": "nla", "seeds": 2},
    ]
    protocol = load_protocol(write_protocol(methods=methods, training={}, masks=[]))
    paper, pooled, nla = protocol.methods
    assert protocol.mole_config(paper) == MoLEConfig.paper()
    assert protocol.training_config(paper) == TrainingConfig.paper(progress=False)
    assert protocol.mole_config(pooled) == MoLEConfig(pooling="mean")
    assert protocol.training_config(pooled).iterations == 7
    assert (pooled.kind, nla.kind) == ("gates", "nla")
    assert list(protocol.method_seeds(nla)) == [0, 1]


def test_a_protocol_extends_another(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("extends: ablation\nsteps: 3\ntraining: {iterations: 7}\n")
    (tmp_path / "own" / "more.yaml").write_text("extends: mine.yaml\nmethods: [nla, la]\n")
    shipped = load_protocol("ablation")
    mine, more = (load_protocol(tmp_path / "own" / f"{name}.yaml") for name in ("mine", "more"))
    assert mine == shipped.model_copy(update={"steps": 3, "training": {"iterations": 7}})
    assert more.steps == 3
    assert [method.name for method in more.methods] == ["nla", "la"]


@pytest.mark.parametrize(
    ("extended", "message"),
    [("b.yaml", "a.yaml extends itself, by way of a.yaml, b.yaml"), ("lost", "'lost' is neither a file nor")],
)
def test_a_protocol_that_extends_nothing_is_refused(tmp_path: Path, extended: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {extended}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=message):
        load_protocol(tmp_path / "a.yaml")


def test_a_run_can_be_restricted(write_protocol: Write) -> None:
    whole = load_protocol(write_protocol())
    part = whole.restricted(("cat+clock",), ("nla", "few"), 1)
    assert [chosen.label for chosen in part.sets] == ["cat+clock"]
    assert [method.name for method in part.methods] == ["nla", "few"]
    assert list(part.seeds.all) == [0]
    assert whole.restricted(None, None, None) == whole
    with pytest.raises(ConfigError, match=r"no set \['dog'\] in the protocol; it has \['boot\+cat'"):
        whole.restricted(("dog",), None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, r"stepz: unknown; allowed: title, note, model"),
        ({"seeds": {"number": 3}}, r"seeds.number: unknown; allowed: count, first"),
        (
            {"methods": [{"name": "x", "kind": "la"}]},
            r"methods.0.kind: unknown; allowed: name, base, of, mole",
        ),
        ({"steps": 0}, r"steps: .* got 0"),
        ({"sets": [[]]}, r"sets.0.experts"),
        ({"sets": [["boot", "boot"]]}, r"set 'boot\+boot': \['boot'\] more than once"),
        ({"methods": ["la", "la"]}, r"methods: \['la'\] more than once"),
        ({"prompts": ["a boot at night"]}, r"'a boot at night' names no expert; write \{all\} or \{0\}"),
        (
            {"prompts": ["{2} at night"]},
            r"'\{2\} at night' cannot be filled .* allowed are \{all\} and \{0\} to",
        ),
        (
            {"methods": [{"name": "x", "base": "gates", "mole": {"pool": 1}}], "masks": []},
            r"Unknown settings pool",
        ),
        ({"mole": {"preset": "best"}}, r"preset 'best'; allowed are 'paper' and 'uniform'"),
        (
            {"methods": [{"name": "x", "base": "auto", "auto": {"word": 1}}], "masks": []},
            r"x: auto has \['word'\]; allowed are \['words'",
        ),
        (
            {"methods": [{"name": "x", "base": "la", "auto": {"words": 1}}], "masks": []},
            r"x: auto has \['words'\]; allowed are .* for 'auto' alone",
        ),
        ({"masks": ["nla"]}, r"masks names \['nla'\]; allowed are \['few'\]"),
        ({"sheet": ["boot+dog"]}, r"sheet names \['boot\+dog'\]; allowed are \['boot\+cat', 'cat\+clock'\]"),
        ({"methods": ["masked", "gates"], "masks": ["few"]}, r"masks names"),
        (
            {"methods": [{"name": "masked", "of": "la"}], "masks": []},
            r"of 'la', which is no method with gates",
        ),
        ({"training": {"objective": "luck"}}, r"objective is 'luck'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    write_protocol: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_protocol(write_protocol(**changes))


def test_files_that_are_no_protocol_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor one of those that ship: \["):
        load_protocol("startr")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds list; allowed is a mapping"):
        load_protocol(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_protocol(tmp_path / "broken.yaml")


def test_unknown_experts_methods_and_pictures_are_named(write_protocol: Write, tmp_path: Path) -> None:
    protocol = load_protocol(write_protocol(sets=[["boot", "dog"]]))
    with pytest.raises(UnknownExpertError, match="'dog'"):
        make_scene(protocol, protocol.sets[0])
    with pytest.raises(ConfigError, match="method 'best': base 'best' does not exist; allowed are"):
        check_methods(load_protocol(write_protocol(methods=["best"], masks=[])))
    guessed = {"name": "ties", "options": {"dense": 0.5}}
    with pytest.raises(ConfigError, match=r"'ties': unknown options \['dense'\]; allowed are \['weights'"):
        check_methods(load_protocol(write_protocol(methods=[guessed], masks=[])))
    lost = load_protocol(write_protocol()).experts["boot"].model_copy(update={"references": str(tmp_path)})
    protocol = load_protocol(write_protocol()).model_copy(update={"experts": {"boot": lost, "cat": lost}})
    with pytest.raises(ConfigError, match="references of 'boot': no pictures"):
        make_scene(protocol, protocol.sets[0])


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{0} and {1} at night {2}", "a boot and a cat at night"),
        ("photo, {2}, {0}, {2}, {1}", "photo, a boot, a cat"),
        ("{2}, {all} at night", "a boot and a cat at night"),
    ],
)
def test_a_style_without_class_words_leaves_no_gap(template: str, filled: str) -> None:
    assert fill(template, ["a boot", "a cat", ""]) == filled


def test_the_protocol_of_styles_asks_for_each_expert_alone() -> None:
    protocol = load_protocol("styles")
    assert len(protocol.sets) == 10
    scene = make_scene(protocol, protocol.sets[0])
    assert [concept.kind for concept in scene.concepts.values()] == ["subject", "subject", "style"]
    assert scene.prompts[0] == "a zorin boot and a fenna cat on the beach in zaphel style"
    assert scene.alone_prompt(0, "boot") == "a zorin boot and a cat on the beach"
    assert scene.alone_prompt(0, "sketch") == "a boot and a cat on the beach in zaphel style"
    two = load_protocol("styles-two")
    assert make_scene(two, two.sets[0]).named(1) == ("cat", "neon")


def test_composlora_has_five_kinds_of_experts() -> None:
    protocol = load_protocol("composlora")
    kinds = {name: source.kind for name, source in protocol.experts.items()}
    assert {name.split("_")[0]: kind for name, kind in kinds.items()} == {
        "character": "subject",
        "clothing": "garment",
        "style": "style",
        "background": "style",
        "object": "garment",
    }
    assert all(len(entry.experts) == 5 for entry in protocol.sets)

"""Concepts in prompts: triggers, class words, and who stands where."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from mole_diffusion.app.setup import ExpertCard
from mole_diffusion.app.training import concept_of
from mole_diffusion.commands.train_gates import parse_concepts
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.phrases import read_concept
from mole_diffusion.pictures.demo import concepts_of
from mole_diffusion.pictures.training.concepts import (
    Concept,
    as_concepts,
    concepts_from_experts,
    read_prompt,
    read_prompts,
)
from mole_diffusion.starter import starter_experts

BOOT = Concept("boot", "a zorin boot", "a boot")
CAT = Concept("cat", "a vim cat", "a cat")
APPLE = Concept("apple", "a kol apple", "an apple")
ALL = {concept.name: concept for concept in (BOOT, CAT, APPLE)}


def only(*names: str) -> dict[str, Concept]:
    return {name: ALL[name] for name in names}


@pytest.mark.parametrize(
    ("text", "with_triggers", "class_text", "order"),
    [
        ("a zorin boot and a vim cat", "a zorin boot and a vim cat", "a boot and a cat", ("boot", "cat")),
        ("a cat and a boot", "a vim cat and a zorin boot", "a cat and a boot", ("cat", "boot")),
        ("the boot and A CAT", "the zorin boot and a vim cat", "the boot and a cat", ("boot", "cat")),
        ("a zorin boot, a cat", "a zorin boot, a vim cat", "a boot, a cat", ("boot", "cat")),
        (
            "my zorin boots, a zorin boot, cat",
            "my zorin boots, a zorin boot, vim cat",
            "my zorin boots, a boot, cat",
            None,
        ),
    ],
)
def test_triggers_go_in_and_come_out(
    text: str, with_triggers: str, class_text: str, order: tuple[str, ...] | None
) -> None:
    (prompt,) = read_prompts(text, only("boot", "cat"))
    assert prompt.text == with_triggers
    assert prompt.class_text == class_text
    assert prompt.order == (order or ("boot", "cat"))


def test_articles_follow_the_class_word() -> None:
    (prompt,) = read_prompts("a kol apple at night", only("apple"))
    assert prompt.class_text == "an apple at night"
    (prompt,) = read_prompts("an apple at night", only("apple"))
    assert prompt.text == "a kol apple at night"


def test_one_concept_of_a_prompt_keeps_the_rest() -> None:
    (prompt,) = read_prompts("photo of a zorin boot, a vim cat and a kol apple on the beach", ALL)
    assert prompt.only(["cat"]) == "photo of a vim cat on the beach"
    assert prompt.single_class(APPLE) == "photo of an apple on the beach"


def test_a_part_of_a_prompt_is_a_list() -> None:
    text = "photo of a zorin boot, a vim cat and, behind them, a kol apple on the beach"
    (prompt,) = read_prompts(text, ALL)
    assert prompt.only(["apple", "boot"]) == "photo of a zorin boot and a kol apple on the beach"
    assert prompt.only({"cat", "boot"}) == "photo of a zorin boot and a vim cat on the beach"
    assert prompt.only(prompt.order) == text


def test_two_experts_of_one_class() -> None:
    twins = {"one": Concept("one", "a zorin cat", "a cat"), "two": Concept("two", "a vim cat", "a cat")}
    (prompt,) = read_prompts("a cat and a cat", twins)
    assert prompt.text == "a zorin cat and a vim cat"
    assert prompt.class_text == "a cat and a cat"


def test_prompts_may_share_the_concepts_among_them() -> None:
    first, second = read_prompts(["a boot", "a cat at night"], only("boot", "cat"))
    assert (first.order, second.order) == (("boot",), ("cat",))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        ("a dog", "prompt 'a dog' has no concept; it should have 'a zorin boot' or 'a boot', 'a vim cat'"),
        ("a boot", "concept 'cat' is in no prompt: write 'a vim cat' or 'a cat' in one of ['a boot']"),
    ],
)
def test_prompts_that_do_not_fit(prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_prompts(prompts, only("boot", "cat"))


def test_forms_of_concepts() -> None:
    found = as_concepts(
        {"cat": "a vim cat", "boot": {"text": "the zorin red boot", "class_text": "a boot"}}, ["boot", "cat"]
    )
    assert list(found) == ["boot", "cat"]
    assert found["cat"] == Concept("cat", "a vim cat", "a cat")
    assert found["boot"].class_text == "a boot"
    assert as_concepts([BOOT], ["boot"]) == {"boot": BOOT}


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ({"dog": "a dog"}, "without expert: ['dog'], without concept: ['boot']"),
        ({"boot": {"trigger": "zorin"}}, "concepts['boot'] has unknown fields ['trigger']"),
        ({"boot": {"class_text": "a boot"}}, "concepts['boot'] has no 'text'"),
        ({"boot": CAT}, "concepts['boot'] is the concept of 'cat'"),
        ({"boot": " "}, "text of concept 'boot' is ' '"),
        (
            {"boot": {"text": "a zorin boot", "references": ["boot.png"]}},
            "references of concept 'boot' have 'boot.png'",
        ),
    ],
)
def test_concepts_that_do_not_fit(concepts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        as_concepts(concepts, ["boot"])


def test_concepts_from_the_files_of_experts(pipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"experts \['boot', 'cat'\] name no trigger"):
        concepts_from_experts(pipe.experts)


def test_a_line_of_no_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind is 'pose'; allowed are subject, style, garment"):
        read_concept("run = a running zim | a man | pose")


@pytest.mark.parametrize(
    ("concept", "kind"),
    [
        (BOOT, "subject"),
        (Concept("ink", "in inky style", ""), "style"),
        (Concept("ink", "in the style of inky", ""), "style"),
        (Concept("ink", "inkart", "", kind="style"), "style"),
        (Concept("jeans", "old style jeans", "jeans"), "subject"),
    ],
)
def test_what_a_concept_changes(concept: Concept, kind: str) -> None:
    assert concept.kind == kind


def test_a_concept_of_no_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind of concept 'boot' is 'pose'; allowed are subject, style"):
        Concept("boot", "a zorin boot", "a boot", kind="pose")


def test_kinds_from_the_files_of_experts(pipe: Any) -> None:
    def told(**metadata: str) -> Concept:
        expert = replace(pipe.experts["boot"], metadata={f"mole.{k}": v for k, v in metadata.items()})
        return concepts_from_experts({"boot": expert})["boot"]

    assert told(trigger="inkart", kind="style") == Concept("boot", "inkart", "", kind="style")
    assert told(trigger="inky style") == Concept("boot", "inky style", "", kind="style")
    assert told(trigger="zorin boot", kind="concept") == Concept("boot", "a zorin boot", "a boot")
    assert told(trigger="zorin boot", kind="merged").kind == "subject"


def test_kinds_from_the_starters_catalogue() -> None:
    known = concepts_of({name: starter_experts()[name] for name in ("boot", "sketch")})
    assert [(c.kind, c.class_text) for c in known.values()] == [("subject", "a boot"), ("style", "")]
    prompt = "a zorin boot at night in zaphel style"
    assert read_prompt(prompt, known).together("boot") == ("boot", "sketch")


INK, GLOW = Concept("ink", "in inky style", ""), Concept("glow", "glowy style", "in a glowing style")
SCARF = Concept("scarf", "a zim scarf", "a scarf", kind="garment")
STYLED = {concept.name: concept for concept in (BOOT, CAT, SCARF, INK, GLOW)}


@pytest.mark.parametrize(
    ("text", "class_text", "boot", "nothing"),
    [
        (
            "a boot and a cat at night in inky style",
            "a boot and a cat at night",
            "a zorin boot at night in inky style",
            "a zorin boot and a vim cat at night",
        ),
        (
            "in inky style, a boot and a cat",
            "a boot and a cat",
            "in inky style, a zorin boot",
            "a zorin boot and a vim cat",
        ),
        (
            "a boot in inky style and a cat, in glowy style, at night",
            "a boot and a cat, in a glowing style, at night",
            "a zorin boot in inky style, in glowy style, at night",
            "a zorin boot and a vim cat, at night",
        ),
    ],
)
def test_styles_stay_with_every_subject(text: str, class_text: str, boot: str, nothing: str) -> None:
    prompt = read_prompt(text, STYLED)
    assert prompt.class_text == class_text
    assert prompt.subjects == ("boot", "cat")
    assert prompt.together("boot") == ("boot", *prompt.styles)
    assert prompt.only(prompt.together("boot")) == boot
    assert prompt.only(prompt.subjects) == nothing
    words = prompt.single_class(CAT, prompt.styles)
    assert words == boot.replace("a zorin boot", "a cat")
    assert prompt.single_class(CAT) == nothing.replace("a zorin boot and a vim cat", "a cat")


@pytest.mark.parametrize(
    "text", ["a zorin boot wearing a zim scarf and a vim cat", "a zim scarf on a zorin boot and a vim cat"]
)
def test_a_garment_shares_the_place_of_its_subject(text: str) -> None:
    prompt = read_prompt(text, STYLED)
    assert prompt.subjects == ("boot", "cat")
    assert prompt.together("boot") == ("boot", "scarf")
    assert prompt.only(["boot", "scarf"]) == text.removesuffix(" and a vim cat")
    assert prompt.only(["boot", "cat"]) == "a zorin boot and a vim cat"


def test_a_style_that_no_prompt_names() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("'ink' is in no prompt: write 'in inky style' in one of")
    ):
        read_prompts("a boot", {"boot": BOOT, "ink": INK})


LINES = [
    ("boot=a zorin boot|a boot", ("boot", "a zorin boot", "a boot", "subject")),
    ("  boot = a zorin boot |  a shoe ", ("boot", "a zorin boot", "a shoe", "subject")),
    ("boot = a zorin boot", ("boot", "a zorin boot", "a boot", "subject")),
    ("boot = the old zorin boot |", ("boot", "the old zorin boot", "the boot", "subject")),
    ("boot = zorin boot", ("boot", "zorin boot", "boot", "subject")),
    ("boot = a = b", ("boot", "a = b", "a b", "subject")),
    ("ink = inkart || style", ("ink", "inkart", "", "style")),
    ("ink = in inky style", ("ink", "in inky style", "", "style")),
    ("scarf = a zim scarf | a scarf | garment", ("scarf", "a zim scarf", "a scarf", "garment")),
]
NOTHING = ["", "boot", "= a boot", "boot =", "boot = | a boot"]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_a_line_means_the_same_to_every_host(line: str, expected: tuple[str, str, str, str]) -> None:
    name, text, class_text, kind = expected
    assert read_concept(line) == expected
    assert parse_concepts([line]) == {name: (text, class_text, kind)}
    card = ExpertCard(name=name, path=Path("boot.safetensors"), text=text)
    if "|" not in line:
        assert concept_of(card) == Concept(name, text, class_text, [], kind)
        assert as_concepts({name: text}, [name]) == {name: Concept(name, text, class_text)}


@pytest.mark.parametrize("line", NOTHING)
def test_lines_that_say_nothing_are_refused_by_every_host(line: str) -> None:
    for read, error in (
        (read_concept, ConfigError),
        (lambda text: parse_concepts([text]), typer.BadParameter),
    ):
        with pytest.raises(error, match="does not say what an expert knows; write NAME = TEXT"):
            read(line)


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_the_tab_of_the_web_ui_hands_lines_on_to_the_command_line(
    line: str, expected: tuple[str, str, str, str]
) -> None:
    pytest.importorskip("gradio")
    from webui_extension.training_text import concept

    assert parse_concepts([concept(line)]) == {expected[0]: expected[1:]}


@pytest.mark.parametrize("line", NOTHING)
def test_the_tab_of_the_web_ui_refuses_lines_that_say_nothing(line: str) -> None:
    pytest.importorskip("gradio")
    from webui_extension.settings import SettingsError
    from webui_extension.training_text import concept

    with pytest.raises(SettingsError, match="does not say what an expert knows; write NAME = TEXT"):
        concept(line)

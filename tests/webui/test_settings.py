"""One object behind panel, PNG info, API and plot: every field, every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from webui_extension.settings import (
    NAMED_REGIONS,
    ExpertSetting,
    Settings,
    SettingsError,
    format_region,
    parse_region,
)

FULL = Settings(
    True,
    (
        ExpertSetting("dog", 0.5, True, (0.0, 0.0, 0.5, 1.0)),
        ExpertSetting("animals/fox: red, v1", -1.25, False),
        ExpertSetting("cat", 1.0, True, (0.1, 0.2, 0.3, 0.4)),
    ),
    "dog+cat, best",
)


@pytest.mark.parametrize(
    "way",
    [
        lambda s: Settings.from_dict(s.to_dict()),
        lambda s: Settings.from_dict(json.loads(json.dumps(s.to_dict()))),
        lambda s: Settings.from_args(s.to_args(5)),
        lambda s: Settings.from_args([s.to_dict()]),
        lambda s: Settings.from_infotext(s.to_infotext()),
    ],
    ids=["dict", "json", "args", "api", "infotext"],
)
@pytest.mark.parametrize(
    "settings",
    [
        FULL,
        Settings(True, (ExpertSetting("dog"),)),
        Settings(True, FULL.experts[::-1], "both"),
        Settings(),
    ],
)
def test_round_trips(settings: Settings, way: Callable[[Settings], Settings]) -> None:
    assert way(settings) == settings


def test_infotext_reads_well() -> None:
    assert FULL.to_infotext() == {
        "MoLE experts": "dog: 0.5 | animals/fox: red, v1: -1.25 | cat: 1",
        "MoLE gates": "dog+cat, best",
        "MoLE active": "dog | cat",
        "MoLE regions": "dog: left half | cat: 0.1 0.2 0.3 0.4",
    }
    assert Settings().to_infotext() == {}


def test_the_api_takes_short_forms() -> None:
    short = Settings.from_args([{"experts": {"dog": 0.5, "cat": 1}}])
    assert short == Settings(True, (ExpertSetting("dog", 0.5), ExpertSetting("cat")))
    assert Settings.from_args([{"experts": ["dog"]}]).experts == (ExpertSetting("dog"),)
    assert not Settings.from_args([{"enabled": False, "experts": ["dog"]}]).enabled
    # A program may send fewer arguments than the panel has.
    partly = Settings.from_args(["True", "uniform", True, True, "dog", 0.5])
    assert partly.experts == (ExpertSetting("dog", 0.5),)


def test_without_a_gates_file_the_prompt_decides_unless_equal_shares_are_asked_for() -> None:
    """In every form: what is left out, and what older pictures say."""
    one = {"experts": ["dog"]}
    assert Settings.from_args([one]).gates == Settings.from_args([{**one, "gates": ""}]).gates == "auto"
    assert Settings.from_args([True, None, True, True, "dog"]).gates == "auto"
    assert Settings.from_infotext({"MoLE experts": "dog: 1"}).gates == "auto"
    for word in ("uniform", "equal shares"):
        equal = Settings.from_args([{**one, "gates": word}])
        assert equal.to_infotext()["MoLE gates"] == "equal shares"
        assert Settings.from_infotext({"MoLE experts": "dog: 1", "MoLE gates": word}) == equal
        assert Settings.from_args([one]).with_gates(word) == equal


def test_the_panel_switched_off_may_hold_anything() -> None:
    assert Settings.from_args([False, None, None, None, "dog", "loud", "nowhere"]) == Settings()
    assert Settings.from_args([]) == Settings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": []}, "choose at least one expert"),
        ({"experts": [{"name": "dog", "active": False}]}, "tick at least one"),
        ({"experts": ["dog", "dog"]}, "chosen more than once: dog"),
        ({"experts": "dog"}, "experts 'dog' is not a list"),
        ({"experts": [{"scale": 1}]}, "is not an object with a name"),
        ({"experts": [{"name": "dog", "size": 1}]}, "unknown size in an expert; allowed: name, scale"),
        ({"experts": ["dog"], "colour": 1}, "unknown colour in settings; allowed: enabled, experts"),
        ({"experts": ["a|b"]}, "expert 'a|b' is not allowed"),
        ({"experts": {"dog": True}}, "scale True of expert 'dog' is not a number"),
        ({"experts": {"dog": float("nan")}}, "not a finite number"),
        ({"experts": ["dog"], "gates": 7}, "gates 7 is not the name"),
        ({"experts": ["dog"], "enabled": "maybe"}, "enabled='maybe' is not allowed"),
        ({"experts": [{"name": "dog", "region": "top left"}]}, "give left, top, width, height"),
        ({"experts": [{"name": "dog", "region": [0, 0, 1]}]}, "give left, top, width, height"),
        ({"experts": [{"name": "dog", "region": [0.5, 0, 0.6, 1]}]}, "does not lie in the picture"),
        ({"experts": [{"name": "dog", "region": [0, 0, 0, 1]}]}, "does not lie in the picture"),
        ({"experts": [{"name": "dog", "region": "a b c d"}]}, "'a' is not a number"),
    ],
)
def test_what_is_not_allowed_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("|", r"\|")):
        Settings.from_args([values])


@pytest.mark.parametrize(
    "text",
    [
        {"MoLE experts": "dog"},
        {"MoLE experts": "dog: loud"},
        {"MoLE experts": "dog: 1", "MoLE active": "cat"},
        {"MoLE experts": "dog: 1", "MoLE regions": "cat: left half"},
    ],
)
def test_broken_infotext_is_refused(text: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        Settings.from_infotext(text)


@pytest.mark.parametrize("name", NAMED_REGIONS)
def test_named_regions(name: str) -> None:
    assert format_region(parse_region(name, "dog")) == name
    assert parse_region("0.25, 0.5, 0.25, 0.5", "dog") == (0.25, 0.5, 0.25, 0.5)


def test_changes_by_the_plot() -> None:
    assert FULL.with_active(["cat"]).active == ("cat",)
    assert FULL.with_active([]).active == tuple(e.name for e in FULL.experts)
    assert [e.scale for e in FULL.with_scale(0.3).experts] == [0.3] * 3
    assert [e.scale for e in FULL.with_scale(0.3, "cat").experts] == [0.5, -1.25, 0.3]
    assert FULL.with_gates("other").gates == "other"
    with pytest.raises(SettingsError, match="bird: not among the experts dog"):
        FULL.with_active(["bird"])
    with pytest.raises(SettingsError, match="bird: not among the experts dog"):
        FULL.with_scale(1.0, "bird")

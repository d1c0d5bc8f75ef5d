"""Fixed mixtures: which experts with what weights."""

import pytest

from mole_diffusion.core.errors import ConfigError, UnknownExpertError
from mole_diffusion.methods import fixed_mixture, linear_arithmetic, normalised_linear_arithmetic

KNOWN = ["a", "b", "c", "d"]


def test_linear_and_normalised() -> None:
    assert linear_arithmetic(KNOWN) == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    assert normalised_linear_arithmetic(KNOWN) == {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}


@pytest.mark.parametrize(
    ("mixture", "active", "expected"),
    [
        ("gates", None, (None, None)),
        ("gates", ["b"], (["b"], None)),
        ("none", ["b"], (["b"], None)),
        ("nla", None, (None, dict.fromkeys(KNOWN, 0.25))),
        ("nla", ["a", "b"], (["a", "b"], {"a": 0.5, "b": 0.5})),
        ("la", ["a", "b"], (["a", "b"], {"a": 1.0, "b": 1.0})),
        ({"c": -1, "a": 2}, None, (["c", "a"], {"c": -1.0, "a": 2.0})),
        ({"c": -1, "a": 2}, ["a"], (["a"], {"a": 2.0})),
    ],
)
def test_fixed_mixture(mixture, active, expected) -> None:
    assert fixed_mixture(mixture, KNOWN, active) == expected


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="mixture is 'LA', expected one of"):
        fixed_mixture("LA", KNOWN, None)
    with pytest.raises(UnknownExpertError, match="'e'"):
        fixed_mixture({"e": 1.0}, KNOWN, None)
    with pytest.raises(ConfigError, match="weight inf"):
        fixed_mixture({"a": float("inf")}, KNOWN, None)

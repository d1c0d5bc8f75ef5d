"""Settings are validated when built; errors name the field, the value and what is allowed."""

from __future__ import annotations

import pytest

import mole_diffusion
from mole_diffusion import ConfigError, GateMismatchError, MoLEConfig, MoLEError, UnknownExpertError
from mole_diffusion.core import errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"granularity": "level"},
            "granularity is 'level'; allowed are 'matrix', 'layer', 'block', 'network'",
        ),
        ({"gate_input": "x"}, "gate_input is 'x'; allowed are 'experts', 'own', 'hidden'"),
        ({"pooling": "max"}, "pooling is 'max'; allowed are 'mean', 'token', 'flatten'"),
        ({"composition": "sum"}, "composition is 'sum'; allowed are 'delta', 'output'"),
        ({"temperature": 0}, "temperature is 0; allowed are numbers above 0"),
        ({"strength": float("inf")}, "strength is inf; allowed are numbers above 0"),
        ({"strength": "1"}, "strength is '1'; allowed are numbers above 0"),
        ({"learn_strength": 1}, "learn_strength is 1; allowed are True and False"),
        ({"granularity": "network"}, "granularity='network' does not go with pooling='token': the blocks"),
        (
            {"granularity": "matrix", "composition": "output"},
            "composition='output' does not go with granularity='matrix'; it runs whole",
        ),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MoLEConfig(**settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("config", [MoLEConfig(), MoLEConfig.paper(), MoLEConfig.uniform()])
def test_round_trip(config: MoLEConfig) -> None:
    assert MoLEConfig.from_json(config.to_json()) == config
    assert MoLEConfig.from_dict(config.to_dict()) == config


def test_presets() -> None:
    paper = MoLEConfig.paper()
    assert (paper.granularity, paper.gate_input, paper.pooling) == ("block", "experts", "flatten")
    assert (paper.strength, paper.learn_strength, paper.learn_temperature) == (1.0, False, True)
    assert (MoLEConfig.uniform().pooling, MoLEConfig.uniform().strength) == ("mean", 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "The configuration is not JSON"),
        ("[]", "must be a JSON object, not list"),
        ('{"depth": 1}', "Unknown settings depth; allowed: granularity, gate_input"),
    ],
)
def test_broken_json(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoLEConfig.from_json(text)


def test_error_texts() -> None:
    error = UnknownExpertError("dgo", ["dog", "cat"])
    assert str(error) == "Unknown expert 'dgo'. Known experts: 'dog', 'cat'. Did you mean 'dog'?"
    assert str(UnknownExpertError("zzz", [])) == "Unknown expert 'zzz'. Known experts: none."
    mismatch = GateMismatchError("No.", ["a", "b"])
    assert str(mismatch) == "No.\n  - a\n  - b"
    assert mismatch.differences == ["a", "b"]


def test_error_tree() -> None:
    values = {"ConfigError", "ExpertLoadError", "UnknownExpertError", "AllExpertsMaskedError"}
    values |= {"GateMismatchError", "RegionMaskError"}
    for name in values:
        assert issubclass(getattr(errors, name), (MoLEError, ValueError))
        assert issubclass(getattr(errors, name), ValueError)
    for name in ("NoExpertsError", "InjectionError", "TrainingError"):
        assert issubclass(getattr(errors, name), MoLEError)
        assert issubclass(getattr(errors, name), RuntimeError)


def test_public_names() -> None:
    for name in mole_diffusion.__all__:
        assert getattr(mole_diffusion, name) is not None
    assert set(mole_diffusion.__all__) <= set(dir(mole_diffusion))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mole_diffusion.nothing  # noqa: B018

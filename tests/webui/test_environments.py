"""What happens where the gradio of a host cannot be installed."""

from pathlib import Path

import pytest

from . import environments


def test_ci_fails_without_gradio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "requirements-gradio-0.txt").write_text("mole-diffusion-has-no-such-release==0\n")
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"requirements-gradio-0\.txt cannot be had"):
        environments.gradio_environment("0")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="cannot be had"):
        environments.gradio_environment("0")
    assert not list((tmp_path / "cache").glob("*"))

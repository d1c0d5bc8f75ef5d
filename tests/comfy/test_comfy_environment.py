"""What happens where ComfyUI cannot be installed."""

from pathlib import Path

import comfy_environment
import pytest


def test_ci_fails_without_comfyui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(comfy_environment, "WHEEL", "mole-diffusion-has-no-such-release==0")
    monkeypatch.setenv(comfy_environment.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"no ComfyUI to test with: .*No matching distribution"):
        comfy_environment.installed()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no ComfyUI to test with"):
        comfy_environment.installed()

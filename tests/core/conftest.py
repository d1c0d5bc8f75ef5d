"""Tiny real networks for the core tests."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from .core_tools import make_clip, make_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def clip() -> CLIPTextModel:
    return make_clip()

"""Tiny real networks for the core tests."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from tiny.networks import make_clip, make_unet
from transformers import CLIPTextModel


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture
def clip() -> CLIPTextModel:
    return make_clip()

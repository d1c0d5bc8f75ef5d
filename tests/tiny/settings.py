"""Settings of trainings for tests."""

from typing import Any

from mole_diffusion.pictures.training import TrainingConfig


def tiny_config(**changes: Any) -> TrainingConfig:
    """Few steps, small pools, no bar."""
    settings: dict[str, Any] = {
        "iterations": 4,
        "collage_batch": 2,
        "pool_size": 4,
        "redraw_every": 2,
        "drawn_pictures": 2,
        "sampling_steps": 4,
        "views": 2,
        "crops": 4,
        "collage_background": "sources",
        "progress": False,
    }
    return TrainingConfig(**{**settings, **changes})

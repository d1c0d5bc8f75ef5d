"""The small Stable Diffusion that ships with the project, and the world it was trained on."""

from mole_diffusion.starter.location import StarterExpert, default_experts, starter_dir, starter_experts

__all__ = ["StarterExpert", "default_experts", "starter_dir", "starter_experts"]

"""Training of gates: `pipe.train_gates(...)` is `GateTrainer(pipe, ...).train()`."""

from mole_diffusion.pictures.training.concepts import Concept
from mole_diffusion.pictures.training.config import TrainingConfig
from mole_diffusion.pictures.training.tasks import Both, Clip, ClipWalk, Collage, Pictures
from mole_diffusion.pictures.training.trainer import GateTrainer, TrainingResult
from mole_diffusion.training.progress import TrainingEvent

__all__ = [
    "Both",
    "Clip",
    "ClipWalk",
    "Collage",
    "Concept",
    "GateTrainer",
    "Pictures",
    "TrainingConfig",
    "TrainingEvent",
    "TrainingResult",
]

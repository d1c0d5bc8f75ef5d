"""Training of gates: `pipe.train_gates(...)` is `GateTrainer(pipe, ...).train()`."""

from mole_diffusion.training.concepts import Concept
from mole_diffusion.training.config import TrainingConfig
from mole_diffusion.training.progress import TrainingEvent
from mole_diffusion.training.trainer import GateTrainer, TrainingResult

__all__ = ["Concept", "GateTrainer", "TrainingConfig", "TrainingEvent", "TrainingResult"]

"""Training experts and routers on ``transformers.Trainer``, and evaluating them.

On the command line: ``xlora train-expert``, ``xlora train``, ``xlora eval``.
"""

from xlora_core.config.training import ExpertTrainConfig, RouterTrainConfig, TrainConfig
from xlora_core.training.evaluation import evaluate
from xlora_core.training.experts import ExpertTrainer, train_expert
from xlora_core.training.router import RouterTrainer, train_router

__all__ = [
    "ExpertTrainConfig",
    "ExpertTrainer",
    "RouterTrainConfig",
    "RouterTrainer",
    "TrainConfig",
    "evaluate",
    "train_expert",
    "train_router",
]

"""Training experts and routers, and evaluating them.

Commands: ``python -m xlora_core.training expert | router | evaluate | sample | demo``.
"""

from xlora_core.training.evaluation import evaluate
from xlora_core.training.experts import ExpertSettings, train_expert
from xlora_core.training.router import RouterSettings, train_router

__all__ = ["ExpertSettings", "RouterSettings", "evaluate", "train_expert", "train_router"]

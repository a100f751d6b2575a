"""Freezing the router: a constant mixture from a run or a corpus, what it loses, and its files.

``freeze_run`` and ``freeze_rows`` give a ``FrozenMixture``; ``approximation_loss`` says how far
from the routed model it is; ``save_merged_model`` and ``save_merged_lora`` write it without router.
"""

from xlora_core.freezing.export import lora_of_mixture, save_merged_lora, save_merged_model
from xlora_core.freezing.loss import ApproximationReport, ArmLoss, approximation_loss
from xlora_core.freezing.means import freeze_rows, freeze_run
from xlora_core.freezing.mixture import FrozenMixture
from xlora_core.freezing.texts import TokenChoice, plain_rows, read_texts, token_rows

__all__ = [
    "ApproximationReport",
    "ArmLoss",
    "FrozenMixture",
    "TokenChoice",
    "approximation_loss",
    "freeze_rows",
    "freeze_run",
    "lora_of_mixture",
    "plain_rows",
    "read_texts",
    "save_merged_lora",
    "save_merged_model",
    "token_rows",
]

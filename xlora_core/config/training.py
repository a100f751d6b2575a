"""How a training run goes: what every run has, and what routers and experts have of their own."""

from __future__ import annotations

from dataclasses import dataclass

from xlora_core.config.checks import is_finite, is_int, raise_if

TRAINING_DTYPES = ("bfloat16", "float32")
GRADIENT_CHECKPOINTING = ("off", "reentrant", "non-reentrant")
_AT_LEAST_ONE = ("steps", "rows", "accumulation", "max_length", "eval_every", "save_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training run has.

    Attributes:
        steps: Optimiser steps.
        rows: Rows of one forward pass.
        accumulation: Forward passes of one step; a step sees ``rows * accumulation`` rows.
        max_length: Longest row in tokens; longer answers are cut.
        learning_rate: Peak of AdamW's learning rate, after the warm-up.
        warmup_steps: Linear warm-up; then a cosine decay to 5 % of the peak.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0 does not clip.
        dtype: ``"bfloat16"`` or ``"float32"``: of the base weights that the recipes load. The
            weights that learn are float32 either way.
        autocast: Run under bfloat16 autocast. The router stays in float32.
        gradient_checkpointing: ``"off"``, ``"reentrant"`` or ``"non-reentrant"``: less memory
            for more time, same gradients.
        seed: Seed of the initial weights, the order of rows, and dropout.
        eval_every: Steps between the points of the held-out curve.
        save_every: Steps between checkpoints; None is ``eval_every``.

    Raises:
        ConfigError: Listing every field that is out of range.
    """

    steps: int = 80
    rows: int = 8
    accumulation: int = 1
    max_length: int = 320
    learning_rate: float = 1e-3
    warmup_steps: int = 8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"
    autocast: bool = True
    gradient_checkpointing: str = "off"
    seed: int = 0
    eval_every: int = 20
    save_every: int | None = None

    def __post_init__(self) -> None:
        raise_if(self._faults())

    def _faults(self) -> list[str]:
        faults = [
            f"{name} must be a whole number >= 1, got {getattr(self, name)!r}"
            for name in _AT_LEAST_ONE
            if getattr(self, name) is not None
            and (not is_int(getattr(self, name)) or getattr(self, name) < 1)
        ]
        if not is_int(self.warmup_steps) or self.warmup_steps < 0:
            faults.append(f"warmup_steps must be a whole number >= 0, got {self.warmup_steps!r}")
        if not is_finite(self.learning_rate) or self.learning_rate <= 0:
            faults.append(f"learning_rate must be finite and > 0, got {self.learning_rate!r}")
        faults += self._negative("weight_decay", "max_grad_norm")
        if self.dtype not in TRAINING_DTYPES:
            faults.append(f"dtype must be one of {', '.join(TRAINING_DTYPES)}, got {self.dtype!r}")
        if self.gradient_checkpointing not in GRADIENT_CHECKPOINTING:
            faults.append(
                f"gradient_checkpointing must be one of {', '.join(GRADIENT_CHECKPOINTING)}, "
                f"got {self.gradient_checkpointing!r}"
            )
        if not is_int(self.seed) or not 0 <= self.seed < 2**32:
            faults.append(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}")
        return faults

    def _negative(self, *names: str) -> list[str]:
        return [
            f"{name} must be finite and >= 0, got {getattr(self, name)!r}"
            for name in names
            if not is_finite(getattr(self, name)) or getattr(self, name) < 0
        ]

    def _not_shares(self, *names: str) -> list[str]:
        return [
            f"{name} must be in [0, 1], got {getattr(self, name)!r}"
            for name in names
            if not is_finite(getattr(self, name)) or not 0 <= getattr(self, name) <= 1
        ]


@dataclass(frozen=True, kw_only=True)
class RouterTrainConfig(TrainConfig):
    """How a router is trained, and its shape where a recipe makes a new one.

    Attributes:
        mixed_share: Share of rows whose domain changes midway, in [0, 1].
        balanced: Every domain of a step counts the same, however long its answers are.
        balance_loss: Weight of the load-balance loss; 0 leaves it out.
        label_loss: Weight of the label loss; 0 leaves it out.
        label_steps: The label loss is on for the first so many steps; None is all of them.
        label_start_rows: Rows from whose labels a classifier learns alone, before the first
            step; 0 starts from the uniform merge.
        label_start_steps: Optimiser steps of that; they are cheap, for only the classifier runs.
        label_start_learning_rate: AdamW's at its first step, with a cosine decay to 0; None is
            ``learning_rate``.
        label_start_smoothing: Share of each label that all experts divide, in [0, 1): a softmax
            that is almost sure of one expert passes hardly any gradient on to the mixture.
        global_scaling_weight: g, as in ``XLoraConfig``; above 1 a router can make an expert
            stronger than it is alone.
        router: ``"classifier"`` or ``"per_layer"``, as in ``XLoraConfig``.
        depth: Linear layers of the classifier.
        size: Width of its hidden layers, unused at depth 1.
        layerwise: One set of scalings per adapted module.
        train_adapters: The experts learn, too.
    """

    steps: int = 120
    rows: int = 6
    max_length: int = 288
    learning_rate: float = 3e-3
    mixed_share: float = 0.3
    balanced: bool = True
    balance_loss: float = 0.0
    label_loss: float = 0.0
    label_steps: int | None = None
    label_start_rows: int = 0
    label_start_steps: int = 300
    label_start_learning_rate: float | None = None
    label_start_smoothing: float = 0.0
    global_scaling_weight: float = 1.0
    router: str = "classifier"
    depth: int = 1
    size: int = 2048
    layerwise: bool = True
    train_adapters: bool = False

    def _faults(self) -> list[str]:
        faults = super()._faults() + self._not_shares("mixed_share")
        faults += self._negative("balance_loss", "label_loss")
        if self.label_steps is not None and (not is_int(self.label_steps) or self.label_steps < 1):
            faults.append(
                f"label_steps must be None or a whole number >= 1, got {self.label_steps!r}"
            )
        if not is_int(self.label_start_rows) or self.label_start_rows < 0:
            faults.append(
                f"label_start_rows must be a whole number >= 0, got {self.label_start_rows!r}"
            )
        if not is_int(self.label_start_steps) or self.label_start_steps < 1:
            faults.append(
                f"label_start_steps must be a whole number >= 1, got {self.label_start_steps!r}"
            )
        rate = self.label_start_learning_rate
        if rate is not None and (not is_finite(rate) or rate <= 0):
            faults.append(f"label_start_learning_rate must be None or finite and > 0, got {rate!r}")
        smoothing = self.label_start_smoothing
        if not is_finite(smoothing) or not 0 <= smoothing < 1:
            faults.append(f"label_start_smoothing must be in [0, 1), got {smoothing!r}")
        if not is_finite(self.global_scaling_weight):
            faults.append(
                f"global_scaling_weight must be finite, got {self.global_scaling_weight!r}"
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class ExpertTrainConfig(TrainConfig):
    """How one expert is trained.

    Attributes:
        domain: Its name, and the ``domain`` of its rows.
        rank: LoRA rank r of every adapted module.
        alpha: LoRA alpha; the adapter is scaled by alpha / r.
        dropout: LoRA dropout while training, in [0, 1).
        join_share: Share of rows that ask two questions of the domain in one prompt, in [0, 1].
    """

    domain: str
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    join_share: float = 0.1

    def _faults(self) -> list[str]:
        faults = super()._faults() + self._not_shares("join_share")
        if not isinstance(self.domain, str) or not self.domain.strip():
            faults.append(f"domain must be a name, got {self.domain!r}")
        faults += [
            f"{name} must be a whole number >= 1, got {getattr(self, name)!r}"
            for name in ("rank", "alpha")
            if not is_int(getattr(self, name)) or getattr(self, name) < 1
        ]
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), got {self.dropout!r}")
        return faults

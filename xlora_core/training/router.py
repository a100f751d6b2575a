"""Training an X-LoRA router over finished experts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xlora_core.config import XLoraConfig
from xlora_core.config.training import RouterTrainConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import Example, Row, encode_rows, mixed_examples
from xlora_core.training.identity import router_identity
from xlora_core.training.label_start import start_from_labels
from xlora_core.training.log import TrainingLog
from xlora_core.training.losses import (
    answer_columns,
    answer_positions,
    balance_loss,
    column_losses,
    label_losses,
    soft_scalings,
)
from xlora_core.training.progress import Progress
from xlora_core.training.trainer import AnswerPass, AnswerTrainer


class RouterTrainer(AnswerTrainer):
    """Trains a router, and the experts if they are trainable.

    Args:
        model: The model; trained in place.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples, for the curve; may be empty.
        folder: Folder of the checkpoints.
        settings: How to train.
        progress: Shows how it gets on.

    Raises:
        ConfigError: As of ``AnswerTrainer``; or if an auxiliary loss is wanted that the model's
            router cannot have.
    """

    model: XLoraModel
    settings: RouterTrainConfig

    def __init__(
        self,
        model: XLoraModel,
        pad_id: int,
        train: Sequence[Example],
        heldout: Sequence[Example],
        folder: Path,
        settings: RouterTrainConfig,
        *,
        progress: Progress | None = None,
    ) -> None:
        _check_fits(model, settings)
        super().__init__(
            model,
            pad_id,
            train,
            heldout,
            folder,
            settings,
            run=router_identity(model, train, heldout, settings),
            domains=model.adapter_names,
            progress=progress,
        )

    def answer_pass(self, inputs: Mapping[str, Tensor]) -> AnswerPass:
        """Runs both passes; the logits of the answer tokens only."""
        labels = inputs["labels"]
        columns = answer_columns(labels)
        logits, router_logits = routed_call(
            self.model,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        )
        rows, writers = answer_positions(labels).unbind(dim=1)
        at_answers = router_logits.to(labels.device)[rows, writers]  # [N, L, K]
        return AnswerPass(
            losses=column_losses(logits.to(labels.device), labels, columns),
            domains=inputs["domains"][rows, writers + 1],
            scalings=soft_scalings(at_answers, self.model.config_xlora),
        )

    def auxiliary_losses(
        self, answers: AnswerPass, weights: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Returns the balance loss and the label loss, where they are on."""
        settings = self.settings
        losses: dict[str, tuple[float, Tensor]] = {}
        if answers.scalings is None or not len(weights):
            return losses
        if settings.balance_loss:
            # Of one forward pass, not of the whole step: it is no sum over tokens.
            share = weights.sum() * balance_loss(answers.scalings)
            losses["balance"] = settings.balance_loss, share
        ended = settings.label_steps is not None and self.state.global_step >= settings.label_steps
        if settings.label_loss and not ended:
            of_tokens = label_losses(answers.scalings, answers.domains)
            losses["label"] = settings.label_loss, (of_tokens * weights).sum()
        return losses


def train_router(
    model: XLoraModel,
    pad_id: int,
    train: Sequence[Example],
    heldout: Sequence[Example],
    out: str | Path,
    settings: RouterTrainConfig,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> TrainingLog:
    """Trains a model's router and writes the model to a folder.

    Whatever requires a gradient learns: the classifier, or the gates of a per-layer router; with
    ``use_trainable_adapters`` the experts, too. Goes on from ``<out>.training`` when a run with
    the same settings, rows, base and experts was cut off there.

    Frozen experts are written as the model holds them, that is rounded under a bfloat16 base;
    ``recipes.run_router`` writes them as they were.

    Args:
        model: The model; trained in place, left in evaluation mode.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples, for the curve; may be empty.
        out: Folder for the X-LoRA checkpoint and ``training.json``.
        settings: How to train.
        command: The command line, written to ``training.json``.
        progress: Shows how it gets on; None says nothing.

    Returns:
        The losses on the way.

    Raises:
        ConfigError: If nothing in the model can be trained, or a setting does not fit it.
        CheckpointError: If the checkpoint to go on from is damaged, or ``out`` cannot be written.
        ModelError: If training diverged.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
    """
    out = Path(out)
    work = work_folder(out)
    log = fit_router(
        model, pad_id, train, heldout, work, settings, command=command, progress=progress
    )
    model.save_pretrained(out)
    log.write(out)
    shutil.rmtree(work, ignore_errors=True)
    return log


def fit_router(
    model: XLoraModel,
    pad_id: int,
    train: Sequence[Example],
    heldout: Sequence[Example],
    work: Path,
    settings: RouterTrainConfig,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> TrainingLog:
    """Trains as ``train_router`` does, without writing the model.

    Args:
        model: The model; trained in place, left in evaluation mode.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples; may be empty.
        work: Folder of the trainer's checkpoints; they stay.
        settings: How to train.
        command: The command line, for the log.
        progress: Shows how it gets on; None says nothing.
    """
    trainer = RouterTrainer(model, pad_id, train, heldout, work, settings, progress=progress)
    if settings.label_start_rows and trainer.checkpoint is None:
        start_from_labels(model, pad_id, train, settings, progress=progress)
    return trainer.fit(command=command)


def work_folder(out: Path) -> Path:
    """Returns where a run that writes to ``out`` keeps its checkpoints."""
    out = out.resolve()  # "." has no name of its own
    return out.with_name(f"{out.name}.training")


def router_examples(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, settings: RouterTrainConfig
) -> list[Example]:
    """Returns a training mixture: as many rows of each domain, and rows that change domain.

    As many as the steps read or a start from labels does, whichever is more.
    """
    of_steps = settings.steps * settings.rows * settings.accumulation
    needed = max(of_steps, settings.label_start_rows)
    mixed = int(needed * settings.mixed_share) if len(rows) > 1 else 0
    per_domain = -(-(needed - mixed) // len(rows))
    examples = mixed_examples(rows, tokenizer, settings.max_length, mixed, seed=settings.seed)
    for domain in rows:
        examples += encode_rows(
            rows[domain], tokenizer, settings.max_length, limit=per_domain, seed=settings.seed
        )
    return examples


def fresh_model(base: Any, adapters: Mapping[str, str], settings: RouterTrainConfig) -> XLoraModel:
    """Returns a model over experts whose router starts as the uniform merge.

    The classifier's last layer is zero, as the gates are, so every preference it ends with comes
    from the data. What is random, its hidden layers, follows ``settings.seed``.
    """
    config = XLoraConfig(
        adapters=adapters,
        layerwise_scalings=settings.layerwise,
        xlora_depth=settings.depth,
        xlora_size=settings.size,
        global_scaling_weight=settings.global_scaling_weight,
        use_trainable_adapters=settings.train_adapters,
        router=settings.router,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = XLoraModel.from_base(base, config)
    if not model.is_routed_per_layer:
        last = cast("nn.Linear", model.classifier.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def routed_call(model: XLoraModel, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Runs the routed model.

    Args:
        model: The model.
        inputs: As of its forward; no cache.

    Returns:
        The language model's logits, and the router logits ``[B, T, L or 1, K]`` of the same call,
        with gradient.
    """
    if model.is_routed_per_layer:
        gated = model.gated_pass(**inputs)
        return gated.output.logits, gated.router_logits
    observed: list[Tensor] = []
    handle = model.classifier.register_forward_hook(lambda *call: observed.append(call[-1]))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits, observed[-1]


def _check_fits(model: XLoraModel, settings: RouterTrainConfig) -> None:
    if model.base_model.config.is_encoder_decoder:
        raise ConfigError(
            "routers are trained on decoder-only language models, "
            f"{type(model.base_model).__name__} is an encoder-decoder",
            hint="its forward takes labels: train it with transformers.Trainer itself",
        )
    if getattr(model.base_model, "is_quantized", False):
        quantizer = model.base_model.hf_quantizer
        if not quantizer.is_trainable:
            method = quantizer.quantization_config.quant_method
            raise ConfigError(
                f"the base model is quantised by {method}, which cannot pass gradients on",
                hint="train over the base model without quantisation",
            )
        # What Trainer asks a quantised model: whether adapters stand on it.
        vars(model)["_hf_peft_config_loaded"] = True
    if not (settings.balance_loss or settings.label_loss or settings.label_start_rows):
        return
    config = model.config_xlora
    faults = []
    if not (config.enable_softmax or config.enable_softmax_topk):
        faults.append(
            "balance_loss, label_loss and label_start_rows need scalings that sum to 1: "
            "enable_softmax"
        )
    if model.is_routed_per_layer and settings.label_start_rows:
        faults.append(
            "label_start_rows needs a classifier: what the gates of a per-layer router read "
            "changes while they learn; label_loss serves both"
        )
    losses = settings.balance_loss or settings.label_loss
    if losses and model.is_routed_per_layer and settings.gradient_checkpointing == "reentrant":
        faults.append(
            "balance_loss and label_loss of a per-layer router get no gradient under reentrant "
            "gradient checkpointing: gradient_checkpointing must be off or non-reentrant"
        )
    if faults:
        raise ConfigError(faults)

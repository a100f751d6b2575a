"""Training the X-LoRA classifier over finished experts, with the language-model loss alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xlora_core.config import XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import (
    Batch,
    Example,
    Row,
    batches,
    collate,
    encode_rows,
    mixed_examples,
)
from xlora_core.training.loop import CHECKPOINT, LoopSettings, Report, TrainingLog, optimise, silent
from xlora_core.training.losses import answer_columns, balanced_mean, column_losses


@dataclass(frozen=True, kw_only=True)
class RouterSettings(LoopSettings):
    """How a router is trained.

    Attributes:
        mixed_share: Share of rows whose domain changes midway.
        depth: Linear layers of the classifier.
        size: Width of its hidden layers, unused at depth 1.
        layerwise: One set of scalings per adapted module.
        balanced: Every domain of a batch counts the same, however long its answers are.
    """

    steps: int = 120
    rows: int = 6
    max_length: int = 288
    learning_rate: float = 3e-3
    mixed_share: float = 0.3
    depth: int = 1
    size: int = 2048
    layerwise: bool = True
    balanced: bool = True


def router_examples(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, settings: RouterSettings
) -> list[Example]:
    """Returns a training mixture: as many rows of each domain, and rows that change domain."""
    needed = settings.steps * settings.rows
    mixed = int(needed * settings.mixed_share) if len(rows) > 1 else 0
    per_domain = -(-(needed - mixed) // len(rows))
    examples = mixed_examples(rows, tokenizer, settings.max_length, mixed, seed=settings.seed)
    for domain in rows:
        examples += encode_rows(
            rows[domain], tokenizer, settings.max_length, limit=per_domain, seed=settings.seed
        )
    return examples


def answer_losses(model: XLoraModel, batch: Batch) -> tuple[Tensor, list[str]]:
    """Returns the routed loss of each answer token, float32 ``[N]`` in nats, and its domain."""
    batch = batch.to(model.device)
    columns = answer_columns(batch)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    losses, where = column_losses(logits, batch, columns)
    return losses, [batch.domains[row][position + 1] for row, position in where.tolist()]


def train_router(
    model: XLoraModel,
    pad_id: int,
    train: Sequence[Example],
    heldout: Sequence[Example],
    out: str | Path,
    settings: RouterSettings,
    *,
    command: str = "",
    report: Report = silent,
) -> TrainingLog:
    """Trains a model's classifier, and its experts if they are trainable.

    Goes on from ``out/checkpoint.safetensors`` when a run with the same settings was cut off there.

    Args:
        model: The model; trained in place, left in evaluation mode.
        pad_id: Token id to pad with.
        train: The mixture.
        heldout: Held-out examples, for the curve.
        out: Folder for ``training.json`` and the checkpoint.
        settings: How to train.
        command: The command line, written to ``training.json``.
        report: Gets a line at each step.

    Raises:
        ConfigError: If nothing in the model can be trained.
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not learning:
        raise ConfigError("no parameter of the model requires a gradient, nothing can be trained")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)

    def loss(batch: Batch) -> Tensor:
        losses, domains = answer_losses(model, batch)
        return balanced_mean(losses, domains) if settings.balanced else losses.mean()

    @torch.no_grad()
    def heldout_loss() -> float:
        model.eval()
        ordered = sorted(heldout, key=len)
        groups = [ordered[i : i + settings.rows] for i in range(0, len(ordered), settings.rows)]
        losses = torch.cat([answer_losses(model, collate(g, pad_id))[0] for g in groups])
        model.train()
        return float(losses.mean())

    model.train()
    log = TrainingLog(settings=asdict(settings), command=command)
    optimise(
        learning,
        loss,
        heldout_loss,
        batches(train, settings.rows, pad_id, seed=settings.seed, window=8),
        settings,
        log,
        out,
        report=report,
    )
    model.eval()
    log.write(out / "training.json")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return log


def fresh_model(base: Any, adapters: Mapping[str, str], settings: RouterSettings) -> XLoraModel:
    """Returns a model over experts whose classifier's last layer is zero.

    So it starts as the uniform merge, and every preference it ends with comes from the data.
    """
    config = XLoraConfig(
        adapters=adapters,
        layerwise_scalings=settings.layerwise,
        xlora_depth=settings.depth,
        xlora_size=settings.size,
    )
    model = XLoraModel.from_base(base, config)
    last = cast("nn.Linear", model.classifier.layers[-1])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return model

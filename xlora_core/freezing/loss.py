"""What a constant mixture loses against the routed model, on given text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.adapters import LoraWeights
from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError, ModelError
from xlora_core.freezing.evaluation_mode import evaluation_mode
from xlora_core.freezing.texts import length_sorted_batches
from xlora_core.layers import XLoraLayer, adapted_layer_class
from xlora_core.merge import MergeWeights, SingleLora, weight_matrix
from xlora_core.model import XLoraModel
from xlora_core.training.data import IGNORE, Batch, Example

_ROWS_AT_ONCE = 128  # of a whole vocabulary each


@dataclass(frozen=True, kw_only=True)
class ArmLoss:
    """One way of running the text, compared with the routed model.

    Attributes:
        cross_entropy: Of the text, nats a token.
        kl: KL divergence of it from the routed model, KL(routed || it), nats a token, >= 0.
        agreement: Share of tokens at which it finds the same token most likely, in [0, 1].
    """

    cross_entropy: float
    kl: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class ApproximationReport:
    """How near the routed model a constant mixture comes.

    Attributes:
        n_rows: Number of texts.
        n_tokens: Number of predicted tokens that the means are over.
        arms: ``routed``, ``frozen``, ``lora`` (if one was given), ``uniform`` (1/K each) and
            ``base`` (no adapter) -> loss.
    """

    n_rows: int
    n_tokens: int
    arms: Mapping[str, ArmLoss]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return asdict(self)

    def table(self) -> str:
        """Returns a table for people, one line per arm."""
        head = f"{self.n_rows} rows, {self.n_tokens} tokens"
        width = max(len(head), *map(len, self.arms))
        lines = [f"{head:<{width}}  cross-entropy  KL(routed||it)  same top token"]
        for arm, loss in self.arms.items():
            numbers = f"{loss.cross_entropy:>13.4f}  {loss.kl:>14.4f}  {loss.agreement:>14.1%}"
            lines.append(f"{arm:<{width}}  {numbers}")
        return "\n".join(lines)


@torch.no_grad()
def approximation_loss(
    model: XLoraModel,
    weights: MergeWeights,
    examples: Sequence[Example],
    *,
    knobs: RoutingKnobs | None = None,
    lora: SingleLora | None = None,
    tokens_per_batch: int = 1024,
) -> ApproximationReport:
    """Compares a constant mixture with the routed model, token by token.

    All labelled tokens that have a token before them count, each the same. The logits are those
    of the model itself, no merged copy is made; softmax and KL are computed in float32, in
    float64 under a float64 model. The model is put into evaluation mode meanwhile.

    Args:
        model: The model.
        weights: The constant mixture; None is the uniform merge.
        examples: From ``token_rows``.
        knobs: Of the routed model, instead of its own.
        lora: One LoRA to compare as well, such as a truncated one. While it runs it stands in
            the place of the experts: no other thread may use the model meanwhile.
        tokens_per_batch: Most positions of one forward call.

    Raises:
        ModelError: If the model is no decoder-only language model.
        ConfigError: If the weights do not fit the model, or no token is labelled.
    """
    if model.is_encoder_decoder or not model.base_model.can_generate():
        raise ModelError(
            f"{type(model.base_model).__name__} does not predict each token of a text from those "
            "before it, so there is no loss to compare",
            hint="merge without a report, and compare the outputs on your own task",
        )
    knobs = model.check_knobs(knobs or model.default_knobs)
    names = model.adapter_names
    matrix = weight_matrix(weights, names, model.lora_layer_names).to(model.device)
    uniform = weight_matrix(None, names, model.lora_layer_names).to(model.device)
    arms: dict[str, Callable[[Batch], Tensor]] = {
        "frozen": lambda batch: _logits(model, batch, matrix),
        "uniform": lambda batch: _logits(model, batch, uniform),
        "base": lambda batch: _logits(model, batch, None),
    }
    if lora is not None:
        swap = _in_the_experts_place(model, lora)
        arms = {"frozen": arms["frozen"], "lora": swap} | arms
    sums = {arm: torch.zeros(3, dtype=torch.float64) for arm in ("routed", *arms)}
    n_tokens = 0
    with evaluation_mode(model):
        for batch in length_sorted_batches(examples, tokens_per_batch):
            batch = batch.to(model.device)  # noqa: PLW2901  # the same batch
            targets = _targets(batch)
            if len(targets) == 0:
                continue
            n_tokens += len(targets)
            routed = _routed_logits(model, batch, knobs)
            sums["routed"] += _sums(routed, routed, targets)
            for arm, logits in arms.items():
                sums[arm] += _sums(routed, logits(batch), targets)
    if n_tokens == 0:
        raise ConfigError("the texts have no token to predict", hint="give longer texts")
    means = {arm: (total / n_tokens).tolist() for arm, total in sums.items()}
    return ApproximationReport(
        n_rows=len(examples),
        n_tokens=n_tokens,
        arms={
            arm: ArmLoss(cross_entropy=mean[0], kl=mean[1], agreement=mean[2])
            for arm, mean in means.items()
        },
    )


def _targets(batch: Batch) -> Tensor:
    """Returns the labelled tokens that have a token before them, ``[N]``."""
    following = batch.labels[:, 1:]
    return following[following != IGNORE]


def _routed_logits(model: XLoraModel, batch: Batch, knobs: RoutingKnobs) -> Tensor:
    router_logits = model.read_router(
        knobs=knobs,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    )
    return _logits(model, batch, model.route(router_logits, knobs))


def _logits(model: XLoraModel, batch: Batch, scalings: Tensor | None) -> Tensor:
    """Returns the logits ``[N, V]`` from which the ``_targets`` are predicted."""
    # Only at these positions is a vocabulary's worth of logits needed.
    columns = (batch.labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()
    logits: Tensor = model.main_pass(
        scalings=scalings,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    if logits.shape[1] != len(columns):  # a model that cannot leave any out
        logits = logits[:, columns]
    return logits[batch.labels[:, columns + 1] != IGNORE]


def _sums(routed: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Returns the sums over tokens of cross-entropy, KL(routed || other) and agreement.

    Args:
        routed: ``[N, V]``.
        other: ``[N, V]``.
        targets: ``[N]``.

    Returns:
        ``[3]`` float64.
    """
    dtype = torch.promote_types(routed.dtype, torch.float32)
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        p = F.log_softmax(routed[rows].to(dtype), dim=-1)
        q = F.log_softmax(other[rows].to(dtype), dim=-1)
        sums += torch.stack(
            [
                -q.gather(1, targets[rows, None]).double().sum(),
                (p.exp() * (p - q)).sum(dim=-1).double().sum(),
                (p.argmax(dim=-1) == q.argmax(dim=-1)).double().sum(),
            ]
        ).cpu()
    return sums


def _in_the_experts_place(model: XLoraModel, lora: SingleLora) -> Callable[[Batch], Tensor]:
    """Returns a function that runs a batch with one LoRA instead of the experts."""
    originals = dict(zip(model.lora_layer_names, model.lora_layers, strict=True))
    stand_ins = {
        path: _stand_in(layer, lora.modules[path]) if path in lora.modules else layer.base_layer
        for path, layer in originals.items()
    }
    alone = torch.zeros(len(model.adapter_names), device=model.device)
    alone[0] = 1

    @contextmanager
    def swapped() -> Iterator[None]:
        try:
            for path, module in stand_ins.items():
                model.base_model.set_submodule(path, module)
            yield
        finally:
            for path, module in originals.items():
                model.base_model.set_submodule(path, module)

    def run(batch: Batch) -> Tensor:
        with swapped():
            return _logits(model, batch, alone)

    return run


def _stand_in(layer: XLoraLayer, weights: LoraWeights) -> XLoraLayer:
    kind = adapted_layer_class(layer.base_layer, weights)
    return kind(
        layer.base_layer,
        layer_index=layer.layer_index,
        n_adapters=layer.n_adapters,
        experts={0: weights},
        dropouts={},
        active=layer.active,
        dtype=weights.lora_A.dtype,
    )

"""The adapted module: a base layer plus the weighted sum of its experts.

Explicit modules replace the adapted ones, so every Hugging Face architecture works without
touching its code. All experts of a module are stacked along the rank: the whole mixture is two
matrix products, and ranks may differ between experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError, ConfigError, ModelError


class ActiveScalings(threading.local):
    """The effective scalings of the forward call that runs in this thread.

    The model owns one; its modules read it. Thread-local, so that several threads may call the
    model at once. ``value`` is None (adapters off), ``[B, T, L or 1, K]``, or
    ``[1, 1, L or 1, K]`` for all tokens.
    """

    value: Tensor | None = None

    @contextmanager
    def hold(self, value: Tensor | None) -> Iterator[None]:
        """Sets the scalings for the length of a ``with`` block."""
        previous, self.value = self.value, value
        try:
            yield
        finally:
            self.value = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveScalings:
        copy: ActiveScalings = memo.setdefault(id(self), ActiveScalings())
        return copy

    def __reduce__(self) -> tuple[type[ActiveScalings], tuple[()]]:
        return ActiveScalings, ()


class XLoraLinear(nn.Module):
    """A linear-like layer with its mixture of LoRA experts.

    ``y = base(x) + sum_k s_k * lora_scaling_k * B_k A_k x`` with the effective scalings ``s``
    of the running forward call. Without scalings it is the base layer.

    Args:
        base_layer: ``nn.Linear``, or ``Conv1D`` as GPT-2 has it.
        layer_index: Position among the model's adapted modules, ``named_modules()`` order.
        n_adapters: K, of the whole model.
        experts: Adapter index -> weights; adapters absent here have no entry.
        dropouts: Adapter index -> dropout probability while training.
        active: The model's scalings.
        dtype: dtype of the stacked experts.
        trainable: Whether the experts learn.

    Attributes:
        lora_A: ``[R, in]``, R = sum of the ranks.
        lora_B: ``[out, R]``.

    Source: PEFT 0.21.2, ``XLoraLinearLayer``; arXiv 2402.07148, equation 5.
    """

    lora_scaling: Tensor
    adapter_of_rank: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        layer_index: int,
        n_adapters: int,
        experts: Mapping[int, LoraWeights],
        dropouts: Mapping[int, float],
        active: ActiveScalings,
        dtype: torch.dtype,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_index = layer_index
        self.n_adapters = n_adapters
        self.active = active
        self.adapter_indices = list(experts)
        self.ranks = [weights.rank for weights in experts.values()]
        self.dropouts = [dropouts.get(index, 0.0) for index in experts]
        device = base_layer.weight.device
        assert isinstance(device, torch.device)  # narrows nn.Module's loose attribute type
        self.lora_A = nn.Parameter(
            torch.cat([w.lora_A for w in experts.values()]).to(device, dtype),
            requires_grad=trainable,
        )
        self.lora_B = nn.Parameter(
            torch.cat([w.lora_B for w in experts.values()], dim=1).to(device, dtype),
            requires_grad=trainable,
        )
        ranks = torch.tensor(self.ranks)
        self.register_buffer(
            "adapter_of_rank",
            torch.tensor(self.adapter_indices).repeat_interleave(ranks).to(device),
            persistent=False,
        )
        # float32 even under a bf16 model: it multiplies the float32 scalings.
        scalings_dtype = torch.promote_types(dtype, torch.float32)
        self.register_buffer(
            "lora_scaling",
            torch.tensor([w.lora_scaling for w in experts.values()], dtype=scalings_dtype)
            .repeat_interleave(ranks)
            .to(device),
            persistent=False,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XLoraLinear:
        """Moves and casts as asked, but never rounds ``lora_scaling`` below float32."""
        exact = self.lora_scaling
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        self.lora_scaling = exact.to(self.lora_scaling.device, wide)
        return self

    # Some architectures look at a projection's weight to choose a dtype or a size.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight  # type: ignore[return-value]  # linear-like layers have one

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]  # linear-like layers have one

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.lora_B.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, T, out]`` for ``x`` ``[B, T, in]``, in ``x``'s dtype.

        Raises:
            ModelError: If ``x`` holds other tokens than the scalings.
        """
        y: Tensor = self.base_layer(x)
        scalings = self.active.value
        if scalings is None:
            return y
        routed_layer = self.layer_index if scalings.shape[-2] > 1 else 0
        of_rank = scalings[..., routed_layer, :].to(x.device)[..., self.adapter_of_rank]
        weights = (of_rank * self.lora_scaling).to(self.lora_A.dtype)  # [B, T, R]
        weights = self._in_shape_of(x, weights)
        mixture = F.linear(self._shrink(x.to(self.lora_A.dtype)) * weights, self.lora_B)
        return y + mixture.to(y.dtype)

    def _in_shape_of(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns ``[B, T, R]`` weights in the leading shape of ``x``; some blocks flatten it.

        Raises:
            ModelError: If ``x`` holds other tokens than the scalings.
        """
        leading = x.shape[:-1]
        if weights.shape[:-1] == leading:
            return weights
        if weights.shape[:-1].numel() == 1:
            return weights.flatten()
        if leading == (weights.shape[:-1].numel(),):
            return weights.flatten(0, 1)
        raise ModelError(
            f"adapted module number {self.layer_index} got input of shape {list(x.shape)}, "
            f"expected {list(weights.shape[:-1])} tokens as in input_ids",
            hint="modules that see other tokens than the decoder's cannot be routed",
        )

    def _shrink(self, x: Tensor) -> Tensor:
        """Returns ``A x``, ``[B, T, R]``; in training each expert has its own dropout mask."""
        if not self.training or not any(self.dropouts):
            return F.linear(x, self.lora_A)
        blocks = self.lora_A.split(self.ranks)
        return torch.cat(
            [
                F.linear(F.dropout(x, p), block)
                for p, block in zip(self.dropouts, blocks, strict=True)
            ],
            dim=-1,
        )

    def experts(self) -> dict[int, LoraWeights]:
        """Returns adapter index -> its weights, as views of the stacked ones."""
        blocks_A = self.lora_A.detach().split(self.ranks)
        blocks_B = self.lora_B.detach().split(self.ranks, dim=1)
        starts = [sum(self.ranks[:i]) for i in range(len(self.ranks))]
        return {
            adapter: LoraWeights(
                lora_A=block_A, lora_B=block_B, lora_scaling=float(self.lora_scaling[start])
            )
            for adapter, block_A, block_B, start in zip(
                self.adapter_indices, blocks_A, blocks_B, starts, strict=True
            )
        }

    def delta_weight(self, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum as one matrix.

        Args:
            weights: ``[K]``, one per adapter of the model.

        Returns:
            ``[out, in]``, in float32 or wider.
        """
        dtype = self.lora_scaling.dtype
        per_rank = weights.to(self.lora_scaling)[self.adapter_of_rank] * self.lora_scaling
        return (self.lora_B.detach().to(dtype) * per_rank) @ self.lora_A.detach().to(dtype)

    def merge_to_original_layer(self, weights: Sequence[float] | Tensor | None = None) -> nn.Module:
        """Returns a new plain layer of the base layer's class with the experts baked in.

        Args:
            weights: One per adapter of the model; None is the uniform merge, 1/K each.

        Raises:
            ConfigError: If there is not one finite weight per adapter.
        """
        if weights is None:
            weights = [1 / self.n_adapters] * self.n_adapters
        try:
            weights = torch.as_tensor(weights, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"merge weights must be numbers: {error}") from error
        if weights.shape != (self.n_adapters,) or not torch.isfinite(weights).all():
            raise ConfigError(
                f"merge weights must be one finite number for each of {self.n_adapters} adapters, "
                f"got shape {list(weights.shape)}"
            )
        return merged_layer(self.base_layer, self.delta_weight(weights))


def merged_layer(base_layer: nn.Module, delta: Tensor) -> nn.Module:
    """Returns a new layer of ``base_layer``'s class with ``delta`` added to its weight.

    Args:
        base_layer: ``nn.Linear`` or ``Conv1D``; not changed. A weight tied to another module
            (a tied ``lm_head``) comes back untied.
        delta: ``[out, in]``.
    """
    out_features, in_features = linear_features(base_layer)
    weight, bias = base_layer.weight, base_layer.bias
    assert isinstance(weight, Tensor)  # narrows nn.Module's loose attribute type
    if isinstance(base_layer, Conv1D):
        merged: nn.Module = Conv1D(out_features, in_features)
        delta = delta.T
    else:
        merged = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    total = (weight.detach().to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
    merged.weight = nn.Parameter(total, requires_grad=False)
    if isinstance(bias, Tensor):
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return merged.train(base_layer.training)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Returns a linear-like module's ``(out, in)``.

    Raises:
        AdapterError: If the module is neither ``nn.Linear`` nor ``Conv1D``.
    """
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_out, n_in
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise AdapterError(
        f"a module of class {type(module).__name__} cannot carry experts, "
        "expected Linear or Conv1D",
        hint="leave it out of the adapters' target_modules",
    )

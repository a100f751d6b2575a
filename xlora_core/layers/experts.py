"""What all adapted modules share: the stacked experts of a base layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core.adapters import LoraWeights
from xlora_core.errors import ConfigError
from xlora_core.layers.active import ActiveScalings
from xlora_core.layers.merging import merged_layer

COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class XLoraLayer(nn.Module, ABC):
    """A base layer with its mixture of LoRA experts.

    ``y = base(x) + sum_k s_k * lora_scaling_k * (B_k A_k x + bias_k)`` with the effective
    scalings ``s`` of the running forward call. Without scalings it is the base layer. What ``A``
    and ``B`` do to ``x`` is a subclass's.

    Args:
        base_layer: The layer to adapt; not changed.
        layer_index: Position among the model's adapted modules, ``named_modules()`` order.
        n_adapters: K, of the whole model.
        experts: Adapter index -> weights; adapters absent here have no entry.
        dropouts: Adapter index -> dropout probability while training.
        active: The model's scalings.
        dtype: dtype of the stacked experts.
        trainable: Whether the experts learn.

    Attributes:
        lora_A: ``[R, in, ...]``, R = sum of the ranks.
        lora_B: ``[out, R, ...]``.
        lora_bias: ``[n, out]`` for the n experts of this module that have a bias, or None if none
            has. The others get none, also none to learn.

    Source: arXiv 2402.07148, equation 5; PEFT 0.21.2, ``XLoraLayer``.
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
        device = compute_device(base_layer)
        stack_A = torch.cat([w.lora_A for w in experts.values()])
        stack_B = torch.cat([w.lora_B for w in experts.values()], dim=1)
        self.lora_A = nn.Parameter(stack_A.to(device, dtype), requires_grad=trainable)
        self.lora_B = nn.Parameter(stack_B.to(device, dtype), requires_grad=trainable)
        biases = {k: w.bias for k, w in experts.items() if w.bias is not None}
        self.biased_indices = list(biases)
        if biases:
            stacked = torch.stack([bias.to(stack_B) for bias in biases.values()])
            self.lora_bias: nn.Parameter | None = nn.Parameter(
                stacked.to(device, dtype), requires_grad=trainable
            )
        else:
            self.register_parameter("lora_bias", None)
        of_rank = [(index, w.lora_scaling) for index, w in experts.items() for _ in range(w.rank)]
        self.register_buffer(
            "adapter_of_rank",
            torch.tensor([index for index, _ in of_rank], device=device),
            persistent=False,
        )
        # float32 even under a bf16 model: it multiplies the float32 scalings.
        scalings_dtype = torch.promote_types(dtype, torch.float32)
        self.register_buffer(
            "lora_scaling",
            torch.tensor([s for _, s in of_rank], dtype=scalings_dtype, device=device),
            persistent=False,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XLoraLayer:
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
        return self.base_layer.weight  # type: ignore[return-value]  # adaptable layers have one

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    # ---------------------------------------------------------------- what a subclass says

    @abstractmethod
    def token_shape(self, x: Tensor) -> torch.Size:
        """Returns the leading dimensions of an input that stand for tokens."""

    @abstractmethod
    def gate_input(self, x: Tensor) -> Tensor:
        """Returns what a gate of this module reads: ``[*token_shape, gate_features]``."""

    @property
    @abstractmethod
    def gate_features(self) -> int:
        """Size of what a gate of this module reads."""

    @abstractmethod
    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum, in the shape of the base layer's output.

        Args:
            x: The base layer's input.
            weights: ``[*leading, R]``, effective scaling times lora_scaling of each rank.
        """

    @abstractmethod
    def delta_weight(self, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum as one weight.

        Args:
            weights: ``[K]``, one per adapter of the model.

        Returns:
            In the base weight's own layout (``[out, in]`` for linear layers, ``Conv1D``
            included), in float32 or wider.
        """

    def add_bias(self, mixture: Tensor, bias: Tensor) -> Tensor:
        """Returns the mixture with a bias ``[*leading, out]`` or ``[out]`` added."""
        return mixture + bias

    # ---------------------------------------------------------------- what all do

    def forward(self, x: Tensor) -> Tensor:
        """Returns the base layer's output plus the mixture, in the output's dtype.

        Raises:
            ModelError: If ``x`` holds other tokens than the scalings.
        """
        y: Tensor = self.base_layer(x)
        scalings = self.active.of(self, x)
        if scalings is None:
            return y
        # With several devices the scalings live where the classifier does.
        scalings = scalings.to(self.lora_A.device)
        dtype = self.lora_A.dtype
        of_rank = scalings.index_select(-1, self.adapter_of_rank)
        weights = (of_rank * self.lora_scaling).to(dtype)
        mixture = self.mixture(x.to(self.lora_A.device), weights)
        if self.lora_bias is not None:
            per_expert = scalings[..., self.biased_indices] * self._lora_scaling_of_biased()
            mixture = self.add_bias(mixture, F.linear(per_expert.to(dtype), self.lora_bias.T))
        return y + mixture.to(y.device, y.dtype)

    def _lora_scaling_of_expert(self) -> Tensor:
        """``[n]``, one for each expert of this module."""
        return self.lora_scaling[self._starts()]

    def _lora_scaling_of_biased(self) -> Tensor:
        """``[n]``, one for each expert of this module that has a bias."""
        places = [self.adapter_indices.index(k) for k in self.biased_indices]
        return self._lora_scaling_of_expert()[places]

    def _starts(self) -> list[int]:
        """Returns where each expert's ranks begin in the stacks."""
        return [sum(self.ranks[:i]) for i in range(len(self.ranks))]

    def experts(self) -> dict[int, LoraWeights]:
        """Returns adapter index -> its weights, as views of the stacked ones."""
        blocks_A = self.lora_A.detach().split(self.ranks)
        blocks_B = self.lora_B.detach().split(self.ranks, dim=1)
        scalings = self._lora_scaling_of_expert().tolist()
        rows = () if self.lora_bias is None else self.lora_bias.detach()
        biases = dict(zip(self.biased_indices, rows, strict=True))
        return {
            adapter: LoraWeights(
                lora_A=block_A,
                lora_B=block_B,
                lora_scaling=scaling,
                bias=biases.get(adapter),
                embedding=self.is_embedding,
            )
            for adapter, block_A, block_B, scaling in zip(
                self.adapter_indices, blocks_A, blocks_B, scalings, strict=True
            )
        }

    is_embedding = False

    def per_rank(self, weights: Tensor) -> Tensor:
        """Returns ``[R]``: each rank's share of the constant mixture ``weights`` ``[K]``."""
        return weights.to(self.lora_scaling)[self.adapter_of_rank] * self.lora_scaling

    def delta_bias(self, weights: Tensor) -> Tensor | None:
        """Returns the experts' weighted bias ``[out]`` in float32 or wider, None without one."""
        if self.lora_bias is None:
            return None
        per_expert = weights.to(self.lora_scaling)[self.biased_indices]
        return (per_expert * self._lora_scaling_of_biased()) @ self.lora_bias.detach().to(
            self.lora_scaling.dtype
        )

    def merge_to_original_layer(self, weights: Sequence[float] | Tensor | None = None) -> nn.Module:
        """Returns a new plain layer of the base layer's class with the experts baked in.

        A quantised base layer becomes a plain linear one.

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
        return merged_layer(self.base_layer, self.delta_weight(weights), self.delta_bias(weights))


def compute_device(module: nn.Module) -> torch.device:
    """Returns the device a layer computes on, which may not be the one its weights rest on.

    Source: accelerate keeps offloaded weights on ``meta`` and moves them when the layer runs.
    """
    execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    for tensor in [*module.parameters(), *module.buffers()]:
        return tensor.device
    return torch.device("cpu")


def compute_dtype(module: nn.Module, fallback: torch.dtype) -> torch.dtype:
    """Returns the dtype a layer computes in; a quantised weight does not tell it."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in COMPUTED:
        return weight.dtype
    return fallback if fallback in COMPUTED else torch.float32

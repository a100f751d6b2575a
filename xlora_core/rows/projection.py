"""Linear layers that read the same input, and their experts' ``A``, as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core.layers import XLoraLinear
from xlora_core.rows.packed import Product


@dataclass(frozen=True)
class _Part:
    """One adapted layer's share of a fused projection."""

    outputs: slice
    ranks: slice
    expand: Tensor  # [ranks, outputs], lora_B transposed


class FusedProjection:
    """Layers over the same input as one matrix ``[W; A]``: shrinking costs no product of its own.

    The layers' ``weight`` and ``lora_A`` become views of the fused matrix, so that it takes no
    memory beside them and they stay what they were. A packed one is a copy.

    Args:
        layers: The layers, in the order of their outputs; plain or adapted ones over a plain
            ``nn.Linear``, all of one dtype on one device.
        triton: Whether Triton adds the mixture, in one kernel for all layers; it needs a CUDA
            device and the package.
        packed: Whether the matrix is packed, too, see ``Product``.

    Attributes:
        weight: ``[out + R, in]``, R = sum of all experts' ranks of all layers.
        bias: ``[out + R]``, or None if no layer has one.
        adapted: Those of the layers that carry experts, in the order of their ranks.
        out_features: Outputs of all layers together.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear | XLoraLinear],
        *,
        triton: bool = False,
        packed: bool = False,
    ) -> None:
        plain = [plain_layer(layer) for layer in layers]
        self.adapted = [layer for layer in layers if isinstance(layer, XLoraLinear)]
        self.out_features = sum(layer.out_features for layer in plain)
        stacked: list[Tensor] = [*(p.weight for p in plain), *(a.lora_A for a in self.adapted)]
        self.weight = _fuse(stacked)
        self.bias = _fused_bias(plain, self.weight.shape[0])
        self._product = Product(self.weight, self.bias, packed=packed)
        outputs: list[slice] = []
        ranks: list[slice] = []
        output = rank = 0
        for layer, base in zip(layers, plain, strict=True):
            if isinstance(layer, XLoraLinear):
                n_ranks = layer.lora_A.shape[0]
                outputs.append(slice(output, output + base.out_features))
                ranks.append(slice(rank, rank + n_ranks))
                rank += n_ranks
            output += base.out_features
        self.n_ranks = rank
        self._kernel = _triton_kernel(self.adapted, outputs, ranks) if triton and rank else None
        expands = [layer.lora_B.detach().t() for layer in self.adapted]
        self._parts = [_Part(*part) for part in zip(outputs, ranks, expands, strict=True)]

    def __call__(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Returns the layers' outputs side by side.

        Args:
            x: ``[N, in]``.
            weights: ``[M, R]``, effective scaling times lora_scaling of each rank, for the first
                M rows; the others, and all of them for None, go through the base layers alone.

        Returns:
            ``[N, out]``.
        """
        if weights is None or not self._parts:
            return self._product(x, self.out_features)
        y = self._product(x)
        if self._kernel is not None:
            self._kernel(y, weights, self.out_features)
            return y[:, : self.out_features]
        adapted = y[: weights.shape[0]]
        # Row by row in memory, for the same reason as in `linear_rows`.
        shrunk = (adapted[:, self.out_features :] * weights).contiguous()
        for part in self._parts:
            adapted[:, part.outputs].addmm_(shrunk[:, part.ranks], part.expand)
        return y[:, : self.out_features]

    def unpack(self) -> None:
        """Frees the packed copy of the matrix."""
        self._product.unpack()


class RankWeights:
    """What each rank of each fused projection is multiplied by, for all of them at once.

    Args:
        projections: The projections, in the order their weights are asked for.
        dtype: dtype of the experts.
    """

    def __init__(self, projections: Sequence[FusedProjection], dtype: torch.dtype) -> None:
        layers = [layer for projection in projections for layer in projection.adapted]
        self._dtype = dtype
        self._sizes = [projection.n_ranks for projection in projections]
        self._adapter = torch.cat([layer.adapter_of_rank for layer in layers])
        self._lora_scaling = torch.cat([layer.lora_scaling for layer in layers])
        self._place = torch.cat(
            [layer.adapter_of_rank + layer.layer_index * layer.n_adapters for layer in layers]
        )

    def of(self, scalings: Tensor, n_tokens: int) -> Sequence[Tensor]:
        """Returns ``[M, R]`` for each projection.

        Args:
            scalings: ``[M, L or 1, K]``, effective scalings.
            n_tokens: N. Where M is 1, a second token takes part with all weights 0 if there is
                one: products of two rows are faster than of one, see ``linear_rows``.
        """
        place = self._adapter if scalings.shape[1] == 1 else self._place
        of_rank = scalings.flatten(1).index_select(1, place)
        weights = (of_rank * self._lora_scaling).to(self._dtype)
        if weights.shape[0] == 1 < n_tokens:
            weights = F.pad(weights, (0, 0, 0, 1))
        return torch.split(weights, self._sizes, dim=1)


def plain_layer(layer: nn.Linear | XLoraLinear) -> nn.Linear:
    """Returns the linear layer itself, or the one under its experts."""
    plain = layer.base_layer if isinstance(layer, XLoraLinear) else layer
    assert isinstance(plain, nn.Linear)
    return plain


def _triton_kernel(
    layers: Sequence[XLoraLinear], outputs: Sequence[slice], ranks: Sequence[slice]
) -> Callable[[Tensor, Tensor, int], None]:
    from xlora_core.rows.triton_expand import TritonExpand

    return TritonExpand([layer.lora_B for layer in layers], outputs, ranks)


# Not in inference mode: the model may be trained again once its rows are not read any more.
@torch.inference_mode(False)
def _fuse(parameters: Sequence[Tensor]) -> Tensor:
    """Returns the parameters ``[rows, in]`` stacked, and makes views of them."""
    fused = _fused_before(parameters)
    if fused is not None:
        return fused
    fused = torch.cat([p.detach() for p in parameters])
    for parameter, view in zip(
        parameters, fused.split([p.shape[0] for p in parameters]), strict=True
    ):
        parameter.data = view
    return fused


def _fused_before(parameters: Sequence[Tensor]) -> Tensor | None:
    """Returns the matrix that the parameters are views of already, one below the other."""
    first = parameters[0].detach()
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == storage
        if not same or parameter.storage_offset() != place or not parameter.is_contiguous():
            return None
        place += parameter.numel()
    shape = (sum(p.shape[0] for p in parameters), first.shape[1])
    return first.as_strided(shape, (first.shape[1], 1), first.storage_offset())


@torch.inference_mode(False)
def _fused_bias(plain: Sequence[nn.Linear], n_rows: int) -> Tensor | None:
    """Returns the layers' biases side by side; 0 where one has none, and for ``A``."""
    if all(layer.bias is None for layer in plain):
        return None
    fused = plain[0].weight.new_zeros(n_rows)
    start = 0
    for layer in plain:
        if layer.bias is not None:
            fused[start : start + layer.out_features] = layer.bias.detach()
        start += layer.out_features
    return fused

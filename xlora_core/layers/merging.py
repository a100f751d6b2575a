"""Plain layers with a constant mixture baked in."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def merged_layer(
    base_layer: nn.Module, delta: Tensor, delta_bias: Tensor | None = None
) -> nn.Module:
    """Returns a new plain layer with ``delta`` added to ``base_layer``'s weight.

    Args:
        base_layer: Any layer that can carry experts; not changed. A weight tied to another
            module (a tied ``lm_head``) comes back untied. A quantised layer comes back as a
            plain ``nn.Linear`` of the weights it computed with.
        delta: In the layout of ``XLoraLayer.delta_weight``.
        delta_bias: ``[out]``; a layer without bias gets one.
    """
    if is_quantised(base_layer):
        base_layer = dequantised(base_layer, delta)
    weight, bias = base_layer.weight, getattr(base_layer, "bias", None)
    assert isinstance(weight, Tensor)  # narrows nn.Module's loose attribute type
    if isinstance(base_layer, Conv1D):
        merged: nn.Module = Conv1D(delta.shape[0], delta.shape[1])
        delta = delta.T
    elif isinstance(base_layer, nn.Embedding | nn.Conv2d):
        # Subclasses know more than their weight (a scale, a padding index): copy all of it,
        # the weight itself only once.
        merged = copy.deepcopy(base_layer, {id(weight): weight})
    else:
        merged = nn.Linear(delta.shape[1], delta.shape[0], bias=bias is not None, device="meta")
    total = (weight.detach().to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
    merged.weight = nn.Parameter(total, requires_grad=False)
    if isinstance(bias, Tensor):
        merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    if delta_bias is not None:
        before = bias.detach() if isinstance(bias, Tensor) else torch.zeros_like(delta_bias)
        total_bias = before.to(delta_bias) + delta_bias
        merged.bias = nn.Parameter(total_bias.to(weight.device, weight.dtype), requires_grad=False)
    return merged.train(base_layer.training)


def is_quantised(module: nn.Module) -> bool:
    """Returns whether a linear-like layer holds its weight in another form than a plain matrix."""
    if isinstance(module, Conv1D | nn.Embedding | nn.Conv2d):
        return False
    weight: object = getattr(module, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter)  # torchao's weights are of classes of their own
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    return not (plain and floating and isinstance(module, nn.Linear))


@torch.no_grad()
def dequantised(module: nn.Module, like: Tensor) -> nn.Linear:
    """Returns a plain linear layer that computes what a quantised one does.

    The weight is read off the layer's own forward on unit vectors, which needs no knowledge of
    how it is packed.

    Args:
        module: Any linear-like layer.
        like: ``[out, in]``; gives the sizes, and the device of the result.
    """
    out_features, in_features = like.shape
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), like.device)
    dtype = _input_dtype(module)
    zero: Tensor = module(torch.zeros(1, in_features, device=device, dtype=dtype))
    has_bias = bool(zero.any())
    plain = nn.Linear(in_features, out_features, bias=has_bias, device=device, dtype=zero.dtype)
    for start in range(0, in_features, 256):
        unit = torch.eye(in_features, device=device, dtype=dtype)[start : start + 256]
        columns = module(unit) - zero
        plain.weight.data[:, start : start + 256] = columns.T
    if has_bias:
        plain.bias.data.copy_(zero[0])
    return plain.requires_grad_(False).train(module.training)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype a quantised layer expects its input in."""
    compute: object = getattr(module, "compute_dtype", None)  # bitsandbytes, 4-bit
    if isinstance(compute, torch.dtype):
        return compute
    for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.dtype in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
        ):
            return tensor.dtype
    return torch.float32

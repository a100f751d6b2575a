"""Matrices laid out anew, as the CPU's library reads them fastest for few rows."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xlora_core.rows.skinny import linear_rows

# Of fewer rows the product with the matrix itself is faster.
_FEWEST_ROWS = {torch.float32: 3, torch.bfloat16: 1}
# For which the layout is chosen; all other numbers of rows read it just as well.
_TYPICAL_ROWS = 8


class PackedMatrix:
    """A matrix in oneDNN's own layout: a copy, faster to multiply by than the matrix itself.

    Measured, in ms for all layers of a 135M model (AMD EPYC with AVX-512, 1 thread); ``plain`` is
    what ``linear_rows`` does:

    ================  ==  ==  ==  ==  ==  ==  ===  ====
    rows               1   2   3   4   8  16  100   512
    ================  ==  ==  ==  ==  ==  ==  ===  ====
    float32, plain    26  23  38  36  55  72  278  1268
    float32, packed   28  35  25  23  33  46  222  1097
    bfloat16, plain   27  26  28  29  33  43
    bfloat16, packed  16  18  15  14  18  26
    ================  ==  ==  ==  ==  ==  ==  ===  ====

    Args:
        matrix: ``[out, in]``; not changed, and what changes it later is not seen.

    Raises:
        RuntimeError: If this PyTorch or this CPU cannot.
    """

    def __init__(self, matrix: Tensor) -> None:
        # What PyTorch's own compiler calls: there is no public name for it.
        pack: Any = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001
        self._multiply: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        # Not in inference mode: whoever multiplies may be outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._packed = pack(matrix.detach().contiguous(), _TYPICAL_ROWS)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias``, ``[N, out]``, for ``[N, in]``."""
        y: Tensor = self._multiply(x.contiguous(), self._packed, bias, "none", [], "")
        return y


class Product:
    """``x W^T + bias`` for any number of rows, in the form that is fastest for so many.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``.
        packed: Whether the weight is packed, too: for a CPU that ``packs`` its dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, packed: bool) -> None:
        self._weight, self._bias = weight, bias
        self._packed = PackedMatrix(weight) if packed else None
        self._fewest_rows = _FEWEST_ROWS.get(weight.dtype, 0)

    def __call__(self, x: Tensor, n_outputs: int | None = None) -> Tensor:
        """Returns ``[N, out]`` for ``[N, in]``, or the first outputs of them."""
        if self._packed is not None and x.shape[0] >= self._fewest_rows:
            # A few outputs more cost less than another packed matrix without them.
            return self._packed(x, self._bias)[:, :n_outputs]
        bias = None if self._bias is None else self._bias[:n_outputs]
        return linear_rows(x, self._weight[:n_outputs], bias)

    def unpack(self) -> None:
        """Frees the packed copy; the weight alone is multiplied by from here on."""
        self._packed = None


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether matrices of a dtype can be packed here, and are faster then."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # not measured
    if dtype not in _FEWEST_ROWS or not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedMatrix(torch.zeros(1, 1, dtype=dtype))(torch.zeros(1, 1, dtype=dtype))
    except (AttributeError, RuntimeError):  # another PyTorch; a CPU without bfloat16
        return False
    return True

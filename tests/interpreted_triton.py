"""The mixture's kernel against the plain products, in Triton's interpreter on the CPU.

``tests/unit/test_rows_triton.py`` runs these in a process of their own: the interpreter is chosen,
with ``TRITON_INTERPRET=1``, when Triton is first imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.test_rows_projection import K, layers
from xlora_core.rows.projection import FusedProjection, RankWeights
from xlora_core.rows.triton_expand import TritonExpand


def random_parts(
    outputs: list[int], ranks: list[int], dtype: torch.dtype
) -> tuple[list[Tensor], list[slice], list[slice]]:
    """Returns lora_B ``[out, R]`` of layers side by side, and where their outputs and ranks are."""
    expands = [torch.randn(o, r).to(dtype) for o, r in zip(outputs, ranks, strict=True)]

    def places(sizes: list[int]) -> list[slice]:
        return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    return expands, places(outputs), places(ranks)


@pytest.mark.parametrize("n_rows", [0, 1, 5, 16, 17])
@pytest.mark.parametrize(
    ("outputs", "ranks"), [([64], [16]), ([70, 3, 64], [5, 32, 1]), ([130, 20], [40, 7])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_adds_what_plain_products_add(
    dtype: torch.dtype,
    outputs: list[int],
    ranks: list[int],
    n_rows: int,
) -> None:
    torch.manual_seed(0)
    expands, of_outputs, of_ranks = random_parts(outputs, ranks, dtype)
    n_outputs, n_ranks = sum(outputs), sum(ranks)
    y = torch.randn(n_rows + 2, n_outputs + n_ranks).to(dtype)
    # A view of wider rows, as all projections' weights are.
    weights = torch.randn(n_rows, n_ranks + 9).to(dtype)[:, 4 : 4 + n_ranks]
    before, expected = y.clone(), y.double()
    shrunk = (y[:n_rows, n_outputs:].float() * weights).to(dtype).double()
    for expand, out, rank in zip(expands, of_outputs, of_ranks, strict=True):
        expected[:n_rows, out] += shrunk[:, rank] @ expand.double().T
    copies = [expand.clone() for expand in expands]
    kernel = TritonExpand(expands, of_outputs, of_ranks)
    kernel(y, weights, n_outputs)
    # Of bfloat16 the interpreter cuts off what a device rounds.
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(y[:, n_outputs:], before[:, n_outputs:])
    assert torch.equal(y[n_rows:], before[n_rows:])
    for expand, copy in zip(expands, copies, strict=True):
        assert torch.equal(expand, copy)


@pytest.mark.parametrize("n_rows", [12, 20])
def test_a_projection_with_the_kernel_is_the_one_without(n_rows: int) -> None:
    plain, with_kernel = layers(torch.float32), layers(torch.float32)
    scalings = torch.rand(max(1, n_rows - 1), 2, K)
    x = torch.randn(20, 24)[:n_rows]
    results = []
    for linears, triton in ((plain, False), (with_kernel, True)):
        projection = FusedProjection(linears, triton=triton)
        (weights,) = RankWeights([projection], torch.float32).of(scalings, n_rows)
        with torch.no_grad():
            results.append(projection(x, weights))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-5)

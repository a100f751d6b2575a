"""One LoRA for a weighted sum of LoRAs: exact, or the nearest of a rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.merge import SingleLora, single_lora
from xlora_core.merge.low_rank import squared_norm, truncate

NEAR = {"atol": 1e-12, "rtol": 1e-12}


def experts(
    *ranks: int, n_in: int = 7, n_out: int = 5, seed: int = 0, **options: object
) -> dict[int, LoraWeights]:
    """Random experts of given ranks in one module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: LoraWeights(
            lora_A=torch.randn(r, n_in, generator=generator).double(),
            lora_B=torch.randn(n_out, r, generator=generator).double(),
            lora_scaling=0.5 + k,
            **options,  # type: ignore[arg-type]  # options are LoraWeights'
        )
        for k, r in enumerate(ranks)
    }


def expected(of_module: dict[int, LoraWeights], row: list[float]) -> Tensor:
    """The weighted sum the long way, ``[out, in]``."""
    zero = torch.zeros(5, 7, dtype=torch.float64)
    return sum(
        (row[k] * w.lora_scaling * (w.lora_B @ w.lora_A) for k, w in of_module.items()), zero
    )


def product(lora: SingleLora, path: str = "m") -> Tensor:
    weights = lora.modules[path]
    assert weights.lora_scaling == 1.0
    return weights.lora_B.flatten(1) @ weights.lora_A.flatten(1)


def one_module(
    of_module: dict[int, LoraWeights], row: list[float], rank: int | None = None
) -> SingleLora:
    weights = torch.tensor([row], dtype=torch.float64)
    return single_lora({"m": of_module}, weights, rank=rank, dtype=torch.float64)


# ---------------------------------------------------------------- the factors


@given(
    inner=st.integers(1, 12),
    rank=st.integers(1, 14),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_truncation_is_that_of_the_whole_matrix(
    inner: int, rank: int, n_in: int, n_out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n_out, inner, generator=generator).double()
    right = torch.randn(inner, n_in, generator=generator).double()
    whole = left @ right
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    found = truncate(left, right, rank)
    n_possible = min(inner, n_in, n_out)
    assert found.left.shape == (n_out, min(rank, n_possible))
    assert found.right.shape == (min(rank, n_possible), n_in)
    torch.testing.assert_close(found.singular_values, S[:n_possible], atol=1e-10, rtol=1e-10)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(found.left @ found.right, best, atol=1e-9, rtol=0)
    error = (whole - found.left @ found.right).square().sum()
    torch.testing.assert_close(
        error, found.singular_values[rank:].square().sum(), atol=1e-10, rtol=1e-9
    )
    assert squared_norm(left, right) == pytest.approx(float(whole.square().sum()), rel=1e-9)


def test_a_truncation_puts_half_of_each_singular_value_on_either_side() -> None:
    left, right = torch.randn(6, 4).double(), 1e6 * torch.randn(4, 8).double()
    found = truncate(left, right, 2)
    torch.testing.assert_close(
        found.left.norm(dim=0).square(), found.singular_values[:2], rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        found.right.norm(dim=1).square(), found.singular_values[:2], rtol=1e-9, atol=0
    )


# ---------------------------------------------------------------- exact


def test_exact_is_the_weighted_sum_with_the_ranks_added_up() -> None:
    of_module = experts(2, 3, 1)
    lora = one_module(of_module, [0.25, -1.5, 3.0])
    assert lora.modules["m"].rank == 6
    torch.testing.assert_close(product(lora), expected(of_module, [0.25, -1.5, 3.0]), **NEAR)
    norm = float(expected(of_module, [0.25, -1.5, 3.0]).square().sum())
    assert lora.squared_norms == {"m": pytest.approx(norm)}
    assert lora.cut == {"m": 0.0}
    assert lora.kept == {"m": 1.0}
    assert lora.kept_in_total == 1.0


def test_experts_of_weight_0_take_no_rank() -> None:
    of_module = experts(2, 3, 1)
    lora = one_module(of_module, [0.5, 0.0, 1.0])
    assert lora.modules["m"].rank == 3
    torch.testing.assert_close(product(lora), expected(of_module, [0.5, 0.0, 1.0]), **NEAR)


def test_modules_differ_in_their_experts_weights_and_ranks() -> None:
    a, b = experts(2, 3), {1: experts(4, seed=1)[0]}
    weights = torch.tensor([[0.5, 0.25], [9.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    lora = single_lora({"a": a, "b": b, "c": a}, weights, dtype=torch.float64)
    assert {path: w.rank for path, w in lora.modules.items()} == {"a": 5, "b": 4}
    torch.testing.assert_close(product(lora, "a"), expected(a, [0.5, 0.25]), **NEAR)
    torch.testing.assert_close(product(lora, "b"), expected(b, [9.0, -2.0]), **NEAR)


def test_the_result_is_rounded_once() -> None:
    narrow = {
        k: LoraWeights(
            lora_A=w.lora_A.bfloat16(), lora_B=w.lora_B.bfloat16(), lora_scaling=w.lora_scaling
        )
        for k, w in experts(2, 3).items()
    }
    lora = single_lora({"m": narrow}, torch.tensor([[1 / 3, 0.7]], dtype=torch.float64))
    weights = lora.modules["m"]
    assert weights.lora_A.dtype == weights.lora_B.dtype == torch.float32
    assert torch.equal(weights.lora_A, torch.cat([w.lora_A for w in narrow.values()]).float())
    folded = [
        w.lora_B.double() * (row * w.lora_scaling)
        for w, row in zip(narrow.values(), (1 / 3, 0.7), strict=True)
    ]
    assert torch.equal(weights.lora_B, torch.cat(folded, dim=1).float())


@pytest.mark.parametrize("row", [[0.0, 0.0], [0.0, 5.0]])
def test_a_zero_mixture_is_refused(row: list[float]) -> None:
    """Adapter 1 has no weights in the module, so its weight changes nothing."""
    with pytest.raises(ConfigError) as caught:
        one_module({0: experts(2)[0]}, row)
    assert caught.value.message == (
        "the mixture is zero in every module: it is the base model, and there is no LoRA to write"
    )
    assert caught.value.hint == "give some adapter a weight other than 0"


# ---------------------------------------------------------------- truncated


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_error_is_the_singular_values_that_were_cut(rank: int) -> None:
    of_module, row = experts(2, 3, 1), [0.25, -1.5, 3.0]
    lora = one_module(of_module, row, rank)
    whole = expected(of_module, row)
    S = torch.linalg.svdvals(whole)
    assert lora.modules["m"].rank == rank
    error = float((whole - product(lora)).square().sum())
    assert error == pytest.approx(float(S[rank:].square().sum()), rel=1e-9)
    assert lora.cut["m"] == pytest.approx(error, rel=1e-9)
    share = float(S[:rank].square().sum() / S.square().sum())
    assert lora.kept["m"] == pytest.approx(share, rel=1e-9)
    assert 0 < lora.kept["m"] < 1


def test_a_rank_of_all_or_more_is_exact_and_stays_the_experts_own_factors() -> None:
    of_module, row = experts(2, 1), [0.5, -1.0]
    exact = one_module(of_module, row)
    for rank in (3, 50):
        lora = one_module(of_module, row, rank)
        assert torch.equal(lora.modules["m"].lora_A, exact.modules["m"].lora_A)
        assert torch.equal(lora.modules["m"].lora_B, exact.modules["m"].lora_B)
        assert lora.cut == {"m": 0.0}


def test_ranks_that_add_up_to_more_than_the_matrix_has() -> None:
    of_module, row = experts(4, 5), [1.0, 2.0]  # 9 ranks in a matrix of 5 x 7
    lora = one_module(of_module, row, 6)
    assert lora.modules["m"].rank == 5
    torch.testing.assert_close(product(lora), expected(of_module, row), atol=1e-11, rtol=0)
    assert lora.kept["m"] == 1.0


def test_the_total_share_weighs_modules_by_their_norm() -> None:
    a, b = experts(3), experts(3, seed=5)
    weights = torch.tensor([[1.0], [10.0]], dtype=torch.float64)
    lora = single_lora({"a": a, "b": b}, weights, rank=1, dtype=torch.float64)
    values = {"a": expected(a, [1.0]), "b": expected(b, [10.0])}
    squares = {path: torch.linalg.svdvals(value).square() for path, value in values.items()}
    kept = sum(float(s[0]) for s in squares.values()) / sum(
        float(s.sum()) for s in squares.values()
    )
    assert lora.kept_in_total == pytest.approx(kept, rel=1e-9)
    assert lora.kept_in_total == pytest.approx(lora.kept["b"], abs=0.01)
    assert abs(lora.kept["a"] - lora.kept["b"]) > 0.02


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_1_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank of a LoRA must be at least 1, got {rank}"):
        one_module(experts(2), [1.0], rank)


# ---------------------------------------------------------------- other layers


@pytest.mark.parametrize("rank", [None, 2])
def test_a_convolution(rank: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    of_module = {
        k: LoraWeights(
            lora_A=torch.randn(r, 3, 2, 2, generator=generator).double(),
            lora_B=torch.randn(6, r, 1, 1, generator=generator).double(),
            lora_scaling=0.5 + k,
        )
        for k, r in enumerate((2, 3))
    }
    lora = one_module(of_module, [0.5, -2.0], rank)
    weights = lora.modules["m"]
    assert weights.lora_A.shape == (rank or 5, 3, 2, 2)
    assert weights.lora_B.shape == (6, rank or 5, 1, 1)
    whole = sum(
        row * w.lora_scaling * torch.einsum("or,rihw->oihw", w.lora_B[..., 0, 0], w.lora_A)
        for row, w in zip([0.5, -2.0], of_module.values(), strict=True)
    )
    found = torch.einsum("or,rihw->oihw", weights.lora_B[..., 0, 0], weights.lora_A)
    error = float((found - whole).square().sum())
    assert error == pytest.approx(lora.cut["m"], rel=1e-9, abs=1e-20)
    assert (error > 0.1) == (rank is not None)


def test_an_embedding_stays_one() -> None:
    of_module = experts(2, 3, embedding=True)
    assert one_module(of_module, [0.5, 1.0]).modules["m"].embedding
    assert one_module(of_module, [0.5, 1.0], 1).modules["m"].embedding


def test_biases_are_mixed_like_the_rest() -> None:
    of_module = experts(2, 3, bias=torch.arange(5.0).double())
    of_module |= {2: experts(1)[0]}  # without a bias
    lora = one_module(of_module, [0.5, -2.0, 1.0], 1)
    bias = lora.modules["m"].bias
    assert bias is not None
    torch.testing.assert_close(bias, torch.arange(5.0).double() * (0.5 * 0.5 - 2.0 * 1.5), **NEAR)
    assert one_module(of_module, [0.0, 0.0, 1.0]).modules["m"].bias is None


def test_a_bias_on_an_embedding_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match="module m: PEFT's format has no bias"):
        one_module(experts(2, embedding=True, bias=torch.ones(5)), [1.0])

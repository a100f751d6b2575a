"""Summaries of scalings, on numbers that can be followed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from xlora_core.recording import summaries

NAN = float("nan")
# Two tokens, two modules, three adapters.
SCALINGS = np.array([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0, 0, 0], [0.2, 0.4, 0.4]]], np.float32)
PRESENT = np.array([[True, True, True], [True, False, True]])


def test_dominant_adapter_is_the_largest_and_the_first_of_a_tie() -> None:
    dominant = summaries.dominant_adapter(SCALINGS)
    assert dominant.dtype == np.int16
    assert dominant.tolist() == [[0, 1], [-1, 1]]


def test_an_absent_adapter_does_not_dominate() -> None:
    assert summaries.dominant_adapter(SCALINGS, PRESENT).tolist() == [[0, 2], [-1, 2]]
    nowhere = np.zeros((2, 3), dtype=bool)
    assert summaries.dominant_adapter(SCALINGS, nowhere).tolist() == [[-1, -1], [-1, -1]]
    only_absent_has_any = np.array([[[0.0, 0.9, 0.0]]])
    assert summaries.dominant_adapter(only_absent_has_any, PRESENT[1:]).tolist() == [[-1]]


def test_dominant_adapter_is_signed() -> None:
    assert summaries.dominant_adapter(np.array([[[-3.0, -1.0, -2.0]]])).tolist() == [[1]]


def test_top1_share_splits_ties() -> None:
    shares = summaries.top1_share(np.array([[2, 1, 0], [1, 1, 0], [0, 0, 0], [-1, -1, -1]]))
    np.testing.assert_allclose(
        shares, [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [1 / 3] * 3], rtol=1e-6
    )


def test_adapter_mean_counts_modules_that_have_the_adapter() -> None:
    np.testing.assert_allclose(summaries.adapter_mean(SCALINGS), [0.25, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose(summaries.adapter_mean(SCALINGS, PRESENT), [0.25, 0.1, 0.2], 1e-6)
    nowhere = np.array([[True, False, True], [True, False, True]])
    np.testing.assert_allclose(summaries.adapter_mean(SCALINGS, nowhere), [0.25, NAN, 0.2], 1e-6)
    np.testing.assert_allclose(summaries.adapter_mean(SCALINGS[:0]), [NAN] * 3)


def test_entropy_and_effective_number_at_their_ends() -> None:
    one = np.array([[[0, 5.0, 0, 0]], [[0.25] * 4], [[0, 0, 0, 0]], [[-0.5, 0.5, 0, 0]]])
    np.testing.assert_allclose(
        summaries.entropy(one), [0, np.log(4), 0, np.log(2)], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(summaries.effective_number(one), [1, 4, 0, 2], rtol=1e-6)


def test_entropy_is_averaged_over_modules_that_have_any() -> None:
    mixed = np.array([[[1.0, 0, 0, 0], [0.25] * 4, [0, 0, 0, 0]]])
    assert summaries.entropy(mixed)[0] == pytest.approx(np.log(4) / 2)
    assert summaries.effective_number(mixed)[0] == pytest.approx((1 + 4) / 2)


def test_lead_share_sums_over_modules_and_splits_ties() -> None:
    # Token 0: 0.8, 0.8, 0.4; token 1: 0.2, 0.4, 0.4.
    tied = np.array([[[0.75, 0.25, 0], [0, 0.5, 0.25]], [[0, 0, 0], [0.25, 0.5, 0.5]]])
    assert summaries.lead_share(tied).tolist() == [0.25, 0.5, 0.25]
    # Without "code" in the second module: 0.75, 0.25, 0.25; 0.25, 0, 0.5.
    assert summaries.lead_share(tied, PRESENT).tolist() == [0.5, 0, 0.5]
    assert summaries.lead_share(np.zeros((2, 1, 3))).tolist() == [0, 0, 0]
    assert summaries.lead_share(tied[:0]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("first", "second", "ended", "expected"),
    [
        ([1, 2, 3], [1, 2, 4], (False, False), 2),
        ([1, 2], [1, 2], (True, True), None),
        ([1, 2], [1, 2, 3], (True, False), 2),
        ([1, 2], [1, 2, 3], (False, True), None),
        ([1, 2, 3], [1, 2], (True, False), None),
        ([1, 2, 3], [1, 2], (False, True), 2),
        ([], [7], (True, True), 0),
        ([], [], (False, False), None),
    ],
)
def test_first_divergence(first, second, ended, expected) -> None:
    found = summaries.first_divergence(
        np.array(first, np.int32), second, first_ended=ended[0], second_ended=ended[1]
    )
    assert found == expected

"""The expected wait: from measured steps and what is left, and nothing while nothing is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlora_core.engine.waiting import WaitEstimate, Work


def work(n_to_write: int, n_to_read: int = 0, most_seconds: float | None = None) -> Work:
    return Work(n_to_read=n_to_read, n_to_write=n_to_write, most_seconds=most_seconds)


def measured(step: float = 0.1, per_prompt_token: float = 0.01) -> WaitEstimate:
    estimate = WaitEstimate()
    estimate.stepped(step)
    estimate.read(100, 100 * per_prompt_token)
    return estimate


def wait(
    estimate: WaitEstimate, active: list[Work], ahead: list[Work], n_free: int = 0
) -> float | None:
    """Returns the wait of a request behind others."""
    return estimate.expected_seconds(active, [*ahead, work(7)], n_free=n_free)[-1]


def test_nothing_is_said_before_anything_was_measured() -> None:
    estimate = WaitEstimate()
    assert wait(estimate, [], []) is None
    assert wait(estimate, [work(10)], []) is None
    estimate.stepped(0.5)
    assert wait(estimate, [work(10)], []) == 5
    assert wait(estimate, [work(10, n_to_read=4)], []) is None
    assert wait(estimate, [work(10)], [work(2, n_to_read=4)]) is None
    estimate.read(0, 0.3)
    assert wait(estimate, [work(10, n_to_read=4)], []) is None
    estimate.read(10, 1)
    assert wait(estimate, [work(10, n_to_read=4)], []) == pytest.approx(5.4)


def test_whoever_finds_a_free_place_does_not_wait() -> None:
    nothing_measured = WaitEstimate()
    assert wait(nothing_measured, [work(30)], [], n_free=1) == 0
    assert wait(nothing_measured, [], [work(5)], n_free=2) == 0
    assert wait(nothing_measured, [], [work(5)], n_free=1) is None
    assert wait(measured(), [], [work(5)], n_free=1) == pytest.approx(0.5)
    assert wait(measured(), [work(30)], [work(5)], n_free=1) == pytest.approx(0.5)
    assert wait(measured(), [work(3)], [work(5)], n_free=1) == pytest.approx(0.3)


def test_a_place_is_free_when_the_first_ends() -> None:
    estimate = measured()
    assert wait(estimate, [work(30), work(10)], []) == pytest.approx(1)
    # The next one takes that place for 2 s, the one after it the other.
    assert wait(estimate, [work(30), work(10)], [work(20)]) == pytest.approx(3)
    assert wait(estimate, [work(30), work(10)], [work(40)]) == pytest.approx(3)
    ahead = [work(10, n_to_read=100), work(50)]
    assert wait(estimate, [work(30), work(10)], ahead) == pytest.approx(3)
    assert wait(estimate, [work(30), work(10)], [*ahead, work(1)]) == pytest.approx(3.1)


def test_a_time_limit_bounds_what_a_request_takes() -> None:
    assert wait(measured(), [work(1000, most_seconds=7)], []) == 7
    assert wait(measured(), [work(10, most_seconds=7)], []) == pytest.approx(1)


def test_steps_that_bring_no_token_count() -> None:
    estimate = WaitEstimate()
    estimate.stepped(0.1, tokens_per_request=0)
    assert wait(estimate, [work(10)], []) is None
    for _ in range(100):
        estimate.stepped(0.1, tokens_per_request=1)
        estimate.stepped(0.1, tokens_per_request=0)
    assert wait(estimate, [work(10)], []) == pytest.approx(2, rel=0.1)


def test_answers_that_end_early_shorten_the_wait() -> None:
    estimate = measured()
    estimate.ended(20, 100)
    assert wait(estimate, [work(100)], []) == pytest.approx(2)
    for _ in range(200):
        estimate.ended(100, 100)
    assert wait(estimate, [work(100)], []) == pytest.approx(10)


def test_the_latest_steps_count_most() -> None:
    estimate = measured(step=0.1)
    for _ in range(100):
        estimate.stepped(0.4)
    assert wait(estimate, [work(10)], []) == pytest.approx(4, rel=1e-4)


WORK = st.builds(
    work,
    st.integers(0, 50),
    st.integers(0, 50),
    st.none() | st.floats(0, 20, allow_nan=False),
)


@given(
    active=st.lists(WORK, min_size=1, max_size=5),
    ahead=st.lists(WORK, max_size=6),
    n_free=st.integers(0, 3),
    share=st.floats(0.1, 1),
)
def test_further_back_is_never_sooner_and_writing_never_makes_it_later(
    active, ahead, n_free, share
) -> None:
    estimate = measured()
    estimate.ended(round(share * 100), 100)
    waits = estimate.expected_seconds(active, ahead, n_free=n_free)
    assert len(waits) == len(ahead)
    assert None not in waits
    assert waits == sorted(waits)  # type: ignore[type-var]  # None is excluded above
    later = [
        work(max(w.n_to_write - 1, 0), max(w.n_to_read - 1, 0), w.most_seconds) for w in active
    ]
    after = estimate.expected_seconds(later, ahead, n_free=n_free)
    for now, then in zip(waits, after, strict=True):
        assert now is not None
        assert then is not None
        assert then <= now + 1e-9

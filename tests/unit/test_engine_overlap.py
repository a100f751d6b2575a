"""When guesses of the next token are read along."""

from __future__ import annotations

import pytest

from xlora_core.engine.overlap import Overlap

MANY = 500  # as many observations as outweigh what was assumed before


def overlap_of(hit_rate: float, seconds: dict[int, float], n_siblings: int = 1) -> Overlap:
    """Returns an automatic choice that has seen guesses of this worth and steps of this length."""
    overlap = Overlap("auto", n_siblings)
    due = 0.0
    for _ in range(MANY):
        due += hit_rate
        hit = due >= 1
        due -= hit
        overlap.guessed(hit=hit)
    for n_tokens, taken in seconds.items():
        for _ in range(MANY):
            overlap.took(n_tokens, taken)
    return overlap


def test_it_guesses_before_anything_is_known() -> None:
    assert Overlap("auto").guesses(1) == 1
    assert Overlap("auto", 3).guesses(2) == 3


def test_on_and_off_do_not_ask_what_it_costs() -> None:
    never_right = {1: 1.0, 2: 10.0}
    on, off = Overlap("on", 2), Overlap("off", 2)
    for overlap in (on, off):
        for n_tokens, seconds in never_right.items():
            overlap.took(n_tokens, seconds)
    assert on.guesses(1) == 2
    assert off.guesses(1) == 0


@pytest.mark.parametrize(
    ("hit_rate", "cost", "pays"),
    [
        (0.75, 1.0, True),
        (0.75, 1.7, True),
        (0.75, 1.8, False),
        (0.3, 1.2, True),
        (0.3, 1.4, False),
        (0.1, 0.8, True),  # two rows may be faster than one
    ],
)
def test_it_pays_while_a_hit_saves_more_than_the_rows_cost(
    hit_rate: float, cost: float, pays: bool
) -> None:
    # Without guesses a token takes 2; with them cost, and 1 more for every wrong one.
    assert (cost + 1 - hit_rate < 2) == pays
    assert overlap_of(hit_rate, {1: 1.0, 2: cost}).guesses(1) == int(pays)


def test_the_number_of_arms_decides_which_steps_are_compared() -> None:
    """Rows that are free for one request may not be for eight."""
    overlap = overlap_of(0.75, {1: 1.0, 2: 1.1, 8: 2.0, 16: 4.0})
    assert overlap.guesses(1) == 1
    assert overlap.guesses(8) == 0


def test_siblings_are_more_rows() -> None:
    seconds = {1: 1.0, 2: 1.1, 4: 2.0}
    assert overlap_of(0.75, seconds).guesses(1) == 1
    assert overlap_of(0.75, seconds, n_siblings=3).guesses(1) == 0


def test_steps_of_quite_another_size_say_nothing() -> None:
    assert overlap_of(0.1, {1: 1.0, 64: 100.0}).guesses(1) == 1


def test_it_changes_its_mind_when_guesses_get_better() -> None:
    overlap = overlap_of(0.2, {1: 1.0, 2: 1.5})
    assert overlap.guesses(1) == 0
    for _ in range(MANY):
        overlap.guessed(hit=True)
    assert overlap.guesses(1) == 1


def test_one_slow_step_decides_nothing() -> None:
    overlap = Overlap("auto")
    for n_tokens in (1, 2):
        overlap.took(n_tokens, 100.0 * n_tokens)  # the first step of a size sets things up
    for _ in range(8):
        overlap.took(1, 1.0)
        overlap.took(2, 1.1)
    overlap.took(2, 50.0)
    assert overlap.guesses(1) == 1


def test_where_it_did_not_pay_it_is_tried_again_now_and_then() -> None:
    """Without guesses there are no steps of twice the rows, and nothing to learn that from."""
    overlap = overlap_of(0.75, {1: 1.0, 2: 10.0})
    tried = [overlap.guesses(1) for _ in range(200)]
    assert sum(tried) == 3
    for _ in range(8):
        overlap.took(2, 1.1)  # whatever kept the machine busy is gone
    assert overlap.guesses(1) == 1

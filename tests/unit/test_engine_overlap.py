"""When guesses of the next token are read along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Guessing, Overlap
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.rows.opening import open_rows

MANY = 500  # as many observations as outweigh what was assumed before


def overlap_of(
    hit_rate: float, seconds: dict[int, float], n_siblings: int = 1, *, draft: float | None = None
) -> Overlap:
    """Returns an automatic choice that has seen guesses of this worth and steps of this length.

    Args:
        hit_rate: Of the base model's guesses.
        seconds: Tokens of a step -> what it takes.
        n_siblings: Guesses for the same place.
        draft: Hit rate of drafts; None for a choice without them.
    """
    overlap = Overlap("auto", n_siblings, drafts=draft is not None)
    see(overlap, hit_rate)
    if draft is not None:
        see(overlap, draft, drafted=True)
    for n_tokens, taken in seconds.items():
        for _ in range(MANY):
            overlap.took(n_tokens, taken)
    return overlap


def see(overlap: Overlap, hit_rate: float, *, drafted: bool = False) -> None:
    """Shows a choice many guesses, of which this share is right."""
    due = 0.0
    for _ in range(MANY):
        due += hit_rate
        hit = due >= 1
        due -= hit
        overlap.guessed(hit=hit, drafted=drafted)


def test_every_way_to_guess_is_tried_before_one_is_chosen() -> None:
    overlap = Overlap("auto", 3)
    assert overlap.choose(2) == Guessing(n=3)
    for _ in range(3):
        overlap.took(8, 1.0)
    assert overlap.choose(2) == Guessing(n=3, drafts=True)
    for _ in range(3):
        overlap.took(10, 1.0)
    assert overlap.choose(2) == Guessing(n=3, drafts=True)  # what drafts are taken to be worth


def test_the_first_guesses_count_more_than_what_was_taken_for_granted() -> None:
    overlap = Overlap("auto")
    for n_tokens, seconds in {1: 0.8, 2: 1.0, 3: 1.2}.items():
        for _ in range(3):
            overlap.took(n_tokens, seconds)
    assert overlap.choose(1) == Guessing(n=1)
    for hit in (True, False, False, False):
        overlap.guessed(hit=hit)
    assert overlap.choose(1) == Guessing(n=1, drafts=True)


def test_on_and_off_do_not_ask_what_it_costs() -> None:
    never_right = {1: 1.0, 2: 10.0}
    on, off = Overlap("on", 2), Overlap("off", 2)
    for overlap in (on, off):
        for n_tokens, seconds in never_right.items():
            overlap.took(n_tokens, seconds)
    assert on.choose(1) == Guessing(n=2, drafts=True)
    assert Overlap("on", drafts=False).choose(1) == Guessing(n=1)
    assert off.choose(1).n == 0


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
    assert overlap_of(hit_rate, {1: 1.0, 2: cost}).choose(1).n == int(pays)


@pytest.mark.parametrize(
    ("hit_rate", "draft", "cost", "drafts"),
    [
        (0.6, 0.95, 1.2, True),
        (0.6, 0.95, 1.5, False),
        (0.9, 0.95, 1.2, False),
        (0.9, 0.95, 1.0, True),
    ],
)
def test_a_draft_pays_while_it_saves_more_than_its_row_costs(
    hit_rate: float, draft: float, cost: float, drafts: bool
) -> None:
    # A wrong guess costs a step of one row, after a draft one of two, since it drafts anew.
    assert (cost + (1 - draft) * 1.0 < 1.0 + (1 - hit_rate) * 0.9) == drafts
    overlap = overlap_of(hit_rate, {1: 0.9, 2: 1.0, 3: cost}, draft=draft)
    assert overlap.choose(1) == Guessing(n=1, drafts=drafts)


def test_other_ways_are_tried_again_now_and_then() -> None:
    overlap = overlap_of(0.6, {1: 1.0, 2: 1.1, 3: 3.0}, draft=0.95)
    chosen = [overlap.choose(1) for _ in range(200)]
    assert chosen.count(Guessing(n=1, drafts=True)) == 3
    assert chosen.count(Guessing(n=1)) == 197


def test_the_number_of_arms_decides_which_steps_are_compared() -> None:
    """Rows that are free for one request may not be for eight."""
    overlap = overlap_of(0.75, {1: 1.0, 2: 1.1, 8: 2.0, 16: 4.0})
    assert overlap.choose(1).n == 1
    assert overlap.choose(8).n == 0


@pytest.mark.parametrize("n_others", [0, 1, 2, 3, 4, 9])
def test_the_cheapest_way_is_found_beside_arms_that_read_a_token_each(n_others: int) -> None:
    """They are part of every step that is measured, so they are of those that are compared."""
    overlap = Overlap("auto")
    hit_rates = {False: 0.7, True: 0.95}
    due = {False: 0.0, True: 0.0}
    chosen = []
    missed = False
    for _ in range(1000):
        way = overlap.choose(1, n_others)
        chosen.append(way)
        # After a wrong guess the scaling row reads the token alone, and the arm's own a draft.
        n_tokens = (1 + way.drafts if missed else 1 + way.n + way.drafts) + n_others
        overlap.took(n_tokens, 1.0 + 0.001 * n_tokens)  # rows are nearly free, so drafts pay
        if missed:
            missed = False
            continue
        due[way.drafts] += hit_rates[way.drafts]
        hit = due[way.drafts] >= 1
        due[way.drafts] -= hit
        overlap.guessed(hit=hit, drafted=way.drafts)
        missed = not hit
    assert chosen[-500:].count(Guessing(n=1, drafts=True)) > 480


def test_arms_that_are_not_routed_are_counted(tmp_path: Path) -> None:
    """Or steps would never have the size whose cost is asked for."""
    counts: list[tuple[int, int]] = []
    sizes: list[int] = []

    class Watched(Overlap):
        def choose(self, n_arms: int, n_others: int = 0) -> Guessing:
            counts.append((n_arms, n_others))
            return super().choose(n_arms, n_others)

        def took(self, n_tokens: int, seconds: float) -> None:
            sizes.append(n_tokens)
            super().took(n_tokens, seconds)

    model = tiny_chat_xlora(tmp_path)
    arms = (Arm.routed(), Arm.merged(), Arm.base(), Arm.expert("code"))
    sampling = SamplingParams(max_new_tokens=12)
    request = Request(
        header=ModelIdentity(model, "tiny").header("", sampling),
        prompt=EncodedPrompt(text="", token_ids=[5, 9, 4]),
        arms=arms,
        sampling=sampling,
        with_base_logprob=True,
    )
    reader = open_rows(model)
    assert reader is not None
    scheduler = Scheduler(
        RowRunner(model, reader, Watched("on")),
        tiny_tokenizer(),
        stop_ids=frozenset(),
        context_length=64,
    )
    with torch.inference_mode():
        scheduler.admit(request)
        while not request.ended:
            scheduler.round()
    assert counts[:2] == [(1, 3), (1, 3)]
    # The largest steps, with a draft and a guess, are as large as those that are looked up.
    assert max(sizes) == Guessing(n=1, drafts=True).n_tokens(1, 3)


def test_siblings_are_more_rows() -> None:
    seconds = {1: 1.0, 2: 1.1, 4: 2.0}
    assert overlap_of(0.75, seconds).choose(1).n == 1
    assert overlap_of(0.75, seconds, n_siblings=3).choose(1).n == 0


def test_steps_of_quite_another_size_say_nothing() -> None:
    assert overlap_of(0.1, {1: 1.0, 64: 100.0}).choose(1).n == 1


def test_it_changes_its_mind_when_guesses_get_better() -> None:
    overlap = overlap_of(0.2, {1: 1.0, 2: 1.5})
    assert overlap.choose(1).n == 0
    for _ in range(MANY):
        overlap.guessed(hit=True)
    assert overlap.choose(1).n == 1


def test_one_slow_step_decides_nothing() -> None:
    overlap = Overlap("auto")
    for n_tokens in (1, 2):
        overlap.took(n_tokens, 100.0 * n_tokens)  # the first step of a size sets things up
    for _ in range(8):
        overlap.took(1, 1.0)
        overlap.took(2, 1.1)
    overlap.took(2, 50.0)
    assert overlap.choose(1).n == 1


def test_where_it_did_not_pay_it_is_tried_again_now_and_then() -> None:
    """Without guesses there are no steps of twice the rows, and nothing to learn that from."""
    overlap = overlap_of(0.75, {1: 1.0, 2: 10.0})
    tried = [overlap.choose(1).n for _ in range(200)]
    assert sum(tried) == 3
    for _ in range(8):
        overlap.took(2, 1.1)  # whatever kept the machine busy is gone
    assert overlap.choose(1).n == 1

"""Choosing tokens: greedy, temperature, top-k, top-p, repetition penalty, log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xlora_core.config import SamplingParams
from xlora_core.engine.sampling import Sampler, log_total
from xlora_core.errors import EngineError

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.5, 2.9, -torch.inf])
N_DRAWS = 4000


def sampler(prompt: tuple[int, ...] = (), **params: object) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, n_alternatives=3)  # type: ignore[arg-type]


def frequencies(logits: torch.Tensor, **params: object) -> torch.Tensor:
    chooser = sampler(temperature=params.pop("temperature", 1.0), **params)
    counts = torch.zeros(logits.shape[0])
    for _ in range(N_DRAWS):
        counts[chooser.choose(logits).token_id] += 1
    return counts / N_DRAWS


def test_greedy_takes_the_most_likely_token_and_reports_log_probabilities() -> None:
    choice = sampler().choose(LOGITS)
    expected = torch.log_softmax(LOGITS, dim=-1)
    assert choice.token_id == 1
    assert choice.logprob == pytest.approx(expected[1].item())
    assert choice.alternative_ids == [1, 4, 3]
    assert choice.alternative_logprobs == pytest.approx(expected[[1, 4, 3]].tolist())


def test_a_vocabulary_smaller_than_the_alternatives() -> None:
    assert sampler().choose(torch.tensor([1.0, 2.0])).alternative_ids == [1, 0]


def test_samples_follow_the_distribution() -> None:
    expected = torch.softmax(LOGITS / 0.7, dim=-1)
    found = frequencies(LOGITS, temperature=0.7)
    # 5 standard deviations of the least certain frequency
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / N_DRAWS)
    assert found[5] == 0


def test_a_tiny_temperature_is_greedy() -> None:
    assert sampler(temperature=1e-300).choose(LOGITS).token_id == 1


def test_top_k_keeps_what_hugging_face_keeps() -> None:
    found = frequencies(LOGITS, top_k=2)
    kept = TopKLogitsWarper(2)(torch.zeros(1, 1), LOGITS[None])[0] > -torch.inf
    assert torch.equal(found > 0, kept)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_what_hugging_face_keeps(top_p: float) -> None:
    found = frequencies(LOGITS, top_p=top_p)
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1), LOGITS[None])[0] > -torch.inf
    assert torch.equal(found > 0, kept)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    ids = torch.tensor([[1, 4]])
    expected = int(RepetitionPenaltyLogitsProcessor(1.5)(ids, LOGITS[None])[0].argmax())
    chooser = sampler(prompt=(1, 4, 1), repetition_penalty=1.5)
    assert chooser.choose(LOGITS).token_id == expected == 3
    assert chooser.choose(LOGITS).token_id == 1  # 3 is penalised now, too: 2.0, 1.93, 1.67


def test_the_penalty_does_not_touch_the_reported_log_probability() -> None:
    choice = sampler(prompt=(1, 4), repetition_penalty=1.5).choose(LOGITS)
    assert choice.logprob == pytest.approx(torch.log_softmax(LOGITS, dim=-1)[3].item())


def test_the_seed_decides_and_not_the_global_generator() -> None:
    def draw(seed: int) -> list[int]:
        chooser = sampler(temperature=2.0, seed=seed)
        return [chooser.choose(LOGITS).token_id for _ in range(20)]

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert draw(3) == first
    assert draw(4) != first


def test_equal_seeds_draw_alike_from_close_distributions() -> None:
    """The noise is shared: two arms differ where their models do, not by luck."""
    a, b = sampler(temperature=1.0), sampler(temperature=1.0)
    nearly = LOGITS + torch.tensor([0.01, 0.0, 0.0, -0.01, 0.0, 0.0])
    same = sum(a.choose(LOGITS).token_id == b.choose(nearly).token_id for _ in range(200))
    assert same > 190


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = LOGITS.clone()
    logits[0] = bad
    with pytest.raises(EngineError, match="logits are not finite"):
        sampler().choose(logits)


def test_all_tokens_at_minus_infinity_are_refused() -> None:
    with pytest.raises(EngineError, match="logits are not finite"):
        log_total(torch.full((3,), -torch.inf))


def test_half_precision_logits_are_measured_in_float32() -> None:
    logits = LOGITS.to(torch.bfloat16)
    expected = torch.log_softmax(logits.float(), dim=-1)[1].item()
    assert sampler().choose(logits).logprob == pytest.approx(expected, abs=1e-6)

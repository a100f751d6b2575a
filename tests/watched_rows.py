"""Rows whose reads a test may watch, hold, or let fail; and runs to compare with arms in turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.lone_rows import LoneRows
from tests.tiny_chat import tiny_tokenizer
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine
from xlora_core.model import XLoraModel
from xlora_core.recording import Run
from xlora_core.rows import RowBatch, opening

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox and 你好"
N_PROMPT = len(TOKENIZER(PROMPT)["input_ids"])
N_NEW = 10
GREEDY = SamplingParams(max_new_tokens=N_NEW)
SAMPLED = SamplingParams(max_new_tokens=N_NEW, temperature=1.2, top_p=0.9, seed=3)
ARMS = (
    Arm.routed(),
    Arm.merged(),
    Arm.base(),
    Arm.expert("code"),
    Arm.routed(RoutingKnobs(top_k=1, temperature=0.4, global_weight=1.5)),
)
PATIENCE = 60


class Steps(LoneRows):
    """Rows whose reads a test may watch, hold, or let fail."""

    before: Callable[[RowBatch], None] | None = None

    def read(self, batch: RowBatch) -> torch.Tensor:
        """Reads, after the test has had its say."""
        if self.before is not None:
            self.before(batch)
        return super().read(batch)


def read_by_steps(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Lets every engine of a test read by the rows returned: each alone, so none is mixed up."""
    reader = Steps(model)
    monkeypatch.setattr(opening, "open_rows", lambda *_, **__: reader)
    return reader


def in_turn(model: XLoraModel, arms: tuple[Arm, ...], sampling: SamplingParams) -> Run:
    """Returns the run as the model's own passes make it, arm after arm."""
    with Engine(model, TOKENIZER, batched=False) as engine:
        return engine.run(PROMPT, arms, sampling)


def assert_same(run: Run, expected: Run) -> None:
    """Compares texts, log-probabilities, routing and knobs, token by token."""
    for track, other in zip(run.tracks, expected.tracks, strict=True):
        assert track.token_ids.tolist() == other.token_ids.tolist()
        assert track.pieces == other.pieces
        assert track.finish_reason == other.finish_reason
        np.testing.assert_allclose(track.logprob, other.logprob, rtol=1e-6)
        np.testing.assert_allclose(track.base_logprob, other.base_logprob, rtol=1e-6)
        np.testing.assert_array_equal(track.alternative_ids, other.alternative_ids)
        assert (track.router_logits is None) == (other.router_logits is None)
        if track.router_logits is not None and other.router_logits is not None:
            assert track.n_routed == len(track.token_ids)
            np.testing.assert_allclose(track.router_logits, other.router_logits, atol=2e-3)
        np.testing.assert_array_equal(track.top_k, other.top_k)
        np.testing.assert_array_equal(track.temperature, other.temperature)

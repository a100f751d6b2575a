"""Every arm answers held-out questions."""

from __future__ import annotations

import pytest

from tests.tiny_chat import EXPERTS, tiny_chat_xlora, tiny_tokenizer
from tests.training_models import row
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.model import XLoraModel
from xlora_core.training.answer_questions import AnswerSettings
from xlora_core.training.answer_runs import Answer, write_answers

SETTINGS = AnswerSettings(rows=3, max_new_tokens=6)
ROWS = {"math": [row(f"{i} + {i}?", str(2 * i)) for i in range(3)]}
ARMS = ["base", "uniform", "best_merge", "routed", "right"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("model"))


def written(model: XLoraModel, weights: tuple[float, ...] | None) -> list[Answer]:
    merge = None if weights is None else dict(zip(EXPERTS, weights, strict=True))
    return write_answers(model, tiny_tokenizer(), ROWS, SETTINGS, merge_weights=merge)


def test_every_arm_writes_what_the_engine_writes(model: XLoraModel) -> None:
    answers = written(model, (0.0, 1.0, 0.0))
    assert [answer.id for answer in answers] == [row.id for row in ROWS["math"]]
    arms = [Arm.base(), Arm.merged(), Arm.expert("code"), Arm.routed(), Arm.expert("math")]
    sampling = SamplingParams(max_new_tokens=6)
    with Engine(model, tiny_tokenizer()) as engine:
        run = engine.run([{"role": "user", "content": "1 + 1?"}], arms, sampling)
    assert list(answers[1].texts) == ARMS
    assert list(answers[1].texts.values()) == [run.text(i, stop_token=False) for i in range(5)]
    reasons = [run.track(i).finish_reason for i in range(5)]
    assert answers[1].cut == [
        arm for arm, reason in zip(ARMS, reasons, strict=True) if reason == "length"
    ]


def test_a_merge_of_equal_weights_is_the_uniform_one(model: XLoraModel) -> None:
    for answer in written(model, (1 / 3, 1 / 3, 1 / 3)):
        assert answer.texts["best_merge"] == answer.texts["uniform"]
    assert "best_merge" not in written(model, None)[0].texts


def test_nothing_is_asked_without_rows(model: XLoraModel) -> None:
    assert write_answers(model, tiny_tokenizer(), {}, SETTINGS) == []

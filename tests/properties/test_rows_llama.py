"""Rows read by the fast step are the texts read alone, in float64, near-exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.row_texts import RowText, assert_as_alone, random_text, read_on
from tests.tiny_models import tiny_xlora
from xlora_core.model import XLoraModel
from xlora_core.rows.llama import LlamaRows

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp("llama"), dtype=torch.float64)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """The same model, whose weights no reader has touched."""
    return tiny_xlora(tmp_path_factory.mktemp("twin"), dtype=torch.float64)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_schedule_reads_each_text_as_alone(
    model: XLoraModel, twin: XLoraModel, data: st.DataObject
) -> None:
    """Whatever is read together, in whatever order, and whatever lay in a row before."""
    reader = LlamaRows(model)
    waiting = [
        random_text(twin, 0, length, adapted=adapted, seed=seed)
        for seed, (length, adapted) in enumerate(
            data.draw(
                st.lists(st.tuples(st.integers(1, 14), st.booleans()), min_size=1, max_size=6),
                label="length and adapters of each text",
            )
        )
    ]
    free = list(data.draw(st.permutations(range(4)), label="rows"))
    active: list[RowText] = []
    while waiting or active:
        while free and waiting:
            text = waiting.pop(0)
            text.row = free.pop()
            active.append(text)
        chosen = data.draw(
            st.lists(st.sampled_from(range(len(active))), min_size=1, unique=True), label="who"
        )
        reads = [
            (active[i], data.draw(st.integers(1, active[i].n_left), label="n")) for i in chosen
        ]
        read_on(reader, reads, n_wrong=data.draw(st.integers(0, 2), label="siblings"))
        for text in [text for text in active if not text.n_left]:
            assert_as_alone(twin, reader, text, TOLERANCE)
            active.remove(text)
            free.append(text.row)

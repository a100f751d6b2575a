"""Encoder-decoders of any shape and knobs are the mixture by hand, whole or read in parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.seq2seq_models import FAMILIES, run_by_hand, seq2seq_xlora, tokens
from xlora_core.config import RoutingKnobs
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 1e-8}
lengths = st.integers(1, 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, XLoraModel]:
    return {name: seq2seq_xlora(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    batch=st.integers(1, 4),
    source_length=lengths,
    target_length=lengths,
    top_k=st.integers(1, 3),
    weight=st.floats(-1.5, 1.5),
    seed=st.integers(0, 99),
    cut=st.integers(0, 6),
)
def test_any_shape_under_any_knobs(
    models: dict[str, XLoraModel],
    family: str,
    batch: int,
    source_length: int,
    target_length: int,
    top_k: int,
    weight: float,
    seed: int,
    cut: int,
) -> None:
    model, knobs = models[family], RoutingKnobs(top_k=top_k, global_weight=weight)
    source = tokens(batch, source_length, seed)
    labels = tokens(batch, target_length, seed + 1)

    def route(scalings: Tensor) -> Tensor:
        kept = scalings >= scalings.sort(dim=-1, descending=True).values[..., [top_k - 1]]
        return weight * scalings * kept

    expected = run_by_hand(model, family, source, labels, route=route)
    with torch.no_grad():
        output = model(input_ids=source, labels=labels, knobs=knobs)
    torch.testing.assert_close(output.loss, expected.loss.detach(), **NEAR)
    torch.testing.assert_close(output.logits, expected.logits.detach(), **NEAR)

    # The same target, read in two parts over a cache.
    target = model.prepare_decoder_input_ids_from_labels(labels=labels)
    cut = min(cut, target_length - 1)
    cache, parts = model.new_cache(), []
    with torch.no_grad():
        encoded = model.encode(input_ids=source, knobs=knobs)
        for part in target.tensor_split((cut,), dim=1):
            if part.shape[1]:
                step = model(
                    encoder_outputs=encoded,
                    decoder_input_ids=part,
                    past_key_values=cache,
                    knobs=knobs,
                )
                parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), output.logits, **NEAR)
    torch.testing.assert_close(cache.logged.tensor(), expected.target.detach(), **NEAR)

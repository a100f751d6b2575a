"""Rows read through a model's modules are the texts read alone, in float64, near-exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.decoders import Decoder, decoder_xlora, decoders
from tests.row_texts import RowText, assert_as_alone, random_text, read_on
from xlora_core.model import XLoraModel
from xlora_core.rows.masks import ExplicitMasks, PaddingMasks, RowMasks
from xlora_core.rows.modules import ModuleRows, cached_shapes

# Rotary positions; windows in some layers and a soft cap; ALiBi, which no explicit mask serves.
SCHEDULED = ("llama", "gemma2", "bloom")


@pytest.fixture(autouse=True, scope="module")
def softmax_in_float64() -> Iterator[None]:
    """Lets plain attention keep its precision; it computes the softmax in float32 always."""
    softmax = functional.softmax

    def precise(x: Tensor, dim: int, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "softmax", precise)
        yield


def module_rows(model: XLoraModel, decoder: Decoder) -> ModuleRows:
    backbone = model.base_model.base_model
    explicit = decoder.masks == "explicit"
    masks: RowMasks = ExplicitMasks(backbone) if explicit else PaddingMasks(backbone)
    return ModuleRows(model, cached_shapes(model), masks)


@pytest.mark.parametrize("name", sorted(decoders()))
def test_mixed_batches_are_each_text_alone(tmp_path: Path, name: str) -> None:
    """Chunks, single tokens, siblings, rows used again and a cache that grows, all at once."""
    decoder = decoders()[name]
    model = decoder_xlora(tmp_path, decoder)
    reader = module_rows(model, decoder)
    adapted = random_text(model, 2, 20, adapted=True, seed=1)
    plain = random_text(model, 0, 14, adapted=False, seed=2)
    short = random_text(model, 3, 4, adapted=True, seed=3)
    read_on(reader, [(plain, 9)])
    read_on(reader, [(plain, 1), (adapted, 7)])
    read_on(reader, [(adapted, 1), (plain, 1), (short, 3)], n_wrong=2)
    read_on(reader, [(short, 1), (adapted, 1)])
    assert_as_alone(model, reader, short, decoder.tolerance)
    # Its row goes to another text, which is shorter than what lies there.
    again = random_text(model, 3, 3, adapted=False, seed=4)
    read_on(reader, [(again, 2), (adapted, 9)], n_wrong=1)
    read_on(reader, [(again, 1), (plain, 1), (adapted, 1)], n_wrong=1)
    read_on(reader, [(adapted, 1), (plain, 2)])
    # Two texts as long as each other: an ordinary batch.
    twins = [random_text(model, row, 5, adapted=row == 1, seed=row) for row in (1, 3)]
    for n in (4, 1):
        read_on(reader, [(twin, n) for twin in twins])
    for text in (adapted, plain, again, *twins):
        assert_as_alone(model, reader, text, decoder.tolerance)


@pytest.mark.parametrize("name", SCHEDULED)
def test_an_erased_row_of_a_broken_text_is_as_good_as_new(tmp_path: Path, name: str) -> None:
    decoder = decoders()[name]
    model = decoder_xlora(tmp_path, decoder)
    reader = module_rows(model, decoder)
    broken = random_text(model, 1, 9, adapted=True)
    assert broken.scalings is not None
    broken.scalings.fill_(torch.nan)
    beside = random_text(model, 0, 12, adapted=False, seed=1)
    read_on(reader, [(broken, 9), (beside, 9)])
    reader.cache.erase([1], 9)
    after = random_text(model, 1, 4, adapted=False, seed=2)
    read_on(reader, [(after, 2)])
    read_on(reader, [(after, 1), (beside, 1)])
    for text in (after, beside):
        assert_as_alone(model, reader, text, decoder.tolerance)


@pytest.fixture(scope="module", params=SCHEDULED)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, XLoraModel]:
    decoder = decoders()[request.param]
    return decoder, decoder_xlora(tmp_path_factory.mktemp(request.param), decoder)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_schedule_reads_each_text_as_alone(
    opened: tuple[Decoder, XLoraModel], data: st.DataObject
) -> None:
    """Whatever is read together, in whatever order, and whatever lay in a row before."""
    decoder, model = opened
    reader = module_rows(model, decoder)
    waiting = [
        random_text(model, 0, length, adapted=adapted, seed=seed)
        for seed, (length, adapted) in enumerate(
            data.draw(
                st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=5),
                label="length and adapters of each text",
            )
        )
    ]
    free = data.draw(st.permutations(range(3)), label="rows")
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
            assert_as_alone(model, reader, text, decoder.tolerance)
            active.remove(text)
            free.append(text.row)

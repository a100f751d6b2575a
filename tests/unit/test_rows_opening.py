"""Which reader a model's rows get, and which models get none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.decoders import (
    Decoder,
    decoder_xlora,
    decoders,
    longrope_decoder,
    refused_decoders,
)
from tests.gated_models import gated_xlora
from tests.seq2seq_models import seq2seq_xlora
from tests.tiny_models import tiny_prompt, tiny_xlora
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch, RowReader
from xlora_core.rows.llama import LlamaRows
from xlora_core.rows.masks import ExplicitMasks
from xlora_core.rows.modules import ModuleRows, cached_shapes
from xlora_core.rows.opening import open_rows
from xlora_core.rows.probe import Probe

LOGGER = "xlora_core.rows.opening"
# Read by LlamaRows; everything else by the model's modules.
LLAMA_SHAPED = {"llama", "qwen2", "qwen3"}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns what was logged here; transformers has things to say of its own."""
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("name", sorted(decoders()))
def test_every_known_decoder_has_a_reader(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = decoders()[name]
    with caplog.at_level(logging.WARNING, LOGGER):
        reader = open_rows(decoder_xlora(tmp_path, decoder))
    assert not told(caplog)
    assert type(reader) is (LlamaRows if name in LLAMA_SHAPED else ModuleRows)


@pytest.mark.parametrize("name", sorted(n for n, d in decoders().items() if d.masks == "padding"))
def test_an_explicit_mask_is_not_used_where_it_is_wrong(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        open_rows(decoder_xlora(tmp_path, decoders()[name]))
    assert "by the model's modules with padding masks; not by" in caplog.text


def test_frequencies_that_change_at_a_length_are_served(tmp_path: Path) -> None:
    assert isinstance(open_rows(decoder_xlora(tmp_path, longrope_decoder())), ModuleRows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom"])
def test_rounding_is_no_reason_to_refuse(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = decoder_xlora(tmp_path, decoders()[name], dtype=dtype)
    assert isinstance(open_rows(model), RowReader)


# ---------------------------------------------------------------- none


@pytest.mark.parametrize("name", sorted(refused_decoders()))
def test_a_decoder_whose_numbers_would_change_has_none(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, reason = refused_decoders()[name]
    with caplog.at_level(logging.WARNING, LOGGER):
        assert open_rows(decoder_xlora(tmp_path, decoder)) is None
    (message,) = told(caplog)
    assert reason in message


def per_layer(folder: Path) -> XLoraModel:
    return gated_xlora(folder)


def encoder_decoder(folder: Path) -> XLoraModel:
    return seq2seq_xlora(folder, "t5")


def adapted_head(folder: Path) -> XLoraModel:
    return decoder_xlora(folder, decoders()["gpt2"], extra_targets=["lm_head"])


def in_training(folder: Path) -> XLoraModel:
    return tiny_xlora(folder).train()


def merged(folder: Path) -> XLoraModel:
    model = tiny_xlora(folder)
    model.merge_and_unload()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (per_layer, "routes for itself"),
        (encoder_decoder, "encoder-decoder"),
        (adapted_head, "its head has adapters"),
        (in_training, "training mode"),
        (merged, "was merged into its base model"),
    ],
)
def test_models_that_rows_cannot_serve_have_none(
    tmp_path: Path,
    make: Callable[[Path], XLoraModel],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make(tmp_path)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert open_rows(model) is None
    (message,) = told(caplog)
    assert reason in message


# ---------------------------------------------------------------- the probe


class Altered(RowReader):
    """A reader with a fault."""

    def __init__(
        self,
        inner: RowReader,
        *,
        batch: Callable[[RowBatch], RowBatch] = lambda batch: batch,
        hidden: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        logits: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        self.cache = inner.cache
        self._inner = inner
        self._batch, self._hidden, self._logits = batch, hidden, logits

    def read(self, batch: RowBatch) -> Tensor:
        return self._hidden(self._inner.read(self._batch(batch)))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits(self._inner.logits(hidden))


def without_scalings(batch: RowBatch) -> RowBatch:
    return replace(batch, scalings=None)


def with_anothers_scalings(batch: RowBatch) -> RowBatch:
    assert batch.scalings is not None
    return replace(batch, scalings=batch.scalings.flip(-2))


def with_scalings_for_all(batch: RowBatch) -> RowBatch:
    assert batch.scalings is not None
    missing = batch.n_tokens - batch.n_adapted
    return replace(
        batch, scalings=torch.cat([batch.scalings, batch.scalings[:1].expand(missing, -1, -1)])
    )


def with_siblings_in_a_row(batch: RowBatch) -> RowBatch:
    return replace(batch, segments=[replace(s, siblings=False) for s in batch.segments])


def with_rows_exchanged(batch: RowBatch) -> RowBatch:
    return replace(batch, segments=[replace(s, row=1 - s.row) for s in batch.segments])


def one_place_early(batch: RowBatch) -> RowBatch:
    return replace(batch, segments=[replace(s, start=s.start - 1) for s in batch.segments])


FAULTS: dict[str, dict[str, Callable[..., object]]] = {
    "scalings ignored": {"batch": without_scalings},
    "scalings of another module": {"batch": with_anothers_scalings},
    "scalings where none belong": {"batch": with_scalings_for_all},
    "siblings see each other": {"batch": with_siblings_in_a_row},
    "rows exchanged": {"batch": with_rows_exchanged},
    "positions off by one": {"batch": one_place_early},
    "order reversed": {"hidden": lambda hidden: hidden.flip(0)},
    "not a number": {"hidden": lambda hidden: hidden * torch.nan},
    "head without its scale": {"logits": lambda logits: logits * 1.1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_probe_finds_a_fault(tmp_path: Path, fault: str, dtype: torch.dtype) -> None:
    model = decoder_xlora(tmp_path, decoders()["gemma"], dtype=dtype)
    inner = ModuleRows(model, cached_shapes(model), ExplicitMasks(model.base_model.base_model))
    probe = Probe(model, cached_shapes(model))
    probe.check(inner)
    reader = Altered(inner, **FAULTS[fault])  # type: ignore[arg-type]  # of its arguments' types
    with pytest.raises(ModelError, match="differ from the model's own"):
        probe.check(reader)
    assert reader.cache.n_rows == 0


def test_a_reader_that_fails_leaves_its_place_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(reader: LlamaRows, batch: RowBatch) -> Tensor:
        raise IndexError("a model that it was not made for")

    monkeypatch.setattr(LlamaRows, "read", breaks)
    with caplog.at_level(logging.INFO, LOGGER):
        reader = open_rows(tiny_xlora(tmp_path))
    assert isinstance(reader, ModuleRows)
    assert "IndexError: a model that it was not made for" in caplog.text


def test_a_reader_with_other_numbers_leaves_its_place_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LlamaRows.read
    monkeypatch.setattr(LlamaRows, "read", lambda self, batch: read(self, batch) + 0.1)
    assert isinstance(open_rows(tiny_xlora(tmp_path)), ModuleRows)


def test_with_no_reader_left_every_fault_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for reader in (LlamaRows, ModuleRows):
        monkeypatch.setattr(reader, "logits", lambda self, hidden: hidden)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert open_rows(tiny_xlora(tmp_path)) is None
    (message,) = told(caplog)
    for name in ("Llama's blocks", "explicit masks", "padding masks"):
        assert name in message


def test_opening_leaves_no_trace(tmp_path: Path) -> None:
    model = decoder_xlora(tmp_path, decoders()["llama"])
    ids = tiny_prompt()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    latest = model.get_latest_scalings()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reader = open_rows(model)
    assert torch.equal(torch.rand(3), expected)
    assert reader is not None
    assert (reader.cache.n_rows, reader.cache.n_tokens) == (0, 0)
    assert torch.equal(model.get_latest_scalings(), latest)
    assert model.active_scalings.value is None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-10, rtol=0)


def test_opening_costs_a_few_short_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start must not wait for it: eight calls, of a few tokens each."""
    model = decoder_xlora(tmp_path, decoders()["gemma"])
    lengths: list[int] = []
    backbone = model.base_model.base_model
    forward = backbone.forward

    def counted(input_ids: Tensor, **inputs: object) -> object:
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(backbone, "forward", counted)
    # Its signature is what says which arguments a backbone takes: it is the class's.
    assert open_rows(model) is not None
    assert len(lengths) == 8
    assert max(lengths) <= 7


def test_the_probe_looks_beyond_every_window(tmp_path: Path) -> None:
    """Windows that only the model knows of are found out, see ``gpt_neo``; even long ones."""
    config = refused_decoders()["gpt_neo"][0].config
    config.window_size = 60
    model = decoder_xlora(tmp_path, Decoder(config, ("q_proj",)))
    assert open_rows(model) is None

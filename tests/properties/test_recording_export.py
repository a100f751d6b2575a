"""Laws of the export: no cell begins a formula, and every text comes back."""

from __future__ import annotations

import csv
import io

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recorded_runs import make_run
from xlora_core.recording import defuse, undefuse

FORMULA_STARTS = "=+-@\t\r"
# Rich in what matters here: signs, blanks, quotes, separators.
TEXTS = st.text(
    st.sampled_from("=+-@\t\r\n '\",;a1é😀\x00\u00a0\ufeff") | st.characters(), max_size=6
)


@given(text=TEXTS)
def test_defusing_is_undone_exactly(text: str) -> None:
    assert undefuse(defuse(text)) == text
    assert defuse(text) in (text, "'" + text)


@given(text=TEXTS)
def test_no_defused_text_begins_a_formula(text: str) -> None:
    cell = defuse(text)
    assert not cell.startswith(tuple(FORMULA_STARTS))
    assert not cell.lstrip().startswith(tuple("=+-@"))


@given(text=TEXTS.filter(lambda text: not set(text) & set("=+-@\t\r＝＋－＠")))
def test_texts_without_signs_are_left_alone(text: str) -> None:
    assert defuse(text) == text


@given(pieces=st.lists(TEXTS, min_size=2, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_the_long_csv_comes_back_through_pandas(pieces, seed) -> None:
    run = make_run(1, len(pieces) - 1, pieces=pieces, seed=seed, enable_softmax=False)
    text = run.to_csv_text("token")
    texts = dict.fromkeys(["text", "arm", "layer_name", "adapter"], str)
    read = pd.read_csv(io.StringIO(text, newline=""), dtype=texts, keep_default_na=False)
    table = run.long_table()
    assert [undefuse(cell) for cell in read["text"]] == table["text"].tolist()
    assert read["token_index"].tolist() == table["token_index"].tolist()
    for name in ("scaling", "effective_scaling"):
        np.testing.assert_array_equal(read[name].astype(np.float32), table[name])
    for row in csv.reader(io.StringIO(text, newline="")):
        assert not row[5].startswith(tuple(FORMULA_STARTS))
        assert len(row) == len(table.columns)

"""CSV and Parquet: exact headers, nothing lost, nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
from functools import partial

import numpy as np
import pandas as pd
import pytest

from tests.recorded_runs import ADAPTERS, LAYERS, expected_scalings, make_run
from xlora_core import Arm, RoutingKnobs, Run
from xlora_core.errors import ConfigError, RecordError
from xlora_core.recording import LONG_COLUMNS, defuse, export, long_table, undefuse

LONG_HEADER = (
    "run_id,arm,token_index,segment,token_id,text,layer_index,layer_name,adapter,present,"
    "scaling,effective_scaling,top_k,temperature,global_weight,overrides"
)
PIECES = ["=1+1", " @SUM(A1)", "-3", "\t", "\r", '"q", <script>', "\ud83d", "\x00"]


def read_csv(text: str) -> pd.DataFrame:
    """Returns the table with texts as they stand in the cells."""
    texts = dict.fromkeys(["arm", "text", "layer_name", "adapter", "segment", "run_id"], str)
    return pd.read_csv(io.StringIO(text), dtype=texts, keep_default_na=False, na_values=[""])


def test_long_table_has_one_row_per_token_module_and_adapter() -> None:
    knobs = [
        RoutingKnobs(top_k=1 + t % 3, temperature=1.0 + t, global_weight=2.0) for t in range(5)
    ]
    run = make_run(2, 3, knobs=knobs)
    table = run.long_table()
    assert ",".join(table.columns) == LONG_HEADER == ",".join(LONG_COLUMNS)
    keys = zip(table["token_index"], table["layer_index"], table["adapter"], strict=True)
    assert list(keys) == [(t, layer, a) for t in range(5) for layer in range(2) for a in ADAPTERS]
    assert table["layer_name"].tolist()[:6] == [LAYERS[0]] * 3 + [LAYERS[1]] * 3
    assert table["present"].tolist()[:6] == [True, True, True, True, False, True]
    per_token = table.groupby("token_index").first()
    assert per_token["token_id"].tolist() == [0, 1, 2, 3, 4]
    assert per_token["text"].tolist() == [" t0", " t1", " t2", " t3", " t4"]
    assert per_token["segment"].tolist() == ["prompt"] * 2 + ["response"] * 3
    assert per_token["top_k"].tolist() == [1, 2, 3, 1, 2]
    assert per_token["temperature"].tolist() == [1, 2, 3, 4, 5]
    assert per_token["global_weight"].tolist() == [2] * 5
    for column, effective in (("scaling", False), ("effective_scaling", True)):
        expected = expected_scalings(run, 0, None, effective=effective)
        np.testing.assert_allclose(table[column], expected.ravel(), rtol=1e-5, atol=1e-6)


def test_long_table_says_which_knobs_it_was_routed_with() -> None:
    knobs = RoutingKnobs(top_k=2, temperature=0.5, global_weight=-1.0)
    run = make_run(arms=[Arm.routed(), Arm.merged()])
    table = run.long_table(knobs)
    routed, merged = (table[table["arm"] == arm] for arm in ("routed", "merged"))
    for name in ("top_k", "temperature", "global_weight"):
        assert set(routed[name]) == {getattr(knobs, name)}
        assert merged[name].isna().all()
    np.testing.assert_array_equal(routed["effective_scaling"], run.scalings(0, knobs, True).ravel())
    assert set(run.long_table(RoutingKnobs(), arm=0)["top_k"]) == {0}


def test_a_token_that_was_not_read_has_a_row_without_scalings() -> None:
    run = make_run(3, 2, finish="error", n_routed=4)
    table = run.long_table()
    assert len(table) == 5 * 2 * 3
    last = table[table["token_index"] == 4]
    for column in ("scaling", "effective_scaling", "top_k", "temperature", "global_weight"):
        assert last[column].isna().all()
        assert table[table["token_index"] < 4][column].notna().all()
    cells = read_csv(run.to_csv_text("token"))
    assert cells[cells["token_index"] == 4]["scaling"].isna().all()


@pytest.mark.parametrize("frame_rows", [1, 12, 13, 1000])
def test_frames_join_to_the_long_table(frame_rows) -> None:
    run = make_run(3, 5, arms=[Arm.routed(), Arm.merged()], layerwise=False)
    whole = run.long_table()
    frames = list(long_table.long_tables(run, frame_rows=frame_rows))
    assert len(frames) == 2 * -(-8 // max(1, frame_rows // 6))
    pd.testing.assert_frame_equal(pd.concat(frames, ignore_index=True), whole, check_exact=True)
    assert len(whole) == 2 * 8 * 2 * 3


@pytest.mark.parametrize("by", ["position", "segment", "seq_len", "token"])
def test_an_empty_run_is_a_header(by) -> None:
    text = make_run(0, 0).to_csv_text(by)
    assert text.count("\n") == 1
    assert text.startswith("run_id,arm,")


def test_csv_begins_with_the_plain_header_and_quotes_texts() -> None:
    lines = make_run().to_csv_text("position").splitlines()
    assert lines[0] == (
        "run_id,arm,bucket_by,bucket,bucket_start,bucket_end,n_tokens,layer_index,layer_name,"
        "adapter,mean_scaling,std_scaling,min_scaling,max_scaling,mean_effective_scaling,share_top1"
    )
    assert lines[1].startswith(
        '"0123456789abcdef0123456789abcdef","routed","position",0,0,8,8,0,"model.layers.0.q_proj",'
    )


@pytest.mark.parametrize("by", ["position", "segment", "seq_len"])
def test_bucketed_csv_reads_back_as_the_table(by, tmp_path) -> None:
    run = make_run(arms=[Arm.routed(), Arm.base()])
    run.to_csv(tmp_path / "x.csv", by=by, width=3)
    written = (tmp_path / "x.csv").read_bytes().decode("utf-8")
    assert written == run.to_csv_text(by, width=3)
    read = read_csv(written)
    table = run.bucketed(by, width=3)
    assert read.columns.tolist() == table.columns.tolist()
    for name in table.columns:
        expected = table[name]
        assert read[name].tolist() == expected.tolist() or np.allclose(
            read[name], expected, rtol=1e-6, atol=0
        )


def test_hostile_texts_come_back_from_the_csv(tmp_path) -> None:
    run = make_run(3, 5, pieces=PIECES)
    run.to_csv(tmp_path / "long.csv", by="token")
    text = (tmp_path / "long.csv").read_bytes().decode("utf-8")
    assert text == run.to_csv_text("token")
    cells = read_csv(text).groupby("token_index")["text"].first().tolist()
    # A lone surrogate is no UTF-8; it is written out.
    assert [undefuse(cell) for cell in cells] == [*PIECES[:6], "\\ud83d", "\x00"]
    assert cells[:6] == ["'=1+1", "' @SUM(A1)", "'-3", "'\t", "'\r", PIECES[5]]
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert {len(row) for row in rows} == {len(LONG_COLUMNS)}
    assert len(rows) == 1 + 8 * 2 * 3


def test_names_are_defused_and_negative_numbers_are_not() -> None:
    names = ("=cmd|' /C calc'!A0", "@x", "-1")
    modules = ("+a", "b")
    run = make_run(
        arms=[Arm.routed(), Arm.expert("=cmd|' /C calc'!A0")],
        adapter_names=names,
        layer_names=modules,
        adapter_hashes={},
        enable_softmax=False,
    )
    for by in ("position", "token"):
        cells = read_csv(run.to_csv_text(by))
        assert cells["adapter"].unique().tolist() == ["'" + name for name in names]
        assert cells["layer_name"].unique().tolist() == ["'+a", "b"]
    assert cells["arm"].unique().tolist() == ["routed", "expert:=cmd|' /C calc'!A0"]
    raw = [row[10] for row in csv.reader(io.StringIO(run.to_csv_text("token")))]
    negative = [cell for cell in raw if cell.startswith("-")]
    assert negative
    assert min(float(cell) for cell in negative) == run.scalings(0).min()


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1", "'=1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@a", "'@a"),
        ("\ta", "'\ta"),
        ("\ra", "'\ra"),
        ("  =1", "'  =1"),
        ("\n=1", "'\n=1"),
        ("\u00a0=1", "'\u00a0=1"),
        ("\ufeff=1", "'\ufeff=1"),
        ("\u200b=1", "'\u200b=1"),
        ("\x00=1", "'\x00=1"),
        ("＝1", "'＝1"),
        ("'=1", "''=1"),
        (" \t", "' \t"),
        ("a=1", "a=1"),
        ("'a", "'a"),
        ("\n", "\n"),
        ("", ""),
        (" ", " "),
        ("<script>", "<script>"),
    ],
)
def test_defuse(text, cell) -> None:
    assert defuse(text) == cell
    assert undefuse(cell) == text


@pytest.mark.parametrize("by", ["position", "segment", "seq_len", "token"])
def test_parquet_holds_what_the_csv_holds(by, tmp_path, monkeypatch) -> None:
    # Several frames, of which the file must be one table.
    monkeypatch.setattr(export, "long_tables", partial(long_table.long_tables, frame_rows=12))
    run = make_run(3, 5, pieces=PIECES, arms=[Arm.routed(), Arm.merged()])
    run.to_parquet(tmp_path / "x.parquet", by, 3)
    table = pd.read_parquet(tmp_path / "x.parquet")
    expected = run.bucketed(by, 3) if by != "token" else run.long_table()
    assert table.columns.tolist() == expected.columns.tolist()
    assert len(table) == len(expected)
    for name in expected.columns:
        values = expected[name]
        if isinstance(values.dtype, pd.CategoricalDtype):
            missing = values.isna().tolist()
            assert table[name].isna().tolist() == missing
            assert any(missing) == (name == "overrides")
            known = table[name][values.notna()].tolist()
            assert known == [defuse(text) for text in values.dropna()]
        else:
            assert str(table[name].dtype) == str(values.dtype)
            pd.testing.assert_series_equal(table[name], values, check_exact=True)


@pytest.mark.parametrize("write", [Run.to_csv, Run.to_parquet])
def test_a_file_that_cannot_be_written_is_said_so(write, tmp_path) -> None:
    run = make_run()
    with pytest.raises(RecordError, match=r"cannot write .*nowhere.*No such file") as caught:
        write(run, tmp_path / "nowhere" / "x")
    assert "choose a folder that exists" in caught.value.hint
    with pytest.raises(ConfigError, match="by must be one of position, segment, seq_len, token"):
        write(run, tmp_path / "x", by="day")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [Run.to_csv, Run.to_parquet])
def test_a_failure_leaves_the_file_of_before(write, tmp_path, monkeypatch) -> None:
    run = make_run(3, 5, arms=[Arm.routed(), Arm.merged()])
    path = tmp_path / "x"
    write(run, path, by="token")
    before = path.read_bytes()
    tables, arrow = [], export._arrow

    def fail_at_the_second(frame: pd.DataFrame) -> object:
        tables.append(frame)
        if len(tables) == 2:
            raise MemoryError("no room")
        return arrow(frame)

    monkeypatch.setattr(export, "_arrow", fail_at_the_second)
    with pytest.raises(MemoryError):
        write(run, path, by="token")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]

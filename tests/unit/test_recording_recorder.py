"""What a recorder takes, what it refuses, and what a snapshot shows."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.recorded_runs import make_header, record
from xlora_core import Arm, RoutingKnobs
from xlora_core.errors import ConfigError, RecordError
from xlora_core.recording import RunRecorder, Track, TrackRecorder, bytes_per_token

N_MODULES, N_ADAPTERS = 2, 3


def routed_recorder(capacity: int = 8) -> TrackRecorder:
    return TrackRecorder(Arm.routed(), capacity, N_MODULES, N_ADAPTERS, n_alternatives=2)


def logits(n: int, value: float = 1.0) -> np.ndarray:
    return np.full((n, N_MODULES, N_ADAPTERS), value, dtype=np.float32)


def test_a_finished_track_holds_every_row_as_it_was_given() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([5, 6], ["a", ""])
    recorder.set_router_logits(0, torch.arange(12, dtype=torch.float32).reshape(2, 2, 3))
    recorder.set_knobs(0, 2, RoutingKnobs(top_k=2, temperature=0.5, global_weight=2.0))
    recorder.append(7, "b", -0.25, -0.75, ([7, 9], [-0.25, -3.0]), seconds=1.5)
    recorder.append(8, "c", -0.5, alternatives=([8], [-0.5]), seconds=2.0)
    recorder.set_router_logits(2, logits(2, -1.0))
    recorder.set_knobs(2, 2, RoutingKnobs())
    recorder.finish("length")
    track = recorder.snapshot()
    assert track.token_ids.tolist() == [5, 6, 7, 8]
    assert (track.pieces, track.n_prompt) == (["a", "", "b", "c"], 2)
    assert track.router_logits is not None
    assert track.router_logits[:2].ravel().tolist() == list(range(12))
    assert (track.router_logits[2:] == -1).all()
    assert track.top_k.tolist() == [2, 2, 0, 0]
    assert track.temperature.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert track.global_weight.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert np.isnan(track.logprob[:2]).all()
    assert track.logprob[2:].tolist() == [-0.25, -0.5]
    assert track.base_logprob[2] == -0.75
    assert np.isnan(track.base_logprob[[0, 1, 3]]).all()
    assert track.alternative_ids.tolist() == [[-1, -1], [-1, -1], [7, 9], [8, -1]]
    assert track.alternative_logprobs[2].tolist() == [-0.25, -3.0]
    assert track.alternative_logprobs[3, 0] == -0.5
    assert np.isnan(track.alternative_logprobs[[0, 1], :]).all()
    assert np.isnan(track.alternative_logprobs[3, 1])
    assert track.seconds.tolist() == [0, 0, 1.5, 2.0]
    assert track.finish_reason == "length"
    assert (track.n_tokens, track.n_routed) == (4, 4)


def test_dtypes_are_those_of_the_record() -> None:
    track = record(
        make_header(), Arm.routed(), pieces=["a", "b"], n_prompt=1, logits=logits(2)
    ).snapshot()
    assert {name: str(array.dtype) for name, array in track.arrays().items()} == {
        "token_ids": "int32",
        "router_logits": "float16",
        "top_k": "int16",
        "temperature": "float32",
        "global_weight": "float32",
        "override_set": "int32",
        "logprob": "float32",
        "base_logprob": "float32",
        "alternative_ids": "int32",
        "alternative_logprobs": "float32",
        "seconds": "float32",
    }


def test_a_row_counts_as_routed_when_logits_and_knobs_are_there() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1, 2, 3], ["a", "b", "c"])
    recorder.set_router_logits(0, logits(3))
    assert recorder.snapshot().n_routed == 0
    recorder.set_knobs(0, 2, RoutingKnobs())
    track = recorder.snapshot()
    assert (track.n_tokens, track.n_routed, len(track.top_k)) == (3, 2, 2)


def test_an_arm_without_router_has_knobs_that_change_nothing() -> None:
    recorder = record(make_header(), Arm.merged(), pieces=["a", "b"], n_prompt=1)
    track = recorder.snapshot()
    assert track.router_logits is None
    assert track.n_routed == 2
    assert (track.top_k.tolist(), track.temperature.tolist(), track.global_weight.tolist()) == (
        [0, 0],
        [1, 1],
        [1, 1],
    )


def test_a_snapshot_does_not_change_and_cannot_be_written() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1], ["a"])
    recorder.set_router_logits(0, logits(1))
    recorder.set_knobs(0, 1, RoutingKnobs())
    before = recorder.snapshot()
    recorder.append(2, "b", -0.1)
    recorder.set_router_logits(1, logits(1, 7.0))
    recorder.set_knobs(1, 1, RoutingKnobs(top_k=1))
    recorder.finish("stop")
    assert before.pieces == ["a"]
    assert before.token_ids.tolist() == [1]
    assert before.top_k.tolist() == [0]
    assert before.finish_reason is None
    with pytest.raises(ValueError, match="read-only"):
        before.token_ids[0] = 3


def test_version_grows_with_every_change_and_only_then() -> None:
    recorder = routed_recorder()
    run = RunRecorder(make_header(), [recorder])
    versions = [run.version]
    for change in (
        lambda: recorder.append_prompt([1], ["a"]),
        lambda: recorder.set_router_logits(0, logits(1)),
        lambda: recorder.set_knobs(0, 1, RoutingKnobs()),
        lambda: recorder.append(2, "b", -1.0),
        lambda: recorder.finish("cancelled"),
    ):
        change()
        versions.append(run.version)
    assert versions == sorted(set(versions))
    run.snapshot()
    assert run.version == versions[-1]


def test_the_prompt_may_come_in_parts() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1, 2], ["a", "b"])
    recorder.append_prompt([3], ["c"])
    track = recorder.snapshot()
    assert (track.n_prompt, track.pieces) == (3, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda r: r.append_prompt([1, 2], ["a"]), "2 prompt tokens came with 1 pieces"),
        (lambda r: r.append_prompt([1], ["a"]), "cannot grow once the response has begun"),
        (lambda r: [r.append(1, "x", -1.0) for _ in range(9)], "room for 8 tokens"),
        (
            lambda r: r.append(1, "x", -1.0, alternatives=([1, 2, 3], [-1.0, -2.0, -3.0])),
            "at most 2 alternatives with as many log-probabilities, got 3 and 3",
        ),
        (lambda r: r.append(1, "x", -1.0, alternatives=([1], [])), "got 1 and 0"),
        (lambda r: r.set_router_logits(0, logits(1)), "the next row of router logits is 1, got 0"),
        (lambda r: r.set_router_logits(2, logits(1)), "the next row of router logits is 1, got 2"),
        (
            lambda r: r.set_router_logits(1, logits(2)),
            "router logits came for 3 tokens, the record has 2",
        ),
        (
            lambda r: r.set_router_logits(1, logits(1)[:, :1]),
            r"shape \[n, 2, 3\], got \[1, 1, 3\]",
        ),
        (lambda r: r.set_router_logits(1, logits(1, np.nan)), "must be finite"),
        (lambda r: r.set_router_logits(1, logits(1, np.inf)), "must be finite"),
        (lambda r: r.set_knobs(0, 1, RoutingKnobs()), "the next row of knobs is 1, got 0"),
        (lambda r: r.set_knobs(1, 2, RoutingKnobs()), "knobs came for 3 tokens"),
        (lambda r: r.finish("length"), "needs the routing of all 2 tokens, got 1"),
        (lambda r: r.finish("tired"), "finish reason must be one of"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse, message) -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1], ["a"])
    recorder.set_router_logits(0, logits(1))
    recorder.set_knobs(0, 1, RoutingKnobs())
    recorder.append(2, "b", -1.0)
    with pytest.raises(RecordError, match=message):
        misuse(recorder)
    track = recorder.snapshot()
    assert track.pieces[:2] == ["a", "b"]
    assert (track.n_prompt, track.n_routed, track.finish_reason) == (1, 1, None)


def test_the_bytes_of_a_token_are_those_of_the_arrays() -> None:
    for n_layers, arm in ((N_MODULES, Arm.routed()), (None, Arm.base())):
        recorder = TrackRecorder(arm, 7, n_layers, N_ADAPTERS, n_alternatives=4)
        n_bytes = sum(array.nbytes for array in recorder._arrays.values())
        assert bytes_per_token(n_layers, N_ADAPTERS, 4) * 7 == n_bytes


def test_guesses_and_hits_are_counted() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1, 2], ["a", "b"])
    assert recorder.snapshot().hit_rate is None
    versions = [recorder.version]
    for hit in (True, False):
        recorder.count_guess(hit)
        versions.append(recorder.version)
    before = recorder.snapshot()
    recorder.append(3, "c", -1.0)
    recorder.count_guess(True)
    track = recorder.snapshot()
    assert (before.n_guessed, before.n_hit, before.hit_rate) == (2, 1, 0.5)
    assert (track.n_guessed, track.n_hit, track.hit_rate) == (3, 2, 2 / 3)
    assert versions == sorted(set(versions))
    with pytest.raises(RecordError, match="3 tokens have at most as many guesses"):
        recorder.count_guess(True)
    recorder.finish("cancelled")
    with pytest.raises(RecordError, match=r"the record has ended \(cancelled\)"):
        recorder.count_guess(True)
    assert recorder.snapshot().n_guessed == 3


def test_a_top_k_beyond_the_adapters_is_refused() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1], ["a"])
    with pytest.raises(ConfigError, match="from 1 to 3"):
        recorder.set_knobs(0, 1, RoutingKnobs(top_k=4))


def test_nothing_is_added_after_the_end() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1], ["a"])
    recorder.finish("error")
    for change in (
        lambda: recorder.append(2, "b", -1.0),
        lambda: recorder.append_prompt([2], ["b"]),
        lambda: recorder.set_router_logits(0, logits(1)),
        lambda: recorder.set_knobs(0, 1, RoutingKnobs()),
        lambda: recorder.finish("stop"),
    ):
        with pytest.raises(RecordError, match=r"the record has ended \(error\)"):
            change()


@pytest.mark.parametrize("arm", [Arm.merged(), Arm.base(), Arm.expert("math")])
def test_only_a_routed_arm_has_logits_and_knobs(arm: Arm) -> None:
    recorder = TrackRecorder(arm, 4, None, N_ADAPTERS)
    recorder.append_prompt([1], ["a"])
    with pytest.raises(RecordError, match=f"a {arm.label} arm has no router logits"):
        recorder.set_router_logits(0, logits(1))
    with pytest.raises(RecordError, match=f"a {arm.label} arm has no knobs"):
        recorder.set_knobs(0, 1, RoutingKnobs())
    with pytest.raises(RecordError, match=f"a {arm.label} arm has no scalings to guess for"):
        recorder.count_guess(True)
    with pytest.raises(RecordError, match="a routed arm, and no other, has routed layers"):
        TrackRecorder(arm, 4, N_MODULES, N_ADAPTERS)
    with pytest.raises(RecordError, match="a routed arm, and no other, has routed layers"):
        TrackRecorder(Arm.routed(), 4, None, N_ADAPTERS)


def test_logits_beyond_float16_are_clipped_with_one_warning(caplog) -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1, 2, 3], ["a", "b", "c"])
    with caplog.at_level(logging.WARNING):
        recorder.set_router_logits(0, logits(1, 65504.0))
        assert caplog.messages == []
        recorder.set_router_logits(1, logits(1, 1e6))
        recorder.set_router_logits(2, logits(1, -1e30))
    assert caplog.messages == ["router logits beyond float16 are recorded as its largest value"]
    recorder.set_knobs(0, 3, RoutingKnobs())
    recorded = recorder.snapshot().router_logits
    assert recorded is not None
    assert recorded[:, 0, 0].tolist() == [65504, 65504, -65504]


def test_knobs_beyond_float32_become_the_nearest() -> None:
    recorder = routed_recorder()
    recorder.append_prompt([1, 2], ["a", "b"])
    recorder.set_router_logits(0, logits(2))
    recorder.set_knobs(0, 1, RoutingKnobs(temperature=1e-300, global_weight=1e300))
    recorder.set_knobs(1, 1, RoutingKnobs(temperature=1e300, global_weight=-1e300))
    track = recorder.snapshot()
    limits = np.finfo(np.float32)
    assert track.temperature.tolist() == [float(limits.tiny), float(limits.max)]
    assert track.global_weight.tolist() == [float(limits.max), float(limits.min)]


class Meddled(list[str]):
    """Pieces whose copying, or growing, is the moment at which another thread cuts in."""

    def __init__(self, moment: str, meddle: Callable[[], object]) -> None:
        super().__init__()
        self.moment = moment
        self.thread = threading.Thread(target=meddle)

    def cut_in(self, moment: str) -> None:
        if moment == self.moment:
            self.thread.start()
            # It has to wait for us; only a recorder that lets it in is done within the time.
            self.thread.join(timeout=0.1)

    def copy(self) -> list[str]:
        self.cut_in("copy")
        return list(self)

    def append(self, piece: str) -> None:
        super().append(piece)
        self.cut_in("append")


def test_a_writer_cannot_cut_into_a_snapshot() -> None:
    recorder = routed_recorder()
    recorder._pieces = pieces = Meddled("copy", lambda: recorder.append(2, "b", -1.0))
    recorder.append_prompt([1], ["a"])
    track = recorder.snapshot()
    assert (track.n_tokens, track.pieces) == (1, ["a"])
    pieces.thread.join()
    assert list(pieces) == ["a", "b"]


def test_a_snapshot_cannot_cut_into_a_writer() -> None:
    recorder = routed_recorder()
    seen: list[Track] = []
    recorder._pieces = pieces = Meddled("append", lambda: seen.append(recorder.snapshot()))
    recorder.append_prompt([1], ["a"])
    recorder.append(2, "b", -1.0)
    pieces.thread.join()
    assert [(track.n_tokens, track.pieces) for track in seen] == [(2, ["a", "b"])]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Lets threads take turns after every few instructions instead of every 5 ms."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("eager_threads")
def test_snapshots_beside_a_writing_thread_are_whole() -> None:
    """Every snapshot is a prefix of what is written, however the threads take turns."""
    n_tokens, n_prompt = 2000, 10
    recorder = routed_recorder(n_tokens)
    run = RunRecorder(make_header(), [recorder])
    seen_unfinished = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            ids = list(range(n_prompt))
            recorder.append_prompt(ids, [f"{i};" for i in ids])
            recorder.set_router_logits(0, np.stack([logits(1, i)[0] for i in ids]))
            for i in ids:
                recorder.set_knobs(i, 1, RoutingKnobs(global_weight=i))
            for t in range(n_prompt, n_tokens):
                recorder.append(t, f"{t};", -float(t), -float(t), ([t], [-1.0]), float(t))
                recorder.set_router_logits(t, logits(1, t))
                recorder.set_knobs(t, 1, RoutingKnobs(global_weight=t))
                if t == n_tokens // 2:
                    # The reader has read in the midst of the writing, whatever the machine.
                    assert seen_unfinished.wait(timeout=60)
            recorder.finish("length")
        except BaseException as error:
            failures.append(error)
            raise

    writer = threading.Thread(target=write)
    writer.start()
    last_version, last_tokens, n_snapshots = -1, 0, 0
    while True:
        version = run.version
        track = run.snapshot().tracks[0]
        rows = track.n_routed
        assert version >= last_version
        assert last_tokens <= track.n_tokens
        assert rows <= track.n_tokens <= rows + n_prompt
        expected = np.arange(track.n_tokens)
        assert np.array_equal(track.token_ids, expected)
        assert track.pieces == [f"{t};" for t in expected]
        assert np.array_equal(track.seconds[n_prompt:], expected[n_prompt:])
        assert np.array_equal(track.logprob[n_prompt:], -expected[n_prompt:])
        assert track.router_logits is not None
        assert np.array_equal(track.router_logits[:, 1, 2], expected[:rows])
        assert np.array_equal(track.global_weight, expected[:rows])
        last_version, last_tokens, n_snapshots = version, track.n_tokens, n_snapshots + 1
        if track.n_tokens > n_prompt and track.finish_reason is None:
            seen_unfinished.set()
        if track.finish_reason or not writer.is_alive():
            break
    writer.join()
    assert failures == []
    final = recorder.snapshot()
    assert (final.n_tokens, final.n_routed, final.finish_reason) == (n_tokens, n_tokens, "length")
    assert n_snapshots > 1

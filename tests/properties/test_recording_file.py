"""Laws of the run file: what was saved comes back, and damage is an error with a name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tests.properties.overrides import OVERRIDES
from tests.recorded_runs import assert_same_run, make_run
from xlora_core import AdapterOverride, Arm, RoutingKnobs, Run
from xlora_core.errors import RunFileError
from xlora_core.recording import run_file

# Every Python text: NUL, lone surrogates, markup, halves of characters.
PIECES = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["<script>alert(1)</script>", "\x00", "\ud83d", "\ude00", "\ud83d\ude00", "😀", "", "é"]
)
ARMS = st.sampled_from(
    [
        Arm.routed(),
        Arm.routed(RoutingKnobs(top_k=2, temperature=0.1, global_weight=-3.0)),
        Arm.routed(RoutingKnobs(overrides=[AdapterOverride.scale("code", 0.1, "*.v_proj")])),
        Arm.merged(),
        Arm.base(),
        Arm.expert("verse"),
    ]
)
MUTED = (AdapterOverride.mute("math"), AdapterOverride.pin("code", 0.5, ["*.q_proj"]))
VALID_RUN = make_run(
    3,
    5,
    arms=[Arm.routed(RoutingKnobs(top_k=1, overrides=MUTED)), Arm.expert("math")],
    knobs=[RoutingKnobs(overrides=[MUTED, (), MUTED[:1]][t % 3]) for t in range(8)],
    finish="time",
)
VALID_RUN = Run(
    VALID_RUN.header, [replace(VALID_RUN.tracks[0], n_guessed=5, n_hit=3), VALID_RUN.tracks[1]]
)
VALID = VALID_RUN.to_bytes()
N_HEADER = 8 + int.from_bytes(VALID[:8], "little")


@given(
    arms=st.lists(ARMS, min_size=1, max_size=3),
    pieces=st.lists(PIECES, max_size=8),
    split=st.floats(0, 1),
    prompt_text=st.text(st.characters()),
    layerwise=st.booleans(),
    finish=st.sampled_from([None, "stop", "length", "time", "cancelled", "error"]),
    seed=st.integers(0, 99),
    overrides=st.lists(OVERRIDES, min_size=8, max_size=8),
)
@settings(max_examples=100)
def test_every_run_comes_back_as_it_was(
    arms, pieces, split, prompt_text, layerwise, finish, seed, overrides
) -> None:
    n_prompt = round(split * len(pieces))
    run = make_run(
        n_prompt,
        len(pieces) - n_prompt,
        arms=arms,
        pieces=pieces,
        layerwise=layerwise,
        finish=finish,
        seed=seed,
        knobs=[RoutingKnobs(overrides=found) for found in overrides],
    )
    run = Run(replace(run.header, prompt_text=prompt_text), run.tracks)
    loaded = Run.from_bytes(run.to_bytes())
    assert_same_run(run, loaded)
    assert loaded.text(0) == run.text(0)
    np.testing.assert_array_equal(loaded.scalings(0, None, True), run.scalings(0, None, True))


def opened(data: bytes) -> Run | RunFileError:
    """Returns the run, or the refusal; any other error is the test's failure."""
    try:
        return Run.from_bytes(data)
    except RunFileError as error:
        return error


def assert_refused_or_the_same(data: bytes) -> None:
    result = opened(data)
    if isinstance(result, RunFileError):
        assert result.message.startswith("the run file: ")
        assert result.hint
    else:
        assert_same_run(VALID_RUN, result)


@given(keep=st.integers(0, len(VALID) - 1))
@settings(max_examples=200)
def test_a_cut_off_file_is_refused(keep: int) -> None:
    result = opened(VALID[:keep])
    assert isinstance(result, RunFileError)
    assert "perhaps truncated" in result.message


@given(
    flips=st.lists(
        st.tuples(
            st.integers(0, len(VALID) - 1) | st.integers(0, N_HEADER - 1), st.integers(1, 255)
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=300)
def test_flipped_bytes_never_raise_anything_else_and_never_go_unseen(flips) -> None:
    data = bytearray(VALID)
    for position, mask in flips:
        data[position] ^= mask
    assert_refused_or_the_same(bytes(data))


@given(data=st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_refused(data: bytes) -> None:
    for junk in (data, VALID[:N_HEADER] + data, len(data).to_bytes(8, "little") + data):
        assert_refused_or_the_same(junk)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(value=JSON_VALUES, choice=st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_a_header_with_any_value_anywhere_is_refused_or_makes_a_usable_run(value, choice) -> None:
    """The checksum is right, so that the checks of the fields stand alone."""
    tensors = load(VALID)
    metadata = json.loads(VALID[8:N_HEADER])["__metadata__"]
    header = json.loads(metadata["header"])
    target: Any = header
    while True:
        keys = list(target) if isinstance(target, dict) else range(len(target))
        if not keys:
            return
        key = choice.choice(keys)
        if not isinstance(target[key], dict | list) or choice.random() < 0.2:
            break
        target = target[key]
    target[key] = value
    metadata["header"] = json.dumps(header)
    metadata["sha256"] = run_file._digest(metadata["header"], tensors)
    assert_refused_or_usable(save(tensors, metadata=metadata))


@given(
    name=st.sampled_from(sorted(load(VALID))),
    fill=st.binary(min_size=8, max_size=8),
    at=st.integers(0, 10**6),
)
@settings(max_examples=120)
def test_tensors_with_any_value_are_refused_or_make_a_usable_run(name, fill, at) -> None:
    tensors = {key: array.copy() for key, array in load(VALID).items()}
    flat = tensors[name].reshape(-1)
    size = flat.dtype.itemsize
    flat[at % flat.size] = np.frombuffer(fill[:size], flat.dtype)[0]
    metadata = json.loads(VALID[8:N_HEADER])["__metadata__"]
    metadata["sha256"] = run_file._digest(metadata["header"], tensors)
    assert_refused_or_usable(save(tensors, metadata=metadata))


def assert_refused_or_usable(data: bytes) -> None:
    run = opened(data)
    if isinstance(run, RunFileError):
        assert run.hint
        return
    for arm in range(len(run.tracks)):
        assert run.scalings(arm, effective=True).shape == (8, 2, 3)
        assert isinstance(run.text(arm), str)
    assert len(run.bucketed("seq_len")) % 6 == 0
    assert len(run.long_table()) == len(run.tracks) * 8 * 2 * 3
    assert run.to_csv_text("token").startswith("run_id,")
    run.to_bytes()

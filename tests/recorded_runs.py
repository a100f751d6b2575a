"""Small recorded runs without a model, and what their scalings must be, computed the long way."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlora_core import Arm, RoutingKnobs, SamplingParams
from xlora_core.recording import Run, RunHeader, RunRecorder, TrackRecorder

ADAPTERS = ("math", "code", "verse")
LAYERS = ("model.layers.0.q_proj", "model.layers.0.v_proj")
# The second adapter has no weights in the second module.
PRESENT = ((True, True, True), (True, False, True))

ALL_ARMS = (
    Arm.routed(RoutingKnobs(top_k=2)),
    Arm.merged(),
    Arm.base(),
    Arm.expert("code"),
)


def make_header(**changes: Any) -> RunHeader:
    """Returns the header of a run of three adapters in two modules."""
    values: dict[str, Any] = {
        "run_id": "0123456789abcdef0123456789abcdef",
        "created": "2026-01-02T03:04:05+00:00",
        "adapter_names": ADAPTERS,
        "layer_names": LAYERS,
        "present": PRESENT,
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise": True,
        "model_id": "tiny",
        "base_hash": "b" * 16,
        "adapter_hashes": dict.fromkeys(ADAPTERS, "a" * 16),
        "sampling": SamplingParams(max_new_tokens=8, seed=3),
        "prompt_text": "a prompt",
        "versions": {"python": "3.11"},
    }
    return RunHeader(**(values | changes))


def record(
    header: RunHeader,
    arm: Arm,
    *,
    pieces: Sequence[str],
    n_prompt: int,
    logits: NDArray[np.floating] | None = None,
    knobs: Sequence[RoutingKnobs] | None = None,
    finish: str | None = "length",
) -> TrackRecorder:
    """Returns a recorder that has been fed the way the engine does it.

    Args:
        header: The run's header.
        arm: The arm.
        pieces: One text per token.
        n_prompt: How many of them are the prompt's.
        logits: ``[R, L or 1, K]``; None for an arm that is not routed.
        knobs: One per row of logits; None: the defaults.
        finish: The finish reason; None leaves the track open.
    """
    routed = arm.kind == "routed"
    recorder = TrackRecorder(
        arm, len(pieces), header.n_routed_layers if routed else None, header.n_adapters, 2
    )
    recorder.append_prompt(range(n_prompt), pieces[:n_prompt])
    for t, piece in enumerate(pieces[n_prompt:], start=n_prompt):
        recorder.append(t, piece, -0.5 - t, -1.0 - t, ([t, t + 1], [-0.5, -1.5]), seconds=t / 10)
    if logits is not None:
        recorder.set_router_logits(0, logits)
        for row in range(len(logits)):
            recorder.set_knobs(row, 1, knobs[row] if knobs else RoutingKnobs())
    if finish:
        recorder.finish(finish)  # type: ignore[arg-type]  # tests pass one of its values
    return recorder


def make_run(
    n_prompt: int = 3,
    n_response: int = 5,
    *,
    arms: Sequence[Arm] = (Arm.routed(),),
    seed: int = 0,
    pieces: Sequence[str] | None = None,
    knobs: Sequence[RoutingKnobs] | None = None,
    finish: str | None = "length",
    n_routed: int | None = None,
    **header_changes: Any,
) -> Run:
    """Returns a run of random router logits, one track per arm, all with the same pieces."""
    header = make_header(**header_changes)
    n_tokens = n_prompt + n_response
    texts = list(pieces) if pieces is not None else [f" t{i}" for i in range(n_tokens)]
    rng = np.random.default_rng(seed)
    shape = (
        n_tokens if n_routed is None else n_routed,
        header.n_routed_layers,
        header.n_adapters,
    )
    tracks = [
        record(
            header,
            arm,
            pieces=texts,
            n_prompt=n_prompt,
            logits=rng.normal(0, 2, shape) if arm.kind == "routed" else None,
            knobs=knobs if arm.kind == "routed" else None,
            finish=finish,
        )
        for arm in arms
    ]
    return RunRecorder(header, tracks).snapshot()


def assert_same_run(run: Run, other: Run) -> None:
    """Asserts that two runs are equal to the last bit of every field."""
    assert other.header == run.header
    assert len(other.tracks) == len(run.tracks)
    for track, theirs in zip(run.tracks, other.tracks, strict=True):
        assert theirs.arm == track.arm
        assert theirs.pieces == track.pieces
        assert theirs.n_prompt == track.n_prompt
        assert theirs.finish_reason == track.finish_reason
        assert (theirs.n_guessed, theirs.n_hit) == (track.n_guessed, track.n_hit)
        assert theirs.override_sets == track.override_sets
        assert theirs.arrays().keys() == track.arrays().keys()
        for name, array in track.arrays().items():
            assert theirs.arrays()[name].dtype == array.dtype
            np.testing.assert_array_equal(theirs.arrays()[name], array, err_msg=name)


def expected_scalings(
    run: Run, arm: int, knobs: RoutingKnobs | None, *, effective: bool
) -> NDArray[np.float64]:
    """Returns ``[R, L, K]``, token by token and module by module, in plain float64."""
    header, track = run.header, run.tracks[arm]
    assert track.router_logits is not None
    rows = []
    for t, logits in enumerate(track.router_logits.astype(np.float64)):
        used = knobs or RoutingKnobs(
            top_k=int(track.top_k[t]) or None,
            temperature=float(track.temperature[t]),
            global_weight=float(track.global_weight[t]),
            overrides=track.override_sets[track.override_set[t] - 1]
            if track.override_set[t]
            else (),
        )
        row = []
        for layer in range(header.n_lora_layers):
            values = logits[layer if header.layerwise else 0]
            if header.enable_softmax:
                values = _softmax(values / used.temperature)
            if effective:
                values = _effective(values, used, header.enable_softmax_topk)
                for k, adapter in enumerate(header.adapter_names):
                    values[k] = overridden(used, adapter, header.layer_names[layer], values[k])
                values = values * used.global_weight * np.array(header.present[layer])
            row.append(values)
        rows.append(row)
    return np.array(rows).reshape(-1, header.n_lora_layers, header.n_adapters)


def _effective(
    values: NDArray[np.float64], knobs: RoutingKnobs, softmax_topk: bool
) -> NDArray[np.float64]:
    kept = np.argsort(-values, kind="stable")[: knobs.top_k]
    result = np.zeros_like(values)
    result[kept] = _softmax(values[kept]) if softmax_topk else values[kept]
    return result


def overridden(knobs: RoutingKnobs, adapter: str, layer_name: str, scaling: float) -> float:
    """Returns the scaling that top-k left as the last override that concerns it would have it."""
    for override in reversed(knobs.overrides):
        patterns = ["*"] if override.modules is None else override.modules
        if override.adapter == adapter and any(fnmatchcase(layer_name, p) for p in patterns):
            if override.kind == "pin":
                return float(override.value or 0)
            return scaling * (0 if override.kind == "mute" else float(override.value or 0))
    return scaling


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(values - values.max())
    return powers / powers.sum()

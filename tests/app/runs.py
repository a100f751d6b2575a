"""Small runs for the tests of frames and payload, recorded by the real recorder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xlora_core import Arm, RoutingKnobs, Run, SamplingParams
from xlora_core.recording import RunHeader, RunRecorder, TrackRecorder

ADAPTERS = ["math", "python", "verse"]
LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
]
N_PROMPT = 2


def header(**changes: object) -> RunHeader:
    """Returns a header of 3 adapters and 4 modules."""
    fields: dict[str, object] = {
        "run_id": "0" * 32,
        "created": "2026-01-01T00:00:00+00:00",
        "adapter_names": ADAPTERS,
        "layer_names": LAYERS,
        "present": np.ones((len(LAYERS), len(ADAPTERS)), dtype=bool).tolist(),
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise": True,
        "scaling_pass_value": 0.0,
        "model_id": "tiny",
        "base_hash": "",
        "adapter_hashes": {},
        "sampling": SamplingParams(),
        "prompt_text": "a b",
        "versions": {},
    }
    return RunHeader(**{**fields, **changes})


def logits(n_tokens: int, n_layers: int = len(LAYERS), seed: int = 0) -> np.ndarray:
    """Returns made-up router logits ``[T, L, K]``."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, (n_tokens, n_layers, len(ADAPTERS))).astype(np.float32)


def track(
    arm: Arm,
    answer: Sequence[str],
    *,
    router_logits: np.ndarray | None = None,
    knobs: dict[int, RoutingKnobs] | None = None,
    finish: str | None = "stop",
    seconds: float = 0.1,
) -> TrackRecorder:
    """Returns a recorded track: prompt "a", " b", then ``answer``, a token each.

    ``knobs`` maps a token to the knobs in force from it on.
    """
    n_layers = None if router_logits is None else router_logits.shape[1]
    recorder = TrackRecorder(arm, N_PROMPT + len(answer), n_layers, len(ADAPTERS))
    recorder.append_prompt([1, 2], ["a", " b"])
    for n, piece in enumerate(answer):
        recorder.append(
            10 + sum(map(ord, piece)),
            piece,
            -0.5,
            -1.0,
            alternatives=([3], [-2.0]),
            seconds=seconds * (n + 1),
        )
    if router_logits is not None:
        recorder.set_router_logits(0, router_logits)
        current = RoutingKnobs()
        for t in range(len(router_logits)):
            current = (knobs or {}).get(t, current)
            recorder.set_knobs(t, 1, current)
    if finish:
        recorder.finish(finish)
    return recorder


def run(
    *, answer: Sequence[str] = (" x", " y", " z"), other: Sequence[str] | None = None, **options
) -> Run:
    """Returns a run with a routed arm, and a merged one when ``other`` is its answer.

    ``knobs``, ``finish`` and ``router_logits`` go to the routed track, other options to the header.
    """
    own = {k: options.pop(k) for k in ("knobs", "finish") if k in options}
    values = options.pop("router_logits", None)
    head = header(**options)
    n_layers = len(head.layer_names) if head.layerwise else 1
    if values is None:
        values = logits(N_PROMPT + len(answer), n_layers)
    tracks = [track(Arm.routed(RoutingKnobs()), answer, router_logits=values, **own)]
    if other is not None:
        tracks.append(track(Arm.merged(), other))
    return RunRecorder(head, tracks).snapshot()

"""Other knobs over a recorded run: new scalings without the model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from xlora_core.bench.report import Cell, Report
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.recording import Run, RunHeader, RunRecorder, TrackRecorder

METHOD = (
    "Milliseconds of run.scalings(knobs=...) over a recorded run of random router logits, the "
    "least of all rounds. effective: after top-k and global weight, as the modules multiply by."
)
_KNOBS = {
    "as recorded": None,
    "temperature 0.7": RoutingKnobs(temperature=0.7),
    "top-k 2": RoutingKnobs(top_k=2),
    "top-k 2, temperature 0.7, weight 0.5": RoutingKnobs(
        top_k=2, temperature=0.7, global_weight=0.5
    ),
}


def measure(
    *, n_tokens: int = 512, n_modules: int = 210, n_adapters: int = 8, rounds: int = 20
) -> Report:
    """Times re-routing with several knobs.

    Args:
        n_tokens: T.
        n_modules: L.
        n_adapters: K, >= 2.
        rounds: How often.
    """
    run = recorded_run(n_tokens, n_modules, n_adapters)
    rows: list[dict[str, Cell]] = []
    for name, knobs in _KNOBS.items():
        row: dict[str, Cell] = {"knobs": name}
        for effective in (False, True):

            def scalings(knobs: RoutingKnobs | None = knobs, effective: bool = effective) -> object:
                return run.scalings(knobs=knobs, effective=effective)

            row["effective (ms)" if effective else "scalings (ms)"] = least_ms(scalings, rounds)
        rows.append(row)
    facts = {
        "tokens": n_tokens,
        "modules": n_modules,
        "adapters": n_adapters,
        "dtype": "float32 of recorded float16",
        "rounds": rounds,
    }
    return Report(name="reroute", method=METHOD, rows=rows, facts=facts)


def least_ms(work: Callable[[], object], rounds: int) -> float:
    """Returns the milliseconds of the fastest of several calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def recorded_run(n_tokens: int, n_modules: int, n_adapters: int) -> Run:
    """Returns a run of random router logits, without a model."""
    names = [f"expert {k}" for k in range(n_adapters)]
    layers = [f"model.layers.{i // 7}.module_{i % 7}" for i in range(n_modules)]
    header = RunHeader(
        run_id=uuid.uuid4().hex,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        adapter_names=names,
        layer_names=layers,
        present=[[True] * n_adapters] * n_modules,
        enable_softmax=True,
        enable_softmax_topk=False,
        layerwise=True,
        model_id="random",
        base_hash="",
        adapter_hashes=dict.fromkeys(names, ""),
        sampling=SamplingParams(max_new_tokens=1),
        prompt_text="",
        versions={},
    )
    track = TrackRecorder(Arm.routed(RoutingKnobs()), n_tokens, n_modules, n_adapters)
    track.append_prompt([0] * n_tokens, [""] * n_tokens)
    logits = np.random.default_rng(0).normal(0, 2, (n_tokens, n_modules, n_adapters))
    track.set_router_logits(0, logits.astype(np.float32))
    track.set_knobs(0, n_tokens, RoutingKnobs())
    return RunRecorder(header, [track]).snapshot()

"""What the page shows of a run, as plain numpy and pandas: no Streamlit, no model, no tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from xlora_core import AdapterOverride, Arm, RoutingKnobs, Run

FloatArray = NDArray[np.float32]

# Patterns of one override that a short text names.
N_PATTERNS = 2

_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<block>\d+)\.(?P<path>.+)$")


@dataclass(frozen=True)
class Routing:
    """The routing of one arm, ready to draw.

    Attributes:
        scalings: ``[R, L, K]`` what the router says.
        effective: ``[R, L, K]`` what the modules multiply by.
        cut: ``[R, L, K]`` True where an adapter does not act: top-k dropped it or it is muted.
        present: ``[L, K]`` False where an adapter has no weights in a module.
        global_weight: ``[R]`` the factor in force at each token.
    """

    scalings: FloatArray
    effective: FloatArray
    cut: NDArray[np.bool_]
    present: NDArray[np.bool_]
    global_weight: FloatArray


def module_table(layer_names: Sequence[str]) -> pd.DataFrame:
    """Returns one row per adapted module: ``layer_name``, ``block``, ``kind``.

    ``block`` is the number in the module path (-1: none); ``kind`` is the shortest end of the
    path that still tells the modules of a block apart.

    Example:
        >>> module_table(["model.layers.3.self_attn.q_proj"]).iloc[0].tolist()
        ['model.layers.3.self_attn.q_proj', 3, 'q_proj']
    """
    blocks, paths = [], []
    for name in layer_names:
        match = _BLOCK.match(name)
        blocks.append(int(match["block"]) if match else -1)
        paths.append(match["path"] if match else name)
    ends: dict[str, set[str]] = {}
    for path in paths:
        ends.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    kinds = [end if len(ends[end := p.rsplit(".", 1)[-1]]) == 1 else p for p in paths]
    return pd.DataFrame({"layer_name": list(layer_names), "block": blocks, "kind": kinds})


def arm_title(arm: Arm) -> str:
    """Returns the arm's name as the page writes it."""
    if arm.kind == "expert":
        return f"Expert {arm.adapter} alone"
    return {"routed": "Routed (X-LoRA)", "merged": "Merged (uniform 1/K)", "base": "Base model"}[
        arm.kind
    ]


def routed_arm(run: Run) -> int | None:
    """Returns the index of the first routed arm, or None when the run has none."""
    for index, track in enumerate(run.tracks):
        if track.arm.kind == "routed" and track.router_logits is not None:
            return index
    return None


def routing(run: Run, arm: int, knobs: RoutingKnobs | None = None) -> Routing:
    """Returns the arm's routing; one row per module, or one where all modules have the same.

    Args:
        run: A finished run or a snapshot of a live one.
        arm: Index of a routed arm.
        knobs: Route the recorded logits with these instead of the knobs in force at the time.
    """
    track = run.tracks[arm]
    present = np.asarray(run.header.present, dtype=bool)
    scalings = np.asarray(run.scalings(arm, knobs=knobs), dtype=np.float32)
    effective = np.asarray(run.scalings(arm, knobs=knobs, effective=True), dtype=np.float32)
    rows = scalings.shape[0]
    if knobs is None:
        weight = np.asarray(track.global_weight[:rows], dtype=np.float32)
    else:
        weight = np.full(rows, knobs.global_weight, dtype=np.float32)
    if not differs_by_module(run, arm, knobs):
        # All modules share one row of scalings; it is absent only where no module has the adapter.
        first = int(np.argmax(present.sum(axis=1)))
        scalings, effective = scalings[:, :1], effective[:, first : first + 1]
        present = np.asarray(present.any(axis=0, keepdims=True), dtype=bool)
    cut = (effective == 0) & (scalings != 0) & present & (weight != 0)[:, None, None]
    return Routing(scalings, effective, cut, present, weight)


def overrides(run: Run, arm: int, knobs: RoutingKnobs | None = None) -> tuple[AdapterOverride, ...]:
    """Returns every override that acts on the arm at some token; with ``knobs`` theirs."""
    if knobs is not None:
        return tuple(knobs.overrides)
    return tuple(override for found in run.tracks[arm].override_sets for override in found)


def differs_by_module(run: Run, arm: int, knobs: RoutingKnobs | None = None) -> bool:
    """Returns whether modules have scalings of their own: from the router, or by an override."""
    of_some = any(override.modules is not None for override in overrides(run, arm, knobs))
    return run.header.layerwise or of_some


def tail(run: Run, arm: int, start: int) -> Run:
    """Returns a run of one arm only, without the arm's first ``start`` tokens.

    What is counted over the whole arm (guesses and hits) is left out.
    """
    track = run.tracks[arm]
    cut: dict[str, Any] = {name: array[start:] for name, array in track.arrays().items()}
    left = max(0, track.n_prompt - start)
    cut |= {"n_prompt": left, "n_guessed": 0, "n_hit": 0}
    return replace(run, tracks=[replace(track, pieces=track.pieces[start:], **cut)])


def mass_shares(scalings: FloatArray) -> FloatArray:
    """Returns each adapter's share of the mass at each token, ``[R, L, K]`` -> ``[R, K]``.

    The mass is the sum of absolute scalings over the modules. Shares of a token sum to 1, or are
    all 0 where no adapter has any mass.
    """
    mass = np.abs(scalings).sum(axis=1, dtype=np.float64)
    total = mass.sum(axis=1, keepdims=True)
    shares = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
    return np.asarray(shares, dtype=np.float32)


def effective_number(scalings: FloatArray) -> FloatArray:
    """Returns the effective number of adapters at each token, ``[R, L, K]`` -> ``[R]``.

    ``exp`` of the entropy of a module's absolute scalings, averaged over the modules that have
    any mass: 1 when one adapter carries everything, K when all carry the same, 0 without mass.
    """
    size = np.abs(scalings, dtype=np.float64)
    total = size.sum(axis=2, keepdims=True)
    p = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=2)
    alive = total[..., 0] > 0
    count = np.maximum(alive.sum(axis=1), 1)
    return np.asarray((np.exp(entropy) * alive).sum(axis=1) / count, dtype=np.float32)


def value_range(
    values: FloatArray, *, bounded: bool, within: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Returns the colour range of a plane: fixed where it can be, never shrinking with new data.

    Args:
        values: What is drawn.
        bounded: Values are a softmax's, so they start at 0.
        within: The range so far; it is kept or widened.

    Returns:
        ``(0, high)`` for values that start at 0, else ``(-high, high)``; ``high`` moves in powers
        of 2 so that a streaming run rarely repaints.
    """
    low, high = within
    largest = float(np.abs(values).max(initial=0.0))
    if largest > high:
        high = float(high * 2 ** np.ceil(np.log2(largest / high)))
    signed = low < 0 or not bounded or bool((values < 0).any())
    return (-high if signed else 0.0, high)


def knob_texts(knobs: RoutingKnobs) -> list[str]:
    """Returns each knob as a short text, then each override."""
    return [
        f"top-k {knobs.top_k or 'all'}",
        f"temperature {knobs.temperature:.3g}",
        f"weight {knobs.global_weight:.3g}",
        *map(override_text, knobs.overrides),
    ]


def override_text(override: AdapterOverride) -> str:
    """Returns an override as a short text; of many modules only the first two are named."""
    patterns = override.patterns or ()
    if len(patterns) <= N_PATTERNS:
        return override.label
    named = replace(override, modules=patterns[:N_PATTERNS]).label
    return f"{named} and {len(patterns) - N_PATTERNS} more"


def knob_changes(run: Run, arm: int) -> list[tuple[int, str, str]]:
    """Returns (token, what changed, all knobs) for each token where new knobs came into force.

    The first entry is token 0 with the knobs at the start.
    """
    track = run.tracks[arm]
    found: list[tuple[int, str, str]] = []
    before: list[str] = []
    steered: list[str] = []
    for row in track.knob_changes():
        knobs = track.knobs(row)
        now = knob_texts(knobs)
        adapters = list(dict.fromkeys(override.adapter for override in knobs.overrides))
        changed = [text for text in now if text not in before]
        changed += [f"{name} automatic" for name in steered if name not in adapters]
        if now != before:
            found.append((row, " · ".join(changed), " · ".join(now)))
        before, steered = now, adapters
    return found


def first_difference(run: Run, arm: int, reference: int) -> int | None:
    """Returns the first response position where the arm's token is not the reference's.

    None while one is only a beginning of the other and both may still go on.
    """
    ours, theirs = run.tracks[arm], run.tracks[reference]
    pairs = zip_longest(ours.token_ids[ours.n_prompt :], theirs.token_ids[theirs.n_prompt :])
    for position, (a, b) in enumerate(pairs):
        if (a is None and not ours.finish_reason) or (b is None and not theirs.finish_reason):
            return None
        if a != b:
            return position
    return None


def tokens_per_second(run: Run, arm: int) -> float | None:
    """Returns the arm's decoding speed after its first new token, or None when it has no two."""
    track = run.tracks[arm]
    seconds = np.asarray(track.seconds[track.n_prompt :], dtype=np.float64)
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return None
    return float((len(seconds) - 1) / (seconds[-1] - seconds[0]))


def seconds(run: Run, arm: int) -> float:
    """Returns the wall time from an arm's start to its last new token; 0 before the first."""
    track = run.tracks[arm]
    return float(track.seconds[-1]) if track.n_tokens > track.n_prompt else 0.0


def guesses(run: Run) -> tuple[int, int]:
    """Returns how many tokens were guessed ahead, over all arms, and how many of those hit."""
    return (
        sum(track.n_guessed for track in run.tracks),
        sum(track.n_hit for track in run.tracks),
    )


def arm_table(run: Run) -> pd.DataFrame:
    """Returns one row per arm.

    Columns ``arm``, ``tokens``, ``tokens_per_second``, ``hit_rate`` (of the guesses of the next
    token; None where nothing was guessed) and ``finished``.
    """
    return pd.DataFrame(
        {
            "arm": [arm_title(track.arm) for track in run.tracks],
            "tokens": [len(track.token_ids) - track.n_prompt for track in run.tracks],
            "tokens_per_second": [tokens_per_second(run, i) for i in range(len(run.tracks))],
            "hit_rate": [track.hit_rate for track in run.tracks],
            "finished": [track.finish_reason for track in run.tracks],
        }
    )

"""Run -> what the page shows: numbers checked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app import frames
from tests.app import runs
from xlora_core import AdapterOverride, Arm, RoutingKnobs


def test_modules_are_grouped_by_block_and_kind():
    table = frames.module_table(runs.LAYERS)
    assert table["block"].tolist() == [0, 0, 1, 1]
    assert table["kind"].tolist() == ["q_proj", "up_proj", "q_proj", "up_proj"]


def test_kinds_that_end_alike_keep_their_path():
    names = ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "lm_head"]
    table = frames.module_table(names)
    assert table["kind"].tolist() == ["attn.c_proj", "mlp.c_proj", "lm_head"]
    assert table["block"].tolist() == [0, 0, -1]


def test_mass_shares_sum_to_one_and_follow_the_scalings():
    scalings = np.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], dtype=np.float32)
    shares = frames.mass_shares(scalings)
    assert shares == pytest.approx(np.array([[0.75, 0.25, 0.0]]))


def test_a_token_without_mass_has_no_shares():
    assert frames.mass_shares(np.zeros((1, 2, 3), dtype=np.float32)).tolist() == [[0, 0, 0]]
    assert frames.effective_number(np.zeros((1, 2, 3), dtype=np.float32)).tolist() == [0]


def test_effective_number_counts_adapters():
    scalings = np.zeros((3, 1, 4), dtype=np.float32)
    scalings[0, 0] = 0.25
    scalings[1, 0, 2] = 1.0
    scalings[2, 0, :2] = -0.5
    assert frames.effective_number(scalings) == pytest.approx([4.0, 1.0, 2.0], abs=1e-5)


def test_routing_tells_cut_from_absent():
    present = np.ones((4, 3), dtype=bool)
    present[1, 2] = False
    run = runs.run(present=present.tolist(), knobs={0: RoutingKnobs(top_k=1)})
    drawn = frames.routing(run, 0)
    assert not drawn.cut[:, 1, 2].any()
    assert (drawn.effective[:, 1, 2] == 0).all()
    others = drawn.cut[:, [0, 2, 3]]
    assert (others.sum(axis=2) == 2).all()


def test_a_global_weight_of_zero_cuts_nothing():
    run = runs.run(knobs={0: RoutingKnobs(global_weight=0.0)})
    drawn = frames.routing(run, 0)
    assert (drawn.effective == 0).all()
    assert not drawn.cut.any()


def test_other_knobs_reroute_the_recording():
    run = runs.run()
    sharp = frames.routing(run, 0, RoutingKnobs(temperature=0.1))
    assert sharp.scalings.max(axis=2).mean() > frames.routing(run, 0).scalings.max(axis=2).mean()
    assert sharp.scalings.sum(axis=2) == pytest.approx(1.0, abs=1e-5)


def test_a_shared_router_is_one_row():
    run = runs.run(layerwise=False)
    assert frames.routing(run, 0).scalings.shape == (5, 1, 3)
    assert frames.routing(run, 0).present.shape == (1, 3)


def test_the_range_is_fixed_for_a_softmax_and_symmetric_without():
    values = np.array([0.2, 0.7], dtype=np.float32)
    assert frames.value_range(values, bounded=True) == (0.0, 1.0)
    assert frames.value_range(values * 2, bounded=True) == (0.0, 2.0)
    assert frames.value_range(values * -3, bounded=False) == (-4.0, 4.0)
    assert frames.value_range(values, bounded=True, within=(-2.0, 2.0)) == (-2.0, 2.0)


def test_knob_changes_name_what_changed():
    changed = RoutingKnobs(top_k=2, temperature=0.5)
    run = runs.run(knobs={0: RoutingKnobs(), 3: changed})
    assert frames.knob_changes(run, 0) == [
        (0, "top-k all · temperature 1 · weight 1", "top-k all · temperature 1 · weight 1"),
        (3, "top-k 2 · temperature 0.5", "top-k 2 · temperature 0.5 · weight 1"),
    ]


def test_knob_changes_name_overrides_and_their_end():
    muted, pinned = (
        AdapterOverride.mute("math"),
        AdapterOverride.pin("verse", 0.5, ["a*", "m*", "*"]),
    )
    run = runs.run(
        knobs={
            1: RoutingKnobs(overrides=[muted, pinned]),
            2: RoutingKnobs(overrides=[AdapterOverride.scale("math", 2), pinned]),
            4: RoutingKnobs(),
        },
        layer_names=[*runs.LAYERS[:3], "a"],
    )
    plain = "top-k all · temperature 1 · weight 1"
    pin = "verse pinned at 0.5 in a*, m* and 1 more"
    assert frames.knob_changes(run, 0) == [
        (0, plain, plain),
        (1, f"math muted · {pin}", f"{plain} · math muted · {pin}"),
        (2, "math rescaled by 2", f"{plain} · math rescaled by 2 · {pin}"),
        (4, "math automatic · verse automatic", plain),
    ]


def test_a_muted_adapter_is_drawn_as_one_that_does_not_act():
    muted = RoutingKnobs(overrides=[AdapterOverride.mute("math", "*.q_proj")])
    drawn = frames.routing(runs.run(knobs={0: muted}), 0)
    assert drawn.cut[:, [0, 2], 0].all()
    assert not drawn.cut[:, [1, 3]].any()
    assert not drawn.cut[:, :, 1:].any()
    pinned = RoutingKnobs(top_k=1, overrides=[AdapterOverride.pin("math", 0.1)])
    drawn = frames.routing(runs.run(), 0, pinned)
    assert not drawn.cut[:, :, 0].any()
    assert drawn.effective[:, :, 0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("other", "finish", "expected"),
    [
        ((" x", " y", " z"), "stop", None),
        ((" x", " q", " z"), "stop", 1),
        ((" x",), "stop", 1),
        ((" x", " y", " z", " more"), "stop", 3),
        ((" x", " y", " z", " more"), None, None),
    ],
)
def test_first_difference(other, finish, expected):
    run = runs.run(other=other, finish=finish)
    assert frames.first_difference(run, 1, 0) == expected


def test_speed_counts_from_the_first_new_token():
    assert frames.tokens_per_second(runs.run(), 0) == pytest.approx(10.0, rel=1e-3)
    assert frames.tokens_per_second(runs.run(answer=[" x"]), 0) is None


def test_guesses_are_summed_over_the_arms():
    run = runs.run(other=[" x"])
    assert frames.guesses(run) == (0, 0)
    guessed = replace(run.tracks[0], n_guessed=4, n_hit=3)
    run = replace(run, tracks=[guessed, replace(guessed, n_hit=2), run.tracks[1]])
    assert frames.guesses(run) == (8, 5)
    assert frames.arm_table(run)["hit_rate"].tolist()[:2] == [0.75, 0.5]


def test_seconds_are_those_of_the_last_new_token():
    assert frames.seconds(runs.run(), 0) == pytest.approx(0.3)
    assert frames.seconds(runs.run(answer=[]), 0) == 0


def test_arm_titles_and_table():
    run = runs.run(other=[" x"])
    table = frames.arm_table(run)
    assert table["arm"].tolist() == ["Routed (X-LoRA)", "Merged (uniform 1/K)"]
    assert table["tokens"].tolist() == [3, 1]
    assert table["hit_rate"].isna().all()
    assert frames.arm_title(Arm.expert("math")) == "Expert math alone"
    assert frames.routed_arm(run) == 0

"""A run answers without a model: scalings under any knobs, texts, labels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.recorded_runs import ADAPTERS, PRESENT, expected_scalings, make_header, make_run
from xlora_core import Arm, RoutingKnobs, Run
from xlora_core.errors import ConfigError, RecordError

CHANGING = [
    RoutingKnobs(top_k=[None, 1, 2, 3][t % 4], temperature=0.3 + t / 3, global_weight=t - 2.0)
    for t in range(8)
]
SOFTMAXES = {"softmax": (True, False), "softmax-topk": (False, True), "none": (False, False)}


@pytest.mark.parametrize(
    ("softmax", "layerwise", "effective", "knobs"),
    [
        *product(SOFTMAXES, (True, False), (True, False), (None,)),
        *product(
            SOFTMAXES,
            (True, False),
            (True, False),
            (RoutingKnobs(top_k=2, temperature=0.5, global_weight=-1.5), RoutingKnobs(top_k=3)),
        ),
    ],
)
def test_scalings_are_those_of_the_long_way(softmax, layerwise, effective, knobs) -> None:
    enable_softmax, enable_softmax_topk = SOFTMAXES[softmax]
    run = make_run(
        knobs=CHANGING,
        layerwise=layerwise,
        enable_softmax=enable_softmax,
        enable_softmax_topk=enable_softmax_topk,
    )
    scalings = run.scalings(0, knobs, effective)
    assert (scalings.shape, scalings.dtype) == ((8, 2, 3), np.float32)
    expected = expected_scalings(run, 0, knobs, effective=effective)
    np.testing.assert_allclose(scalings, expected, rtol=1e-5, atol=1e-6)


def test_changing_knobs_are_each_in_force_at_their_tokens_only() -> None:
    run = make_run(knobs=CHANGING)
    effective = run.scalings(0, effective=True)
    kept = (effective != 0).sum(axis=2)
    # The first module has all three adapters; the weight of token 2 is 0.
    assert kept[:, 0].tolist() == [3, 1, 0, 3, 3, 1, 2, 3]


def test_absent_pairs_take_softmax_mass_but_have_no_effect() -> None:
    run = make_run()
    np.testing.assert_allclose(run.scalings(0).sum(axis=2), 1, rtol=1e-6)
    assert (run.scalings(0)[:, 1, 1] > 0).all()
    assert (run.scalings(0, effective=True)[:, 1, 1] == 0).all()


@pytest.mark.parametrize(
    ("arm", "row"),
    [
        (Arm.merged(), [1 / 3, 1 / 3, 1 / 3]),
        (Arm.base(), [0, 0, 0]),
        (Arm.expert("code"), [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("knobs", [None, RoutingKnobs(top_k=1, global_weight=5.0)])
def test_other_arms_are_constant_whatever_the_knobs(arm, row, knobs) -> None:
    run = make_run(arms=[arm])
    raw = run.scalings(0, knobs)
    assert raw.shape == (8, 2, 3)
    np.testing.assert_array_equal(raw, np.broadcast_to(np.float32(row), raw.shape))
    np.testing.assert_array_equal(run.scalings(0, knobs, True), raw * np.array(PRESENT))


def test_scalings_can_be_written_without_changing_the_run() -> None:
    for arms, layerwise in (
        ((Arm.routed(),), True),
        ((Arm.routed(),), False),
        ((Arm.base(),), True),
    ):
        run = make_run(arms=arms, layerwise=layerwise)
        before = run.scalings(0)
        run.scalings(0)[:] = 9
        np.testing.assert_array_equal(run.scalings(0), before)


def test_a_growing_run_has_scalings_for_the_tokens_read_so_far() -> None:
    run = make_run(finish=None, n_routed=6)
    assert (run.tracks[0].n_tokens, run.tracks[0].n_routed) == (8, 6)
    assert run.scalings(0).shape == (6, 2, 3)
    assert make_run(0, 0).scalings(0, effective=True).shape == (0, 2, 3)


def test_text_is_the_response_exactly() -> None:
    pieces = ["<s>", "Hi", "", " é", "<script>", "<|end|>"]
    run = make_run(2, 4, pieces=pieces, finish="stop")
    assert run.text(0) == " é<script><|end|>"
    assert run.text(0, stop_token=False) == " é<script>"
    cut = make_run(2, 4, pieces=pieces, finish="length")
    assert cut.text(0, stop_token=False) == " é<script><|end|>"


def test_arm_labels_differ() -> None:
    arms = [Arm.routed(), Arm.merged(), Arm.routed(), Arm.expert("math"), Arm.routed()]
    labels = make_run(arms=arms).arm_labels
    assert labels == ["routed", "merged", "routed#2", "expert:math", "routed#3"]
    names = ("a", "a#2", "b")
    arms = [Arm.expert("a#2"), Arm.expert("a"), Arm.expert("a")]
    labels = make_run(arms=arms, adapter_names=names).arm_labels
    assert labels == ["expert:a#2", "expert:a", "expert:a#3"]


@pytest.mark.parametrize("arm", [-1, 1, 7])
def test_an_arm_that_is_not_there_is_refused(arm: int) -> None:
    run = make_run()
    for ask in (
        lambda: run.scalings(arm),
        lambda: run.text(arm),
        lambda: run.bucketed(arm=arm),
        lambda: run.long_table(arm=arm),
        lambda: run.to_csv_text("token", arm=arm),
    ):
        with pytest.raises(ConfigError, match=f"the run has 1 arms.*there is no arm {arm}"):
            ask()


def test_a_top_k_beyond_the_adapters_is_refused() -> None:
    run = make_run()
    for ask in (run.scalings, lambda knobs: run.bucketed(knobs=knobs), run.long_table):
        with pytest.raises(ConfigError, match="top_k must be None or a whole number from 1 to 3"):
            ask(knobs=RoutingKnobs(top_k=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_prompt": 9}, "n_prompt: expected 0 to 8, got 9"),
        ({"n_prompt": -1}, "n_prompt: expected 0 to 8, got -1"),
        ({"pieces": ["a"]}, "pieces: expected 8 texts, got 1"),
        ({"top_k": np.zeros(7, np.int16)}, r"top_k: expected shape \[8\], got \[7\]"),
        ({"seconds": np.zeros(8)}, "seconds: expected dtype float32, got float64"),
        ({"router_logits": None}, "router_logits: a routed arm has no router logits"),
        ({"arm": Arm.base()}, "router_logits: a base arm has router logits"),
        (
            {"router_logits": np.zeros((8, 1, 3), np.float16)},
            r"router_logits: expected shape \[8, 2, 3\], got \[8, 1, 3\]",
        ),
        (
            {"alternative_logprobs": np.zeros((8, 3), np.float32)},
            r"alternative_logprobs: expected shape \[8, 2\], got \[8, 3\]",
        ),
    ],
)
def test_a_track_that_does_not_fit_is_refused(changes, message) -> None:
    run = make_run()
    with pytest.raises(RecordError, match=r"track 0 \(\w+\): " + message):
        Run(run.header, [replace(run.tracks[0], **changes)])


def test_a_run_of_another_adapter_or_of_nothing_is_refused() -> None:
    base = make_run(arms=[Arm.base()])
    track = replace(base.tracks[0], arm=Arm.expert("law"))
    with pytest.raises(RecordError, match="arm: the run has no adapter 'law'"):
        Run(base.header, [track])
    with pytest.raises(RecordError, match="a run needs at least one track"):
        Run(base.header, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "../../etc"}, "run_id must be 1 to 64 letters, digits, '_' or '-'"),
        ({"created": "yesterday"}, "created must be an ISO 8601 time with its UTC offset"),
        ({"created": "2026-01-02T03:04:05"}, "created must be an ISO 8601 time"),
        ({"adapter_names": ()}, "adapter_names must not be empty"),
        ({"adapter_names": ("a", "b", "a")}, "adapter_names must differ"),
        ({"layer_names": "ab"}, "layer_names must be a list of texts"),
        ({"present": PRESENT[:1]}, r"present must have 2 rows \(modules\) of 3 values"),
        ({"present": [[1, 0, 1], [1, 1, 1]]}, "present must be a list of lists of true and false"),
        ({"enable_softmax": 1}, "enable_softmax must be true or false, got 1"),
        ({"enable_softmax_topk": True}, "exclude each other"),
        ({"scaling_pass_value": float("nan")}, "scaling_pass_value must be a finite number"),
        ({"scaling_pass_value": 10**400}, "scaling_pass_value must be a finite number"),
        ({"model_id": None}, "model_id must be text, got NoneType"),
        ({"versions": {"torch": 2}}, "versions must map texts to texts"),
        ({"sampling": {}}, "sampling must be SamplingParams"),
        ({"format_version": 1}, "format_version must be 3, got 1"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes, message) -> None:
    with pytest.raises(RecordError, match=message):
        make_header(**changes)


def test_a_header_keeps_its_own_copies() -> None:
    names, hashes = list(ADAPTERS), {"math": "1"}
    header = make_header(adapter_names=names, adapter_hashes=hashes)
    names.append("law")
    hashes["math"] = "2"
    assert header.adapter_names == ADAPTERS
    assert header.adapter_hashes == {"math": "1"}


def test_headers_number_and_date_themselves() -> None:
    header = make_header()
    values = {name: getattr(header, name) for name in header.__dataclass_fields__}
    del values["run_id"], values["created"]
    first, second = (type(header)(**values) for _ in range(2))
    assert first.run_id != second.run_id
    assert len(first.run_id) == 32
    assert first.created.endswith("+00:00")


def test_a_run_file_opens_without_transformers(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    make_run().save(path)
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from xlora_core import Run\n"
        f"run = Run.load({str(path)!r})\n"
        "print(run.scalings(0, effective=True).shape, len(run.bucketed('segment')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "(8, 2, 3) 12\n"

"""The bytes for the component: a round trip through Python, and through the JavaScript reader."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from app import frames
from app.components import heatmap
from app.components.heatmap import payload
from app.components.heatmap.planes import Planes
from tests.app import runs
from tests.app.fake_engine import Fake, fake_client
from xlora_core import AdapterOverride, Arm, RoutingKnobs, SamplingParams

needs_node = pytest.mark.skipif(
    shutil.which("node") is None,
    reason="node is missing: it runs the component's reader outside of a browser "
    "(on Debian: apt-get install nodejs)",
)

READ = """
import { readFileSync } from "node:fs";
const { header, planes } = readMessage(new Uint8Array(readFileSync(process.argv[2])));
const routing = new Routing({ header, planes });
const out = [];
for (let t = 0; t < routing.nTokens; t++)
  for (let l = 0; l < routing.nRows; l++)
    for (let k = 0; k < routing.nAdapters; k++)
      out.push([routing.scaling(t, l, k), routing.effective(t, l, k), routing.isKept(t, l, k)]);
console.log(JSON.stringify({ values: out, run: header.run_id, last: routing.knobs(1e9) }));
"""

PINNED = AdapterOverride.pin("math", 1.5)
MUTED_BY_MODULE = AdapterOverride.mute("python", "*.q_proj")


def read_in_node(message: bytes, folder) -> dict:
    (folder / "message.bin").write_bytes(message)
    module = folder / "read.mjs"
    module.write_text(heatmap.script() + READ)
    command = ["node", str(module), str(folder / "message.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_pack_and_unpack_are_inverse():
    arrays = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    }
    header, back = payload.unpack(payload.pack({"text": "é"}, arrays))
    assert header["text"] == "é"
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert (back[name] == array).all()


def test_keys_of_the_header_are_pinned():
    header, arrays = payload.unpack(payload.message(runs.run(other=[" x"]), version=3, live=False))
    assert sorted(header) == [
        "adapters",
        "arms",
        "arrays",
        "effective",
        "effective_range",
        "expected_tokens",
        "knob_changes",
        "knobs",
        "layerwise",
        "live",
        "modules",
        "palette",
        "range",
        "rerouted",
        "routed_arm",
        "run_id",
        "softmax",
        "steered",
        "version",
    ]
    assert sorted(arrays) == [
        "number",
        "number_effective",
        "present",
        "scalings",
        "share",
        "share_effective",
        "weight",
    ]


def test_text_is_sent_once_and_unchanged():
    run = runs.run(answer=[" <script>", "é\n", ""], other=[" x"])
    header, _ = payload.unpack(payload.message(run, version=1, live=False))
    routed, merged = header["arms"]
    assert routed["pieces"] == ["a", " b", " <script>", "é\n", ""]
    assert merged["pieces"] == [" x"]
    assert merged["first"] == merged["n_prompt"] == 2
    assert merged["first_difference"] == 0
    assert routed["probability"] == [0.607, 0.607, 0.607]


def test_values_survive_within_half_a_code():
    run = runs.run()
    _, arrays = payload.unpack(payload.message(run, version=1, live=False))
    exact = frames.routing(run, 0).scalings
    assert np.abs(arrays["scalings"] / 255 - exact).max() <= 0.5 / 255 + 1e-6


def test_a_run_without_routing_is_text_only():
    recorder = runs.RunRecorder(runs.header(), [runs.track(Arm.base(), [" x"])])
    header, arrays = payload.unpack(payload.message(recorder.snapshot(), version=1, live=False))
    assert header["routed_arm"] is None
    assert arrays == {}
    assert header["arms"][0]["pieces"] == ["a", " b", " x"]


def test_rerouted_says_so():
    knobs = RoutingKnobs(top_k=1, temperature=0.5, global_weight=1.5)
    header, arrays = payload.unpack(payload.message(runs.run(), version=1, live=False, knobs=knobs))
    assert header["rerouted"]
    assert header["knobs"] == [[0, "top-k 1 · temperature 0.5 · weight 1.5"]]
    assert header["knob_changes"] == []
    assert header["effective_range"] == [0.0, 2.0]
    assert "kept" in arrays


@pytest.mark.parametrize(
    "options",
    [
        {"knobs": {0: RoutingKnobs(), 3: RoutingKnobs(top_k=1, global_weight=1.5)}},
        {"enable_softmax": False},
        {"enable_softmax": False, "enable_softmax_topk": True, "knobs": {0: RoutingKnobs(top_k=2)}},
        {"knobs": {2: RoutingKnobs(overrides=[PINNED]), 3: RoutingKnobs()}},
        {"knobs": {3: RoutingKnobs(overrides=[MUTED_BY_MODULE])}, "layerwise": False},
    ],
    ids=["knobs", "no-softmax", "softmax-topk", "override", "shared-override-by-module"],
)
def test_planes_that_grow_row_by_row_are_those_of_the_whole(options):
    run = runs.run(**options)
    grown = Planes()
    for n in range(1, run.tracks[0].n_tokens + 1):
        grown.read(beginning(run, n), 0)
    whole = Planes()
    whole.read(run, 0)
    assert (grown.range, grown.effective_range) == (whole.range, whole.effective_range)
    assert grown.arrays().keys() == whole.arrays().keys()
    for name, array in whole.arrays().items():
        assert grown.arrays()[name].dtype == array.dtype
        assert grown.arrays()[name] == pytest.approx(array), name


def test_effective_scalings_under_overrides_are_a_plane_of_their_own():
    """The browser cannot derive them: a pinned adapter acts whatever the router says."""
    knobs = RoutingKnobs(top_k=1, overrides=[PINNED, AdapterOverride.mute("verse")])
    run = runs.run()
    header, arrays = payload.unpack(payload.message(run, version=1, live=False, knobs=knobs))
    assert (header["effective"], header["steered"]) == ("plane", True)
    low, high = header["effective_range"]
    drawn = low + arrays["effective"] / 255 * (high - low)
    assert drawn == pytest.approx(run.scalings(0, knobs, True), abs=(high - low) / 500)
    assert drawn[:, :, 0] == pytest.approx(1.5, abs=0.01)
    kept = (arrays["kept"][..., 0, None] >> np.arange(3)) & 1
    assert (kept[:, :, 0] == 1).all()
    assert (kept[:, :, 2] == 0).all()
    plain, others = payload.unpack(payload.message(run, version=1, live=False))
    assert (plain["effective"], plain["steered"]) == ("derived", False)
    assert (arrays["scalings"] == others["scalings"]).all()


def test_a_shared_router_has_rows_where_overrides_differ_by_module():
    run = runs.run(layerwise=False)
    knobs = RoutingKnobs(overrides=[MUTED_BY_MODULE])
    header, arrays = payload.unpack(payload.message(run, version=1, live=False, knobs=knobs))
    assert header["layerwise"]
    assert arrays["scalings"].shape == (5, 4, 3)
    assert (arrays["effective"][:, [0, 2], 1] == 0).all()
    assert (arrays["effective"][:, [1, 3], 1] > 0).all()
    everywhere = RoutingKnobs(overrides=[AdapterOverride.mute("python")])
    header, arrays = payload.unpack(payload.message(run, version=1, live=False, knobs=everywhere))
    assert not header["layerwise"]
    assert arrays["effective"].shape == (5, 1, 3)


def test_rows_that_stand_are_not_computed_again(monkeypatch):
    run = runs.run()
    planes = Planes()
    planes.read(beginning(run, 4), 0)
    sizes = []
    routing = frames.routing

    def counted(tail, *rest):
        sizes.append(tail.tracks[0].n_tokens)
        return routing(tail, *rest)

    monkeypatch.setattr(frames, "routing", counted)
    planes.read(run, 0)
    planes.read(run, 0)
    assert sizes == [1]


def test_planes_of_another_run_start_anew():
    planes = Planes()
    planes.read(runs.run(), 0)
    planes.read(runs.run(answer=[" x"], run_id="1" * 32), 0)
    assert planes.n_rows == 3


def beginning(run, n_tokens):
    """Returns the run as it was when the routed arm had ``n_tokens``."""
    track = run.tracks[0]
    arrays = {name: array[:n_tokens] for name, array in track.arrays().items()}
    arrays |= {"pieces": track.pieces[:n_tokens], "n_prompt": min(track.n_prompt, n_tokens)}
    n_sets = int(arrays["override_set"].max())
    arrays |= {"override_sets": track.override_sets[:n_sets]}
    return replace(run, tracks=[replace(track, **arrays, finish_reason=None)])


def test_a_typical_frame_stays_small():
    client = fake_client(Fake(delay=0.0))
    handle = client.submit(
        [{"role": "user", "content": "Why does salt dissolve?"}],
        [Arm.routed(RoutingKnobs(top_k=2)), Arm.merged()],
        SamplingParams(max_new_tokens=128),
    )
    run = handle.wait(30)
    assert len(payload.message(run, version=1, live=False)) < 256 * 1024


@needs_node
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"knobs": {0: RoutingKnobs(top_k=2), 3: RoutingKnobs(top_k=1, global_weight=1.5)}},
        {"enable_softmax": False, "knobs": {0: RoutingKnobs(top_k=2)}},
        {"enable_softmax": False, "enable_softmax_topk": True, "knobs": {0: RoutingKnobs(top_k=2)}},
        {"layerwise": False},
        {"present": [[True, True, False]] * 4},
    ],
    ids=["plain", "knobs", "no-softmax", "softmax-topk", "shared", "absent"],
)
def test_the_browser_reads_what_the_core_computes(options, tmp_path):
    run = runs.run(**options)
    message = payload.message(run, version=1, live=False)
    seen = read_in_node(message, tmp_path)
    exact = frames.routing(run, 0)
    header, _ = payload.unpack(message)
    ranges = (*header["range"], *header["effective_range"])
    # A code, and the weight that the browser multiplies it by.
    step = (max(ranges) - min(ranges)) / 255 * max(1.0, float(exact.global_weight.max()))
    values = np.array([row[:2] for row in seen["values"]])
    assert np.abs(values[:, 0] - exact.scalings.ravel()).max() <= step
    assert np.abs(values[:, 1] - exact.effective.ravel()).max() <= step
    kept = np.array([row[2] for row in seen["values"]])
    assert (kept == (~exact.cut & exact.present).ravel()).all()


@needs_node
def test_the_script_is_one_valid_module(tmp_path):
    module = tmp_path / "module.mjs"
    module.write_text(heatmap.script())
    done = subprocess.run(
        ["node", "--check", str(module)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

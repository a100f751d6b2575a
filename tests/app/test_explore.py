"""The Explore page's logic: what each widget does to the run on the screen."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from app import actions, engine_client, presets, session
from app.components.heatmap import payload
from app.panels import messages
from tests.app.fake_engine import ADAPTERS
from xlora_core import EngineLimits, RoutingKnobs
from xlora_core.errors import CheckpointError, RunFileError

TOP_K = session.knob_top_k(len(ADAPTERS))


def press(at: AppTest, label: str) -> AppTest:
    (button,) = [b for b in at.button if b.label == label]
    return button.click().run()


def labels(at: AppTest) -> list[str]:
    return [b.label for b in at.button]


def shown(at: AppTest) -> session.Show:
    return at.session_state["show"]


def frame(at: AppTest):
    (component,) = at.get("bidi_component")
    return payload.unpack(component.proto.bytes)


def generate(at: AppTest, text: str = "Why does salt dissolve?") -> AppTest:
    at.text_area(key=session.PROMPT).set_value(text)
    press(at, "Generate")
    return settled(at)


def settled(at: AppTest) -> AppTest:
    """Waits for the run, then does what the next poll of the fragment does."""
    assert not at.exception
    handle = shown(at).handle
    if handle is not None:
        assert handle.ended.wait(30)
        at.run()
    return at


def test_starts_empty_and_says_what_to_do(open_app):
    at = open_app()
    assert not at.exception
    assert at.info[0].value == messages.EMPTY
    assert "Generate" in labels(at)
    assert not at.get("bidi_component")
    assert not at.get("download_button")


def test_the_header_says_what_the_model_is(open_app):
    at = open_app()
    facts = at.markdown[0].value
    for part in ("fake-model", "14 adapted modules", "4 adapters", "cpu, float32", "600 tokens"):
        assert part in facts


def test_a_preset_fills_the_prompt(open_app):
    at = open_app()
    preset = presets.load()[1]
    at.pills(key=session.PRESET).set_value(preset.title).run()
    assert at.text_area(key=session.PROMPT).value == preset.prompt
    assert any(preset.look_at in caption.value for caption in at.caption)


def test_generate_shows_the_finished_run(open_app):
    at = generate(open_app())
    header, arrays = frame(at)
    assert not shown(at).live
    assert [arm["kind"] for arm in header["arms"]] == ["routed", "merged"]
    assert not header["live"]
    assert arrays["scalings"].shape[1:] == (14, 4)
    assert "Generate" in labels(at)
    assert [d.label for d in at.get("download_button")] == ["Scalings (CSV)", "Run file"]


def test_while_it_runs_there_is_stop(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate)
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    assert "Stop" in labels(at)
    assert "Generate" not in labels(at)
    handle = shown(at).handle
    press(at, "Stop")
    gate.set()
    handle.ended.wait(30)
    at.run()
    assert shown(at).run.tracks[0].finish_reason == "cancelled"
    assert "Generate" in labels(at)


def test_knobs_reach_the_live_run_and_only_it(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate)
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    handle = shown(at).handle
    assert handle.knobs[0] == RoutingKnobs()
    at.slider(key=TOP_K).set_value(2).run()
    at.slider(key=session.KNOB_TEMPERATURE).set_value(0.5).run()
    at.slider(key=session.KNOB_WEIGHT).set_value(0.8).run()
    assert handle.knobs[0] == RoutingKnobs(top_k=2, temperature=0.5, global_weight=0.8)
    assert not at.warning
    gate.set()
    handle.wait(30)
    at.run()
    header, _ = frame(at)
    n_prompt = header["arms"][0]["n_prompt"]
    assert header["knob_changes"] == [[n_prompt, "top-k 2 · temperature 0.5 · weight 0.8"]]


def test_after_the_run_knobs_reroute_and_say_so(open_app):
    at = generate(open_app())
    before, arrays = frame(at)
    at.slider(key=TOP_K).set_value(1).run()
    assert at.warning[0].value == messages.REROUTED
    header, rerouted = frame(at)
    assert header["rerouted"]
    assert header["arms"] == before["arms"]
    assert "kept" in rerouted
    assert "kept" not in arrays
    press(at, "Back to recorded")
    assert not at.warning
    assert not frame(at)[0]["rerouted"]
    assert at.slider(key=TOP_K).value == len(ADAPTERS)


def test_regenerate_takes_the_new_settings(open_app):
    at = generate(open_app())
    first = shown(at)
    at.slider(key=session.KNOB_TEMPERATURE).set_value(2.0).run()
    press(at, "Regenerate with these settings")
    assert shown(at) is not first
    settled(at)
    assert not at.warning
    assert set(shown(at).run.tracks[0].temperature) == {2.0}
    assert shown(at).request.prompt == first.request.prompt
    assert len(at.session_state["shows"]) == 2


def test_knobs_before_a_run_are_its_start(open_app):
    at = open_app()
    at.slider(key=TOP_K).set_value(3).run()
    generate(at)
    assert set(shown(at).run.tracks[0].top_k) == {3}


def test_knobs_outside_of_the_sliders_reach_are_shown_as_they_are(open_app):
    at = generate(open_app())
    run = shown(at).run
    track = run.tracks[0]
    hot = replace(track, temperature=track.temperature * 8, global_weight=track.global_weight * -1)
    data = replace(run, tracks=[hot]).to_bytes()
    at.file_uploader[0].set_value(("hot.safetensors", data, "")).run()
    assert not at.exception
    assert at.slider(key=session.KNOB_TEMPERATURE).value == 8.0
    assert at.slider(key=session.KNOB_WEIGHT).value == -1.0
    at.slider(key=session.KNOB_WEIGHT).set_value(0.5).run()
    assert not at.exception
    assert at.slider(key=session.KNOB_TEMPERATURE).value == 8.0
    assert at.slider(key=session.KNOB_WEIGHT).value == 0.5
    assert frame(at)[0]["knobs"] == [[0, "top-k all · temperature 8 · weight 0.5"]]


def test_arms_are_chosen(open_app):
    at = open_app()
    at.pills(key=session.ARMS).set_value([actions.BASE, "python alone"]).run()
    generate(at)
    kinds = [track.arm.label for track in shown(at).run.tracks]
    assert kinds == ["routed", "base", "expert:python"]


def test_sampling_is_passed_on(open_app):
    at = open_app()
    at.number_input(key=session.MAX_NEW_TOKENS).set_value(5)
    at.slider(key=session.TEMPERATURE).set_value(0.7).run()
    at.number_input(key=session.SEED).set_value(9).run()
    generate(at)
    sampling = shown(at).request.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (5, 0.7, 9)
    assert len(frame(at)[0]["arms"][1]["pieces"]) == 5


def test_raw_text_is_sent_as_it_is(open_app):
    at = open_app()
    at.toggle(key=session.AS_CHAT).set_value(False).run()
    generate(at, "once upon")
    assert shown(at).request.prompt == "once upon"


@pytest.mark.parametrize("text", ["", "   \n"])
def test_an_empty_prompt_is_refused(open_app, text):
    at = open_app()
    at.text_area(key=session.PROMPT).set_value(text)
    press(at, "Generate")
    assert "the prompt is empty" in at.error[0].value
    assert "Hint" in at.error[0].value
    assert session.current is not None
    assert at.info[0].value == messages.EMPTY


def test_a_long_prompt_says_how_long_and_keeps_the_run(open_app):
    at = generate(open_app(context_length=40))
    kept = shown(at)
    at.text_area(key=session.PROMPT).set_value("salt " * 60)
    press(at, "Generate")
    assert "tokens, the model reads at most 40" in at.error[0].value
    assert shown(at) is kept
    assert at.get("bidi_component")


def test_a_failing_run_keeps_what_it_wrote(open_app):
    at = generate(open_app(fails_after=3))
    assert "the step failed" in at.error[0].value
    assert not shown(at).live
    assert len(frame(at)[0]["arms"][1]["pieces"]) == 3
    assert not at.exception


def test_a_full_queue_is_an_answer(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate, max_queue=0)
    client = engine_client.shared_client()
    client.engine.submit("salt")
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    assert "the queue is full" in at.error[0].value
    gate.set()


def test_waiting_says_how_many_are_before(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate)
    client = engine_client.shared_client()
    client.engine.submit("salt")
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    assert any("1 request before yours; it starts" in m.value for m in at.markdown)
    press(at, "Stop")
    at.run()
    assert any("before it started" in m.value for m in at.markdown)
    gate.set()


def test_waiting_says_about_how_long(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate, expected_seconds=11.2)
    engine_client.shared_client().engine.submit("salt")
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    assert any("1 request before yours, about 12 s; it starts" in m.value for m in at.markdown)
    gate.set()


def test_prefetch_hits_are_shown_and_explained(open_app):
    at = generate(open_app())
    [line] = [m for m in at.markdown if "prefetch hits" in m.value]
    track = shown(at).run.tracks[0]
    assert f"prefetch hits {track.n_hit / track.n_guessed:.0%}" in line.value
    assert "one run over the model's weights instead of two" in line.help


def test_each_visitor_is_a_client_of_its_own(open_app):
    gate = threading.Event()
    clients = []
    for _ in range(2):
        at = open_app(waits_for=gate)
        at.text_area(key=session.PROMPT).set_value("salt")
        press(at, "Generate")
        clients.append(shown(at).handle.client)
    gate.set()
    assert all(clients)
    assert clients[0] != clients[1]


def test_no_more_tokens_can_be_asked_for_than_are_allowed(open_app):
    at = open_app(limits=EngineLimits(max_new_tokens=40))
    box = at.number_input(key=session.MAX_NEW_TOKENS)
    assert (box.max, box.value) == (40, 40)
    at = open_app()
    box = at.number_input(key=session.MAX_NEW_TOKENS)
    assert (box.max, box.value) == (4096, 96)


def test_a_broken_run_file_changes_nothing(open_app):
    at = generate(open_app())
    kept = shown(at)
    before, _ = frame(at)
    at.file_uploader[0].set_value(("broken.safetensors", b"not a run", "")).run()
    assert not at.exception
    assert "broken.safetensors" in at.error[0].value.replace("\\", "")
    assert shown(at) is kept
    assert frame(at)[0]["run_id"] == before["run_id"]


def test_a_run_file_opens_and_reroutes(open_app):
    at = generate(open_app())
    data = shown(at).run.to_bytes()
    run_id = shown(at).run.header.run_id
    other = open_app()
    other.file_uploader[0].set_value(("mine.safetensors", data, "")).run()
    assert not other.exception
    assert shown(other).source == "file"
    header, _ = frame(other)
    assert header["run_id"] == run_id
    other.slider(key=TOP_K).set_value(1).run()
    assert other.warning[0].value == messages.REROUTED
    press(other, "Regenerate with these settings")
    settled(other)
    assert shown(other).source == "engine"
    assert set(shown(other).run.tracks[0].top_k) == {1}


def test_earlier_runs_come_back(open_app):
    at = open_app()
    at.slider(key=session.KNOB_TEMPERATURE).set_value(0.7).run()
    generate(at, "first")
    at.slider(key=session.KNOB_TEMPERATURE).set_value(2.0).run()
    generate(at, "second")
    newest = shown(at)
    box = at.selectbox(key=session.SHOWN)
    assert [option.split(". ")[1] for option in box.options] == ["second", "first"]
    box.set_value(box.options[1]).run()
    assert shown(at) is not newest
    assert shown(at).title == "first"
    assert at.slider(key=session.KNOB_TEMPERATURE).value == 0.7
    assert not at.warning


def test_an_unchanged_run_is_not_packed_again(open_app, monkeypatch):
    at = generate(open_app())
    at.run()
    monkeypatch.setattr("app.pages.explore.message", lambda *_, **__: pytest.fail("packed again"))
    at.run()
    assert not at.exception


def test_a_model_that_cannot_be_loaded_says_why(open_app, monkeypatch):
    at = open_app()

    def fail():
        raise CheckpointError("sample_data/demo is missing", hint="run make demo")

    monkeypatch.setattr(engine_client, "open_engine", fail)
    engine_client.shared_client.clear()
    at.run()
    assert not at.exception
    text = at.error[0].value.replace("\\", "")
    assert "The model could not be loaded: sample_data/demo is missing" in text
    assert "Hint: run make demo" in text
    assert labels(at) == ["Try again"]


def test_any_other_failure_to_load_shows_no_traceback(open_app, monkeypatch):
    at = open_app()
    monkeypatch.setattr(engine_client, "open_engine", lambda: 1 / 0)
    engine_client.shared_client.clear()
    at.run()
    assert not at.exception
    assert "ZeroDivisionError" in at.error[0].value


def test_a_router_without_softmax_has_no_temperature(open_app):
    at = generate(open_app(enable_softmax=False))
    assert at.slider(key=session.KNOB_TEMPERATURE).disabled
    header, _ = frame(at)
    low, high = header["range"]
    assert low == -high


def test_a_shared_router_is_drawn_as_one_row(open_app):
    header, arrays = frame(generate(open_app(layerwise=False)))
    assert not header["layerwise"]
    assert arrays["scalings"].shape[1] == 1


def test_markdown_in_messages_is_shown_as_text():
    assert messages.plain("a_b *c* [d](e) <f> $g$") == (r"a\_b \*c\* \[d\]\(e\) \<f\> \$g\$")


def test_run_file_errors_are_errors_of_the_core():
    with pytest.raises(RunFileError):
        actions.Run.from_bytes(b"")

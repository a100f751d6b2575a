"""Steering single adapters from the sidebar: what each choice does to the run on the screen."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from app import session, steering
from app.panels import messages
from app.steering import AUTO, BY_MODULE, CHOICES, MUTE, PIN, SCALE
from tests.app.fake_engine import ADAPTERS
from tests.app.test_explore import frame, generate, press, settled, shown
from xlora_core import AdapterOverride, RoutingKnobs

pin, scale, mute = AdapterOverride.pin, AdapterOverride.scale, AdapterOverride.mute
Q_PROJ = "*.q_proj"


def choose(at: AppTest, name: str, choice: str) -> AppTest:
    return at.selectbox(key=session.steer_choice(name)).set_value(choice).run()


def chosen(at: AppTest) -> list[object]:
    return [at.selectbox(key=session.steer_choice(name)).value for name in ADAPTERS]


def slide(at: AppTest, choice: str, name: str, value: float) -> AppTest:
    return at.slider(key=session.steer_value(choice, name)).set_value(value).run()


def captions(at: AppTest) -> str:
    return "\n".join(caption.value.replace("\\", "") for caption in at.caption)


def test_every_adapter_starts_with_the_router(open_app):
    at = open_app()
    assert chosen(at) == [AUTO] * 4
    control = at.selectbox(key=session.steer_choice("verse"))
    assert (control.label, control.options) == ("verse", list(CHOICES))
    assert "Steered" not in captions(at)
    (button,) = [b for b in at.button if b.label == "All to auto"]
    assert button.disabled
    assert [s.key for s in at.slider if str(s.key).startswith("steer.")] == []


def test_choices_before_a_run_are_its_start(open_app):
    at = open_app()
    choose(at, "math", MUTE)
    choose(at, "python", SCALE)
    slide(at, SCALE, "python", 1.5)
    choose(at, "verse", PIN)
    expected = (mute("math"), scale("python", 1.5), pin("verse", 0.5))
    steered = "Steered: math muted · python rescaled by 1.5 · verse pinned at 0.5"
    assert steered in captions(at)
    generate(at)
    track = shown(at).run.tracks[0]
    assert track.arm.knobs == RoutingKnobs(overrides=expected)
    assert track.override_sets == (expected,)
    header, arrays = frame(at)
    assert header["knobs"][0][1].endswith(steered.removeprefix("Steered: "))
    assert "effective" in arrays
    assert not at.warning


def test_choices_reach_the_live_run_from_the_next_token(open_app):
    gate = threading.Event()
    at = open_app(waits_for=gate)
    at.text_area(key=session.PROMPT).set_value("salt")
    press(at, "Generate")
    handle = shown(at).handle
    choose(at, "math", MUTE)
    assert handle.knobs[0] == RoutingKnobs(overrides=[mute("math")])
    choose(at, "math", PIN)
    slide(at, PIN, "math", 0.8)
    assert handle.knobs[0] == RoutingKnobs(overrides=[pin("math", 0.8)])
    gate.set()
    handle.wait(30)
    at.run()
    header, _ = frame(at)
    n_prompt = header["arms"][0]["n_prompt"]
    assert header["knob_changes"] == [[n_prompt, "math pinned at 0.8"]]


def test_after_the_run_choices_reroute_it(open_app):
    at = generate(open_app())
    _, before = frame(at)
    choose(at, "chemistry", MUTE)
    assert at.warning[0].value == messages.REROUTED
    header, arrays = frame(at)
    assert header["rerouted"]
    assert header["steered"]
    assert (arrays["scalings"] == before["scalings"]).all()
    assert (arrays["effective"][:, :, 1] == 0).all()
    press(at, "Back to recorded")
    assert chosen(at) == [AUTO] * 4
    assert not at.warning
    assert not frame(at)[0]["steered"]


def test_regenerate_takes_the_choices(open_app):
    at = generate(open_app())
    choose(at, "math", MUTE)
    press(at, "Regenerate with these settings")
    settled(at)
    assert shown(at).run.tracks[0].override_sets == ((mute("math"),),)


def test_one_button_gives_all_adapters_back(open_app):
    at = generate(open_app())
    choose(at, "math", MUTE)
    choose(at, "verse", SCALE)
    press(at, "All to auto")
    assert chosen(at) == [AUTO] * 4
    assert "Steered" not in captions(at)
    assert frame(at)[0]["knobs"] == [[0, "top-k all · temperature 1 · weight 1"]]


def test_a_slider_remembers_its_value_while_it_is_away(open_app):
    at = open_app()
    choose(at, "math", SCALE)
    slide(at, SCALE, "math", 2.5)
    choose(at, "math", MUTE)
    at.run()
    choose(at, "math", SCALE)
    assert at.slider(key=session.steer_value(SCALE, "math")).value == 2.5


def test_a_file_brings_its_overrides_even_beyond_the_sliders(open_app):
    at = generate(open_app())
    overrides = (pin("math", 7.0), mute("python"), mute("verse"), scale("verse", -1.0))
    open_file(at, steered(shown(at).run, overrides))
    assert chosen(at) == [PIN, AUTO, MUTE, SCALE]
    assert at.slider(key=session.steer_value(PIN, "math")).value == 7.0
    assert at.slider(key=session.steer_value(SCALE, "verse")).value == -1.0
    assert not at.warning
    slide(at, PIN, "math", 0.25)
    assert not at.exception
    assert "Steered: math pinned at 0.25 · python muted · verse rescaled by -1" in captions(at)


def test_overrides_by_module_are_kept_until_another_choice(open_app):
    at = generate(open_app())
    overrides = (mute("verse"), pin("math", 0.5, Q_PROJ), scale("math", 2.0, "*.0.*"))
    open_file(at, steered(shown(at).run, overrides))
    assert chosen(at) == [BY_MODULE, AUTO, AUTO, MUTE]
    assert at.selectbox(key=session.steer_choice("math")).options == [*CHOICES, BY_MODULE]
    by_module = "math pinned at 0.5 in *.q_proj · math rescaled by 2 in *.0.*"
    assert by_module in captions(at)
    choose(at, "verse", AUTO)
    assert frame(at)[0]["knobs"][0][1].endswith(by_module)
    choose(at, "math", MUTE)
    assert frame(at)[0]["knobs"][0][1].endswith("weight 1 · math muted")
    choose(at, "math", BY_MODULE)
    assert frame(at)[0]["knobs"][0][1].endswith(by_module)
    press(at, "All to auto")
    assert chosen(at) == [AUTO] * 4
    choose(at, "math", BY_MODULE)
    assert frame(at)[0]["knobs"][0][1].endswith(by_module)


def test_the_models_own_overrides_are_where_choices_start(open_app):
    own = (mute("chemistry"), pin("verse", 0.5, Q_PROJ))
    at = open_app(overrides=own)
    assert chosen(at) == [AUTO, MUTE, AUTO, BY_MODULE]
    generate(at)
    assert shown(at).run.tracks[0].override_sets == (own,)
    choose(at, "chemistry", AUTO)
    assert frame(at)[0]["knobs"][0][1].endswith("weight 1 · verse pinned at 0.5 in *.q_proj")
    press(at, "All to auto")
    assert not at.exception
    assert chosen(at) == [AUTO] * 4
    choose(at, "verse", BY_MODULE)
    assert frame(at)[0]["knobs"][0][1].endswith("weight 1 · verse pinned at 0.5 in *.q_proj")


def test_names_are_shown_as_text(open_app):
    at = generate(open_app())
    run = shown(at).run
    names = ("**bold**", ":red[x]", *ADAPTERS[2:])
    header = replace(run.header, adapter_names=names, adapter_hashes={})
    open_file(at, replace(run, header=header, tracks=run.tracks[:1]))
    control = at.selectbox(key=session.steer_choice("**bold**"))
    assert control.label == r"\*\*bold\*\*"
    choose(at, ":red[x]", MUTE)
    assert not at.exception
    assert any(r"Steered: \:red\[x\] muted" in caption.value for caption in at.caption)


def open_file(at: AppTest, run) -> None:
    at.file_uploader[0].set_value(("mine.safetensors", run.to_bytes(), "")).run()
    assert not at.exception
    assert not at.error


def steered(run, overrides: tuple[AdapterOverride, ...]):
    """Returns the run as if its routed arm had run under overrides from the start."""
    track = run.tracks[0]
    numbers = track.override_set + 1
    changed = replace(track, override_sets=(overrides,), override_set=numbers)
    return replace(run, tracks=[changed, *run.tracks[1:]])


@pytest.mark.parametrize(
    ("overrides", "choice"),
    [
        ((), (AUTO, None)),
        ((mute("verse"),), (AUTO, None)),
        ((pin("math", 2),), (PIN, 2)),
        ((mute("math", Q_PROJ), scale("math", 2)), (SCALE, 2)),
        ((mute("math"), scale("math", 2, Q_PROJ)), (BY_MODULE, None)),
        ((mute("math", Q_PROJ),), (BY_MODULE, None)),
    ],
)
def test_a_choice_stands_for_the_overrides_that_have_a_say(overrides, choice):
    assert steering.choice_of(steering.of_adapter(overrides, "math")) == choice

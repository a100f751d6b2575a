"""The app over a real engine whose model's layers route themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app import engine_client, session
from app.engine_client import EngineClient, ModelCard
from app.panels import messages
from tests.app.conftest import MAIN
from tests.app.test_explore import frame, press, shown
from tests.gated_models import gated_chat
from tests.tiny_chat import EXPERTS, tiny_tokenizer
from xlora_core import Engine


def generate(at: AppTest) -> AppTest:
    """Runs a prompt to its end, then does what the next poll of the fragment does."""
    at.text_area(key=session.PROMPT).set_value("the sum of two numbers")
    press(at, "Generate")
    assert not at.exception
    handle = shown(at).handle
    if handle is not None:
        handle.wait(60)
        at.run()
    return at


@pytest.fixture
def app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[AppTest]:
    model = gated_chat(tmp_path)
    card = ModelCard(
        model_id="tiny",
        adapter_names=tuple(model.adapter_names),
        n_modules=len(model.lora_layer_names),
        device="cpu",
        dtype="float32",
        context_length=model.context_length,
        config=model.config_xlora,
        knobs=model.default_knobs,
    )
    with Engine(model, tiny_tokenizer(), model_id="tiny") as engine:
        monkeypatch.setattr(engine_client, "open_engine", lambda: EngineClient(engine, card))
        engine_client.shared_client.clear()
        path = str(request.config.rootpath / MAIN)
        at = AppTest.from_file(path, default_timeout=60)
        at.session_state[session.MAX_NEW_TOKENS] = 8
        yield at.run()
    engine_client.shared_client.clear()


def test_it_is_shown_like_any_other(app: AppTest) -> None:
    assert not app.exception
    assert "14 adapted modules, each with a gate of its own" in app.markdown[0].value
    at = generate(app)
    assert not at.exception
    header, arrays = frame(at)
    assert header["layerwise"]
    assert [arm["kind"] for arm in header["arms"]] == ["routed", "merged"]
    run = shown(at).run
    assert run.header.router == "per_layer"
    assert arrays["scalings"].shape == (run.tracks[0].n_tokens, 14, len(EXPERTS))
    assert [d.label for d in at.get("download_button")] == ["Scalings (CSV)", "Run file"]


def test_rerouting_says_that_it_approximates(app: AppTest) -> None:
    at = generate(app)
    assert not at.warning
    at.slider(key=session.KNOB_TEMPERATURE).set_value(0.3).run()
    assert at.warning[0].value == messages.REROUTED + messages.PER_LAYER
    assert frame(at)[0]["rerouted"]

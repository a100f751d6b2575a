"""What the environment may say, and the settings that Streamlit must have."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import engine_client
from xlora_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_without_settings_it_is_the_demo():
    assert engine_client.settings_from({}) == {"base": "demo"}


def test_settings_are_passed_to_load_model():
    settings = engine_client.settings_from(
        {
            "XLORA_APP_MODEL": "models/base",
            "XLORA_APP_ADAPTERS": "math=experts/math, code=experts/code",
            "XLORA_APP_DEVICE": "cpu",
            "XLORA_APP_DTYPE": "bfloat16",
        }
    )
    assert settings == {
        "base": "models/base",
        "adapters": {"math": "experts/math", "code": "experts/code"},
        "device": "cpu",
        "dtype": "bfloat16",
    }


def test_malformed_adapters_are_refused():
    with pytest.raises(ConfigError, match="'experts/math' is not of the form name=folder"):
        engine_client.settings_from({"XLORA_APP_ADAPTERS": "experts/math"})


def test_an_adapter_named_twice_is_refused():
    with pytest.raises(ConfigError, match="two adapters are named 'a'"):
        engine_client.settings_from({"XLORA_APP_ADAPTERS": "a=x,a=y"})


@pytest.mark.parametrize(
    ("base", "path", "name"),
    [
        ("demo", "/cache/smollm2", "SmolLM2-135M-Instruct"),
        ("models/Llama-3/", "models/Llama-3/", "Llama-3"),
        ("org/name", "", "name"),
    ],
)
def test_model_names(base, path, name):
    assert engine_client.model_name(base, path) == name


def test_streamlit_is_configured_as_measured():
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["server"]["address"] == "localhost"
    assert config["browser"]["gatherUsageStats"] is False
    assert config["runner"]["postScriptGC"] is False
    assert config["server"]["enableWebsocketCompression"] is False
    assert config["client"]["showErrorDetails"] == "none"


def test_pages_use_nothing_that_was_found_wanting():
    sources = [path.read_text() for path in (ROOT / "app").rglob("*.py")]
    for banned in ("use_container_width", "components.v1", "plotly_chart", "import torch"):
        assert not [source for source in sources if banned in source], banned


def test_only_the_session_module_names_session_keys():
    for path in (ROOT / "app").rglob("*.py"):
        if path.name != "session.py":
            assert "session_state" not in path.read_text(), path


def test_threads_come_from_the_environment():
    assert engine_client.threads_from({}) is None
    assert engine_client.threads_from({"XLORA_APP_THREADS": " "}) is None
    assert engine_client.threads_from({"XLORA_APP_THREADS": "2"}) == 2
    for wrong in ("-1", "two", "1.5"):
        with pytest.raises(ConfigError, match=f"THREADS must be a whole number, got '{wrong}'"):
            engine_client.threads_from({"XLORA_APP_THREADS": wrong})


@pytest.mark.parametrize(
    ("spread", "names"),
    [
        (None, "cuda:0"),
        ({"": 0}, "cuda:0"),
        (
            {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": "cpu"},
            "cuda:0, cuda:1, cpu",
        ),
        ({"a": 0, "b": "disk", "c": 0}, "cuda:0, disk"),
    ],
)
def test_a_spread_model_names_all_its_devices(spread, names):
    model = SimpleNamespace(device="cuda:0", hf_device_map=spread)
    assert engine_client.device_names(model) == names

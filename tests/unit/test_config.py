"""Configuration: every fault at once, nothing unknown, order kept, no torch needed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import XLoraConfig as PeftXLoraConfig

from xlora_core.config import Arm, RoutingKnobs, SamplingParams, XLoraConfig
from xlora_core.errors import ConfigError, XLoraError

# ---------------------------------------------------------------- XLoraConfig


def test_names_and_defaults_are_pefts() -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(PeftXLoraConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(XLoraConfig)}
    # Our own fields: with these defaults a model is what PEFT's always is.
    assert ours.pop("router") == "classifier"
    assert ours.pop("adapter_overrides") == ()
    del ours["adapters"]
    assert ours == {name: theirs[name] for name in ours}
    assert XLoraConfig().adapters == {}


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        XLoraConfig(
            hidden_size=0,
            adapters={"": "a", "math": 3},
            enable_softmax=1,
            layerwise_scalings="yes",
            xlora_depth=0,
            xlora_size=True,
            xlora_dropout_p=1.0,
            softmax_temperature=0.0,
            top_k_lora=0,
            scaling_pass_value=float("nan"),
            global_scaling_weight=float("inf"),
        )
    assert caught.value.faults == [
        "hidden_size must be None or a whole number >= 1, got 0",
        "adapters: a name must be a non-empty string, got ''",
        "adapters: the folder of 'math' must be a path, got 3",
        "enable_softmax must be true or false, got 1",
        "layerwise_scalings must be true or false, got 'yes'",
        "xlora_depth must be a whole number >= 1, got 0",
        "xlora_size must be a whole number >= 1, got True",
        "xlora_dropout_p must be in [0, 1), got 1.0",
        "softmax_temperature must be finite and > 0, got 0.0",
        "scaling_pass_value must be a finite number, got nan",
        "global_scaling_weight must be a finite number, got inf",
        "top_k_lora must be None or a whole number from 1 to the number of adapters, got 0",
    ]
    assert str(caught.value) == "\n".join(caught.value.faults)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"softmax_temperature": -1.0}, "softmax_temperature must be finite and > 0, got -1.0"),
        (
            {"softmax_temperature": float("inf")},
            "softmax_temperature must be finite and > 0, got inf",
        ),
        ({"softmax_temperature": "hot"}, "softmax_temperature must be finite and > 0, got 'hot'"),
        ({"xlora_dropout_p": -0.1}, "xlora_dropout_p must be in [0, 1), got -0.1"),
        (
            {"enable_softmax_topk": True, "top_k_lora": 1},
            (
                "enable_softmax and enable_softmax_topk exclude each other: "
                "set enable_softmax=False to normalise over the kept adapters only"
            ),
        ),
        (
            {"enable_softmax": False, "enable_softmax_topk": True},
            "enable_softmax_topk needs top_k_lora: say how many adapters to keep",
        ),
        (
            {"adapters": {"a": "1", "b": "2"}, "top_k_lora": 3},
            "top_k_lora must be None or a whole number from 1 to 2 (the number of adapters), got 3",
        ),
        (
            {"adapters": {"a": "1", "b": "2"}, "top_k_lora": 1.0},
            (
                "top_k_lora must be None or a whole number from 1 to 2 (the number of adapters), "
                "got 1.0"
            ),
        ),
        (
            {"adapters": [("math", "a"), ("code", "b"), ("math", "c")]},
            "adapters: two adapters are named 'math', names must differ",
        ),
        ({"adapters": ["ab", "cd"]}, "adapters must map names to folders, got ['ab', 'cd']"),
        ({"adapters": "experts"}, "adapters must map names to folders, got 'experts'"),
        ({"adapters": 3}, "adapters must map names to folders, got 3"),
    ],
)
def test_one_fault(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        XLoraConfig(**fields)
    assert caught.value.faults == [fault]


def test_a_whole_number_that_no_float_holds_is_a_fault_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="global_scaling_weight must be a finite number"):
        XLoraConfig(global_scaling_weight=10**400)


def test_unknown_keys_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError) as caught:
        XLoraConfig.from_dict({"xlora_depth": 2, "top_k": 1, "depth": 3})
    assert caught.value.message == "unknown X-LoRA config keys: 'depth', 'top_k'"
    assert "top_k_lora" in caught.value.hint
    assert "hint: allowed keys: adapter_overrides, adapters, " in str(caught.value)


def test_round_trip_through_json_keeps_twelve_adapters_in_order() -> None:
    names = ["7", "0", "11", "10", "1", "2", "math/algebra", "ä b", "..", "3", "9", "4"]
    config = XLoraConfig(
        adapters={name: f"folder {name}" for name in names},
        hidden_size=8,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k_lora=12,
        layerwise_scalings=True,
        scaling_pass_value=0.25,
    )
    again = XLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert list(again.adapters) == names


def test_adapters_may_be_pairs_and_paths() -> None:
    config = XLoraConfig(adapters=zip("ba", (Path("x") / "b", "y"), strict=True))
    assert list(config.adapters.items()) == [("b", str(Path("x") / "b")), ("a", "y")]


def test_a_changed_copy_is_validated_again_and_the_original_is_frozen() -> None:
    config = XLoraConfig(adapters={"a": "1", "b": "2"}, top_k_lora=2)
    with pytest.raises(ConfigError, match="from 1 to 1 "):
        dataclasses.replace(config, adapters={"a": "1"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k_lora = 1


# ---------------------------------------------------------------- knobs, sampling, arms


def test_knobs_list_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RoutingKnobs(top_k=0, temperature=float("nan"), global_weight=float("-inf"))
    assert caught.value.faults == [
        "top_k must be None or a whole number from 1 to the number of adapters, got 0",
        "temperature must be finite and > 0, got nan",
        "global_weight must be a finite number, got -inf",
    ]


def test_knobs_are_checked_against_the_number_of_adapters() -> None:
    knobs = RoutingKnobs(top_k=4)
    assert knobs.check(4) is knobs
    with pytest.raises(ConfigError) as caught:
        knobs.check(3)
    assert (
        caught.value.message
        == "top_k must be None or a whole number from 1 to 3 (the number of adapters), got 4"
    )


def test_knobs_of_a_config() -> None:
    config = XLoraConfig(
        adapters={"a": "1", "b": "2"},
        top_k_lora=2,
        softmax_temperature=0.5,
        global_scaling_weight=-1.5,
    )
    assert RoutingKnobs.from_config(config) == RoutingKnobs(
        top_k=2, temperature=0.5, global_weight=-1.5
    )


def test_sampling_lists_every_fault_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(
            max_new_tokens=0, temperature=-0.1, top_p=0.0, top_k=0, repetition_penalty=0.0, seed=-1
        )
    assert caught.value.faults == [
        "max_new_tokens must be a whole number >= 1, got 0",
        "sampling temperature must be finite and >= 0, got -0.1",
        "top_p must be in (0, 1], got 0.0",
        "sampling top_k must be None or a whole number >= 1, got 0",
        "repetition_penalty must be finite and > 0, got 0.0",
        "seed must be a whole number from 0 to 2**63 - 1, got -1",
    ]


def test_arms_and_their_labels() -> None:
    arms = [Arm.routed(), Arm.merged(), Arm.base(), Arm.expert("math: a")]
    assert [arm.label for arm in arms] == ["routed", "merged", "base", "expert:math: a"]
    knobs = RoutingKnobs(top_k=1)
    assert Arm.routed(knobs).knobs is knobs


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        (
            {"kind": "best"},
            ["kind must be routed, merged, base or expert, got 'best'"],
        ),
        ({"kind": "expert"}, ["an expert arm, and no other, names its adapter"]),
        (
            {"kind": "base", "adapter": "math", "knobs": RoutingKnobs()},
            [
                "an expert arm, and no other, names its adapter",
                "only a routed arm has knobs, this one is 'base'",
            ],
        ),
    ],
)
def test_contradictory_arms(fields: dict[str, object], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Arm(**fields)
    assert caught.value.faults == faults


def test_config_errors_are_value_errors_of_the_project() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, XLoraError)


# ---------------------------------------------------------------- without torch

_WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from xlora_core import Arm, RoutingKnobs, SamplingParams, XLoraConfig, XLoraError
import xlora_core.errors

print(XLoraConfig(adapters={"a": "b"}).adapters, Arm.routed(RoutingKnobs(top_k=1)).label)
try:
    SamplingParams(seed=-1)
except XLoraError as error:
    print(error)
"""


def test_configuration_and_errors_import_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "{'a': 'b'} routed",
        "seed must be a whole number from 0 to 2**63 - 1, got -1",
    ]

"""What an override is: its fields, its words, the modules it names, its place in a config."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from xlora_core import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.config.overrides import renamed_overrides, with_override
from xlora_core.errors import ConfigError

pin, scale, mute = AdapterOverride.pin, AdapterOverride.scale, AdapterOverride.mute

NAMES = ("math", "code", "verse")
LAYERS = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj")


def knobs_of(*overrides: AdapterOverride, **knobs: object) -> RoutingKnobs:
    return RoutingKnobs(overrides=overrides, **knobs)  # type: ignore[arg-type]  # RoutingKnobs' own


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        (
            {"adapter": " ", "kind": "freeze", "modules": []},
            [
                "adapter must be a name, got ' '",
                "kind must be one of pin, scale, mute, got 'freeze'",
                "modules must name at least one module; None stands for all",
            ],
        ),
        ({"kind": "pin"}, ["value must be a finite number, got None"]),
        ({"kind": "pin", "value": True}, ["value must be a finite number, got True"]),
        ({"kind": "scale", "value": float("nan")}, ["value must be a finite number, got nan"]),
        ({"kind": "scale", "value": 10**400}, [f"value must be a finite number, got {10**400}"]),
        ({"kind": "mute", "value": 0.0}, ["a muted adapter has no value, got 0.0"]),
        ({"kind": "mute", "modules": 3}, ["modules must be paths or patterns, got 3"]),
        (
            {"kind": "mute", "modules": ["a", ""]},
            ["modules must be paths or patterns, got ['a', '']"],
        ),
        ({"kind": "mute", "modules": "*" * 1001}, ["a pattern has at most 1000 characters"]),
    ],
)
def test_every_fault_is_listed_at_once(fields: dict[str, object], faults: list[str]) -> None:
    fields = {"adapter": "math"} | fields
    with pytest.raises(ConfigError) as caught:
        AdapterOverride(**fields)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.faults == [
        f"override of {fields['adapter']!r}: {fault}" for fault in faults
    ]


def test_knobs_take_overrides_only_and_stay_hashable() -> None:
    knobs = RoutingKnobs(overrides=[mute("math", ["*.q_proj"])])
    assert knobs.overrides == (mute("math", "*.q_proj"),)
    assert len({knobs, RoutingKnobs(overrides=(mute("math", ("*.q_proj",)),)), RoutingKnobs()}) == 2
    with pytest.raises(ConfigError) as caught:
        RoutingKnobs(top_k=0, overrides=["math"])  # type: ignore[list-item]  # wrong on purpose
    assert caught.value.faults[1] == "overrides must be a list of AdapterOverride, got ['math']"


def test_labels_say_it_in_words() -> None:
    overrides = [mute("math"), pin("code", 0.5, "*.q_proj"), scale("verse", 2, ["a", "b.*"])]
    assert [o.label for o in overrides] == [
        "math muted",
        "code pinned at 0.5 in *.q_proj",
        "verse rescaled by 2 in a, b.*",
    ]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, [0, 1, 2]),
        ("*", [0, 1, 2]),
        ("*.q_proj", [0, 2]),
        ("model.layers.1.*", [2]),
        ("model.layers.[01].v_proj", [1]),
        ("model.layers.0.q_proj", [0]),
        (["*.1.*", "model.layers.0.q_proj", "*.1.q_proj"], [0, 2]),
        ("q_proj", []),
        ("MODEL.*", []),
        ("model.layers.", []),
    ],
)
def test_modules_are_paths_or_patterns_of_whole_paths(modules, expected) -> None:
    assert mute("math", modules).module_indices(LAYERS) == expected


def test_a_path_with_brackets_is_that_path() -> None:
    layers = ("blocks[0].q", "blocks0.q")
    assert mute("math", "blocks[0].q").module_indices(layers) == [0]
    assert mute("math", "blocks[[]0].q").module_indices(layers) == [0]
    assert mute("math", "blocks[0-9].q").module_indices(layers) == [1]


def test_what_is_not_in_the_model_is_an_error_that_names_it() -> None:
    knobs = knobs_of(mute("law"), pin("code", 1, ["q_proj", "*.k_proj", "*.q_proj"]), top_k=4)
    with pytest.raises(ConfigError) as caught:
        knobs.check_names(NAMES, [*LAYERS, "model.layers.1.v_proj"])
    of_modules = "there are 4: model.layers.0.q_proj, model.layers.0.v_proj, model.layers.1.q_proj"
    assert caught.value.faults == [
        "top_k must be None or a whole number from 1 to 3 (the number of adapters), got 4",
        "override of 'law': there is no such adapter, only 'math', 'code', 'verse'",
        f"override of 'code': no adapted module matches 'q_proj'; {of_modules}, ...",
        f"override of 'code': no adapted module matches '*.k_proj'; {of_modules}, ...",
    ]
    assert "'*.q_proj'" in caught.value.hint
    fitting = knobs_of(pin("code", 1, ["*.v_proj"]), top_k=3)
    assert fitting.check_names(NAMES, LAYERS) is fitting


def test_a_new_override_replaces_those_it_leaves_no_say() -> None:
    old = (mute("math"), mute("math", "*.q_proj"), mute("code", "*.q_proj"))
    assert with_override(old, pin("math", 1)) == (mute("code", "*.q_proj"), pin("math", 1))
    assert with_override(old, scale("math", 2, "*.q_proj")) == (
        mute("math"),
        mute("code", "*.q_proj"),
        scale("math", 2, "*.q_proj"),
    )
    assert with_override(old, mute("verse")) == (
        mute("math"),
        mute("math", "*.q_proj"),
        mute("code", "*.q_proj"),
        mute("verse"),
    )


def test_overrides_follow_renamed_adapters_and_leave_with_removed_ones() -> None:
    old = (mute("math"), pin("code", 1, "a"), scale("verse", 2))
    renamed = renamed_overrides(old, {"math": "algebra", "verse": "verse"})
    assert renamed == (mute("algebra"), scale("verse", 2))


def test_the_config_keeps_overrides_through_json() -> None:
    config = XLoraConfig(
        adapters=dict.fromkeys(NAMES, "x"),
        adapter_overrides=[mute("math"), pin("code", 0.5, ["*.q_proj", "*.v_proj"])],
    )
    again = XLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert RoutingKnobs.from_config(again).overrides == config.adapter_overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("math", "overrides must be a list of AdapterOverride, got 'math'"),
        ([{"adapter": "math"}], "an override must have the keys adapter, kind, value, modules"),
        ([3], "an override must have the keys .* got 3"),
        (
            [{"adapter": "math", "kind": "pin", "value": None, "modules": None}],
            "override of 'math': value must be a finite number",
        ),
        (
            [{"adapter": "law", "kind": "mute", "value": None, "modules": None}],
            "adapter_overrides: there is no adapter 'law', only 'math', 'code', 'verse'",
        ),
    ],
)
def test_a_config_with_other_overrides_is_refused(overrides: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XLoraConfig.from_dict(
            {"adapters": dict.fromkeys(NAMES, "x"), "adapter_overrides": overrides}
        )


def test_copies_of_knobs_keep_their_overrides() -> None:
    knobs = knobs_of(mute("math", ["a", "b"]))
    assert replace(knobs, top_k=1).overrides == knobs.overrides
    assert copy.deepcopy(knobs) == knobs

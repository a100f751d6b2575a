"""``--mute``, ``--pin`` and ``--rescale`` on the command line."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pandas as pd
import pytest

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import AdapterOverride, RoutingKnobs, Run
from xlora_core.cli import main, options

Capture = pytest.CaptureFixture[str]
pin, scale, mute = AdapterOverride.pin, AdapterOverride.scale, AdapterOverride.mute


def knobs_of(*arguments: str, default: RoutingKnobs | None = None) -> RoutingKnobs:
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_knob_options(parser, otherwise="as it is")
    args = parser.parse_args(arguments)
    assert options.knobs_are_given(args) == bool(arguments)
    return options.knobs_over(default or RoutingKnobs(), args)


@pytest.mark.parametrize(
    ("arguments", "override"),
    [
        (["--mute", "math"], mute("math")),
        (["--mute", "math@*.q_proj"], mute("math", "*.q_proj")),
        (["--pin", "math=0.5"], pin("math", 0.5)),
        (["--pin", "math=-1e-3@model.layers.3.*"], pin("math", -0.001, "model.layers.3.*")),
        (["--rescale", "a=b=2@*"], scale("a=b", 2.0, "*")),
        (["--rescale", "user@home=2"], scale("user@home", 2.0)),
        (["--mute", "user@home@*"], mute("user@home", "*")),
    ],
)
def test_an_option_is_an_override(arguments: list[str], override: AdapterOverride) -> None:
    assert knobs_of(*arguments).overrides == (override,)


def test_the_order_of_the_options_counts_whatever_their_kind() -> None:
    default = RoutingKnobs(top_k=1, overrides=[mute("verse")])
    given = ["--pin", "math=1", "--mute", "math", "--rescale", "math=3", "--mute", "code"]
    knobs = knobs_of(*given, default=default)
    assert knobs.top_k == 1
    labels = [override.label for override in knobs.overrides]
    assert labels == [
        "verse muted",
        "math pinned at 1",
        "math muted",
        "math rescaled by 3",
        "code muted",
    ]
    assert knobs_of(default=default) == default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mute", ""], r"expected NAME\[@PATTERN\], got ''"),
        (["--mute", " "], "adapter must be a name"),
        (["--pin", "math"], r"expected NAME=VALUE\[@PATTERN\] with a number VALUE, got 'math'"),
        (["--pin", "math=much"], "with a number VALUE, got 'math=much'"),
        (["--pin", "math=nan"], "value must be a finite number, got nan"),
        (["--rescale", "=2"], "with a number FACTOR, got '=2'"),
    ],
)
def test_anything_else_is_refused_by_what_was_expected(arguments: list[str], message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        knobs_of(*arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base model and a checkpoint on disk that mutes an expert, as command-line options."""
    root = tmp_path_factory.mktemp("model")
    tiny_chat_base().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    model = tiny_chat_xlora(root / "experts")
    model.mute_adapter("verse")
    model.save_pretrained(root / "xlora")
    return ["--model", str(root / "base"), "--checkpoint", str(root / "xlora")]


def test_generate_records_inspect_shows_and_export_routes_anew(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "run.safetensors"
    generate = ["generate", *folders, "--prompt", "the quick fox", "--max-new-tokens", "4"]
    assert main([*generate, "--pin", "math=0.75@*.q_proj", "--save", str(path), "--json"]) == 0
    track = Run.load(path).tracks[0]
    overrides = (mute("verse"), pin("math", 0.75, "*.q_proj"))
    assert track.override_sets == (overrides,)
    assert (track.override_set == 1).all()
    assert json.loads(capsys.readouterr().out)["arms"][0]["mean_effective_scalings"]["verse"] == 0

    assert main(["inspect", str(path)]) == 0
    line = "from token 0: top-k all, temperature 1, global weight 1, verse muted, math pinned at "
    assert f"{line}0.75 in *.q_proj\n" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    knobs = json.loads(capsys.readouterr().out)["arms"][0]["knobs"]
    assert knobs == [
        {
            "from_token": 0,
            "top_k": None,
            "temperature": 1.0,
            "global_weight": 1.0,
            "overrides": ["verse muted", "math pinned at 0.75 in *.q_proj"],
        }
    ]

    export = ["export", str(path), "--csv", "-", "--bucket-by", "token"]
    assert main([*export, "--rescale", "code=0"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(table["overrides"]) == {"code rescaled by 0"}
    assert (table[table["adapter"] == "code"]["effective_scaling"] == 0).all()
    assert (table[table["adapter"] == "verse"]["effective_scaling"] > 0).all()


def test_inspect_shows_what_a_checkpoint_overrides(folders: list[str], capsys: Capture) -> None:
    assert main(["inspect", *folders]) == 0
    assert "scaling pass 0, verse muted\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--mute", "law"], "override of 'law': there is no such adapter, only 'math'"),
        (["--pin", "math=1@q_proj"], "no adapted module matches 'q_proj'; there are 14: model."),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    folders: list[str], capsys: Capture, option: list[str], message: str
) -> None:
    assert main(["generate", *folders, "--prompt", "the fox", *option]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert message in out.err
    assert "\nhint: " in out.err

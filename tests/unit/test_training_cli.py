"""The commands that train and evaluate, on a tiny model on disk."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import refused
from tests.tiny_models import write_experts
from tests.training_models import CallAt, row, tiny_base_folder, write_rows
from xlora_core.cli import main
from xlora_core.cli.main import _parser
from xlora_core.model import XLoraModel
from xlora_core.training import __main__ as demo_command
from xlora_core.training import progress, recipes
from xlora_core.training.log import public_command
from xlora_core.training.tables import tables

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "train-expert", "eval")
SHORT = ["--steps", "3", "--rows", "4", "--warmup-steps", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_base_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    for domain, answer in (("sums", "123"), ("songs", "lala")):
        for split in ("train", "heldout"):
            values = [vars(row(f"{i}?", answer * (1 + i % 2), domain)) for i in range(20)]
            write_rows(folder / f"{domain}.{split}.jsonl", values)
    return str(folder)


def test_the_commands_train_and_evaluate_a_whole_model(
    base: str, rows: str, tmp_path: Path, capsys: Capture
) -> None:
    common = ["--data", rows, "--base", base, *SHORT]
    for domain in ("sums", "songs"):
        out = str(tmp_path / domain)
        command = ["train-expert", "--name", domain, "--out", out, "--rank", "2", *common]
        assert main(command) == 0
        assert re.search(
            rf"wrote .*{domain}: 3 steps in \d+ s, held-out loss \d", capsys.readouterr().err
        )
    assert main(command) == 0
    assert "songs  is trained already: songs" in capsys.readouterr().err
    adapters = [f"{domain}={tmp_path / domain}" for domain in ("sums", "songs")]
    out = str(tmp_path / "xlora")
    train = ["train", "--out", out, "--adapters", *adapters, *common, "--label-loss", "0.5"]
    assert main([*train, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["steps"] == 3
    assert report["heldout_loss_after"] < report["heldout_loss_before"]
    assert set(report["routing"]) >= {"entropy", "mass:sums", "mass:songs", "right_top"}
    assert re.search(r"router  step 3/3  loss \d\.\d+  \d", captured.err)
    figures = tmp_path / "figures.json"
    evaluation = ["eval", "--model", base, "--checkpoint", out, "--data", rows, "--rows", "4"]
    evaluation += ["--merge-steps", "4"]
    assert main([*evaluation, "--out", str(figures)]) == 0
    record = json.loads(figures.read_text())
    assert set(record["results"]) == {"sums", "songs", "mixed"}
    assert record["command"].startswith("xlora eval --model base --checkpoint xlora --data")
    assert capsys.readouterr().out == tables(record) + "\n"
    assert main([*evaluation, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == record["results"]
    assert main([*evaluation, "--arms", "routed", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["results"]["sums"]["losses"]
    assert list(alone) == ["routed"]
    for file in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
        assert rows not in file.read_text(), file
    refusal = refused(capsys, *train, "--seed", "1")
    assert "holds the result of another training run" in refusal


def test_frozen_experts_keep_every_bit_under_a_bfloat16_base(
    base: str, rows: str, tmp_path: Path
) -> None:
    experts = write_experts(tmp_path / "experts", n_adapters=2)
    adapters = [f"{d}={f}" for d, f in zip(("sums", "songs"), experts.values(), strict=True)]
    out = tmp_path / "xlora"
    options = ["--steps", "3", "--rows", "4", "--learning-rate", "0.01"]
    command = ["train", "--adapters", *adapters, "--data", rows, "--base", base]
    assert main([*command, "--out", str(out), *options]) == 0
    trained = XLoraModel.from_pretrained(load(base), out)
    for index, folder in enumerate(experts.values()):
        (bundled,) = (out / "adapters").glob(f"{index:02d}-*/adapter_model.safetensors")
        before, after = load_file(Path(folder) / "adapter_model.safetensors"), load_file(bundled)
        assert all((before[name] == after[name]).all() for name in before)
    assert any(bool((p.abs() > 1e-3).any()) for p in trained.classifier.parameters())


def load(base: str) -> Any:
    return recipes.Source(data=Path(), base=base).load("float32")[0]


def test_ctrl_c_is_told_and_the_same_command_goes_on(
    base: str, rows: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_experts(tmp_path / "experts", n_adapters=2)
    adapters = [f"{d}={f}" for d, f in zip(("sums", "songs"), experts.values(), strict=True)]
    command = ["train", "--adapters", *adapters, "--data", rows, "--base", base]
    command += ["--out", str(tmp_path / "xlora"), *SHORT, "--eval-every", "1"]

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress, "progress_on", lambda *_: CallAt(2, interrupted))
        assert main(command) == 130
    assert capsys.readouterr().err.endswith("xlora train: interrupted\n")
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "router  goes on from checkpoint-1" in err
    assert "step 2/3" in err
    assert "step 1/3" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"experts", "xlora"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be a whole number >= 1, got 0"),
        (["--mixed-share", "2"], "mixed_share must be in [0, 1], got 2.0"),
        (["--adapters", "math"], "--adapters must be of the form NAME=VALUE, got 'math'"),
        (["--adapters", "a=b", "a=c"], "--adapters names 'a' twice"),
        (["--data", "no.jsonl"], "training data not found: no.jsonl"),
        (["--base", "no/such/model"], "no/such/model"),
        (["--out", "pyproject.toml"], "--out pyproject.toml is a file, a folder was expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_with_a_hint(
    base: str,
    rows: str,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["train", "--adapters", f"sums={tmp_path}", "--data", rows, "--base", base]
    assert message in refused(capsys, *command, "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_missing_peft_is_told_before_the_work(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    expert = ["train-expert", "--name", "x", "--data", "no.jsonl", "--base", "no/such/model"]
    err = refused(capsys, *expert, "--out", str(tmp_path / "out"))
    assert "hint: pip install 'xlora-explorer[train]'" in err


def test_bad_rows_are_named_by_line(base: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"user": "a"}\n{"text": "b"}\n{\n')
    expert = ["train-expert", "--name", "x", "--data", str(path), "--base", base]
    err = refused(capsys, *expert, "--out", str(tmp_path / "out"))
    assert "rows.jsonl, line 1: expected user and assistant" in err
    assert "rows.jsonl, line 3: not JSON" in err
    assert 'hint: a row has user and assistant, or messages, or text: {"domain"' in err


def test_eval_refuses_before_it_loads_a_model(tmp_path: Path, capsys: Capture) -> None:
    command = ["eval", "--model", "no/such/model", "--data", str(tmp_path)]
    assert "--rows must be at least 1, got 0" in refused(capsys, *command, "--rows", "0")
    err = refused(capsys, *command, "--out", str(tmp_path / "no" / "a.json"))
    assert "the folder" in err
    assert "does not exist" in err
    err = refused(capsys, *command, "--arms", "routed", "--answers-file", str(tmp_path / "a"))
    assert "--answers-file needs answers, and --arms routed has none" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"\nexamples:\n  xlora {command}" in text
    assert '{"domain": "math", "id": "1", "user": "2+2?", "assistant": "4"}' in text
    examples = text.partition("\nexamples:\n")[2].replace("\\\n", " ")
    for line in examples.strip().splitlines():
        _parser().parse_args(shlex.split(line)[1:])


def test_the_recorded_command_has_no_folders_of_this_machine() -> None:
    command = public_command("xlora", ["train", "--adapters", "a=/data/x/a", "--data", "../rows"])
    assert command == "xlora train --adapters a=a --data rows"


def test_the_demo_recipe_reports_errors_without_a_traceback(
    tmp_path: Path, capsys: Capture
) -> None:
    work = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert demo_command.main(["demo", "--data", str(tmp_path), *work]) == 2
    assert capsys.readouterr().err.startswith("error: no math.train.jsonl in")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines() -> None:
    assert isinstance(progress.progress_on(io.StringIO()), progress.LineProgress)
    stream = Terminal()
    bar = progress.progress_on(stream, "math")

    class State:
        max_steps, global_step = 4, 1

    bar.on_train_begin(None, State, None)
    State.global_step = 2
    bar.on_log(None, State, None, logs={"lm_loss": 1.25, "seconds": 0.5})
    figures = {"heldout_loss": 1.5, "routing:entropy": 0.75, "routing:right_top": 0.5}
    bar.on_log(None, State, None, logs=figures)
    bar.on_train_end(None, State, None)
    text = stream.getvalue()
    assert "math: " in text
    assert "2/4" in text
    assert "loss 1.250" in text
    assert "step 2/4  held-out 1.500  router entropy 0.75  right expert leads 50%" in text

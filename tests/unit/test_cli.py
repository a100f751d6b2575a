"""The command line, called in-process on a tiny model on disk."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import refused
from tests.tiny_chat import EXPERTS, tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import Engine
from xlora_core.cli import main
from xlora_core.cli.terminal import safe
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.recording import BUCKET_COLUMNS, LONG_COLUMNS, Run

PROMPT = "the quick fox"
MESSAGES = [{"role": "user", "content": PROMPT}]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base model and a checkpoint on disk, as command-line options."""
    root = tmp_path_factory.mktemp("model")
    base = tiny_chat_base()
    base.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    tiny_chat_xlora(root / "experts").save_pretrained(root / "xlora")
    return ["--model", str(root / "base"), "--checkpoint", str(root / "xlora")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs the engine itself on the same model."""
    model = tiny_chat_xlora(tmp_path_factory.mktemp("same"))

    def run(prompt: object = MESSAGES, *arms: Arm, max_new_tokens: int = 8) -> Run:
        with Engine(model, tiny_tokenizer()) as engine:
            sampling = SamplingParams(max_new_tokens=max_new_tokens)
            return engine.run(prompt, arms or (Arm.routed(),), sampling)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def run_file(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("runs") / "run.safetensors"
    arguments = ["generate", *folders, "--prompt", PROMPT, "--max-new-tokens", "8"]
    assert main([*arguments, "--arm", "routed", "--arm", "merged", "--save", str(path)]) == 0
    return str(path)


def generate(folders: list[str], *options: str) -> int:
    return main(["generate", *folders, "--max-new-tokens", "8", *options])


# -------------------------------------------------------------------- generate


def test_generate_prints_the_answer_only_to_stdout(
    folders: list[str], expected: Callable[..., Run], capsys: Capture
) -> None:
    assert generate(folders, "--prompt", PROMPT) == 0
    out = capsys.readouterr()
    assert out.out == expected().text(0, stop_token=False) + "\n"
    assert "8 tokens" in out.err
    assert "mean scalings: math 0." in out.err


def test_generate_reads_a_raw_prompt_from_stdin_or_a_file(
    folders: list[str],
    expected: Callable[..., Run],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    text = expected(PROMPT).text(0, stop_token=False) + "\n"
    assert text != expected().text(0, stop_token=False) + "\n"
    (tmp_path / "prompt.txt").write_text(PROMPT)
    for options in (
        ["--prompt", PROMPT],
        ["--prompt", "-"],
        ["--prompt-file", "-"],
        ["--prompt-file", str(tmp_path / "prompt.txt")],
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        assert generate(folders, "--raw", *options) == 0
        assert capsys.readouterr().out == text


def test_generate_compares_arms(
    folders: list[str], expected: Callable[..., Run], capsys: Capture
) -> None:
    arms = ["routed", "merged", "base", "expert:code"]
    assert generate(folders, "--prompt", PROMPT, *(o for a in arms for o in ("--arm", a))) == 0
    run = expected(MESSAGES, Arm.routed(), Arm.merged(), Arm.base(), Arm.expert("code"))
    assert capsys.readouterr().out == "".join(
        f"--- {arm} ---\n{run.text(i, stop_token=False)}\n" for i, arm in enumerate(arms)
    )


def test_generate_writes_what_the_run_says(
    folders: list[str], capsys: Capture, tmp_path: Path
) -> None:
    csv, parquet, save = (str(tmp_path / name) for name in ("a.csv", "a.parquet", "a.safetensors"))
    options = ["--bucket-by", "segment", "--csv", csv, "--parquet", parquet, "--save", save]
    knobs = ["--top-k", "2", "--temperature", "0.5", "--global-weight", "1.5"]
    assert generate(folders, "--prompt", PROMPT, "--json", *knobs, *options) == 0
    report = json.loads(capsys.readouterr().out)
    run = Run.load(save)
    assert run.tracks[0].arm.knobs == RoutingKnobs(top_k=2, temperature=0.5, global_weight=1.5)
    assert report["run_id"] == run.header.run_id
    assert report["files"] == {"save": save, "csv": csv, "parquet": parquet}
    (arm,) = report["arms"]
    assert arm["text"] == run.text(0, stop_token=False)
    assert arm["n_new_tokens"] == 8
    assert sum(arm["mean_effective_scalings"].values()) == pytest.approx(
        run.scalings(effective=True)[arm["n_prompt_tokens"] :].mean((0, 1)).sum(), abs=1e-3
    )
    table = pd.read_csv(csv)
    assert list(table.columns) == list(BUCKET_COLUMNS)
    assert set(table["bucket"].astype(str)) == {"prompt", "response"}
    assert table["mean_scaling"].std() > 0.05
    pd.testing.assert_frame_equal(
        pd.read_parquet(parquet)[["mean_scaling"]], table[["mean_scaling"]], check_dtype=False
    )


def test_the_models_own_knobs_are_the_default(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    save = str(tmp_path / "run.safetensors")
    assert generate(folders, "--prompt", PROMPT, "--top-k", "all", "--save", save) == 0
    assert Run.load(save).tracks[0].arm.knobs == RoutingKnobs()


def test_sampling_options_reach_the_run(folders: list[str], tmp_path: Path) -> None:
    save = str(tmp_path / "run.safetensors")
    options = ["--sampling-temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--save", save]
    assert generate(folders, "--prompt", PROMPT, *options) == 0
    assert Run.load(save).header.sampling == SamplingParams(
        max_new_tokens=8, temperature=0.8, top_p=0.9, seed=5
    )


def test_ctrl_c_keeps_what_was_written(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from xlora_core.cli import terminal

    written: list[str] = []

    def interrupt(self: object, piece: str) -> None:
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.TextStream, "write", interrupt)
    save = str(tmp_path / "run.safetensors")
    options = ["--prompt", PROMPT, "--max-new-tokens", "100", "--save", save]
    assert main(["generate", *folders, *options]) == 130
    track = Run.load(save).tracks[0]
    assert track.finish_reason == "cancelled"
    assert 3 <= track.n_tokens - track.n_prompt < 100


# -------------------------------------------------------------------- export


def test_export_writes_buckets_and_the_raw_table(run_file: str, tmp_path: Path) -> None:
    csv, parquet = str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")
    assert main(["export", run_file, "--csv", csv, "--width", "4"]) == 0
    assert main(["export", run_file, "--parquet", parquet, "--bucket-by", "token"]) == 0
    table = pd.read_csv(csv)
    assert list(table.columns) == list(BUCKET_COLUMNS)
    assert table["n_tokens"].max() == 4
    run = Run.load(run_file)
    long = pd.read_parquet(parquet)
    assert list(long.columns) == list(LONG_COLUMNS)
    assert len(long) == sum(run.scalings(arm).size for arm in range(2))


def test_export_routes_anew_without_the_model(run_file: str, capsys: Capture) -> None:
    assert main(["export", run_file, "--csv", "-", "--bucket-by", "segment", "--top-k", "1"]) == 0
    rerouted = pd.read_csv(io.StringIO(capsys.readouterr().out))
    expected = Run.load(run_file).bucketed(by="segment", knobs=RoutingKnobs(top_k=1))
    assert rerouted["mean_effective_scaling"].tolist() == pytest.approx(
        expected["mean_effective_scaling"].tolist(), abs=1e-5
    )
    recorded = Run.load(run_file).bucketed(by="segment")
    assert rerouted["mean_effective_scaling"].tolist() != pytest.approx(
        recorded["mean_effective_scaling"].tolist(), abs=1e-2
    )


def test_export_reports_as_json(run_file: str, tmp_path: Path, capsys: Capture) -> None:
    csv = str(tmp_path / "a.csv")
    assert main(["export", run_file, "--csv", csv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"run_id": Run.load(run_file).header.run_id, "files": {"csv": csv}}


# -------------------------------------------------------------------- merge


@pytest.mark.parametrize(
    ("options", "weights"),
    [([], [1 / 3] * 3), (["--weights", "code=0.7", "verse=-0.2"], [0, 0.7, -0.2])],
)
def test_merge_writes_a_plain_model(
    folders: list[str], tmp_path: Path, capsys: Capture, options: list[str], weights: list[float]
) -> None:
    output = tmp_path / "new" / "merged"
    assert main(["merge", *folders, "--output", str(output), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["weights"]) == list(EXPERTS)
    assert list(report["weights"].values()) == pytest.approx(weights)
    merged = AutoModelForCausalLM.from_pretrained(output)
    reference = tiny_chat_xlora(tmp_path / "experts").merge_and_unload(weights)
    ids = torch.tensor([AutoTokenizer.from_pretrained(output)(PROMPT)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


# -------------------------------------------------------------------- inspect


def test_inspect_shows_a_model(folders: list[str], capsys: Capture) -> None:
    assert main(["inspect", *folders, "--modules"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "128 tokens" in out
    assert "softmax at temperature 1, top-k all, global weight 1, scaling pass 0" in out
    assert "math   rank 4, 14 of 14 modules" in out
    assert "model.layers.0.self_attn.q_proj  Linear 32 -> 32  math 4  code 4  verse 4" in out


def test_inspect_as_json_matches_the_model(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main(["inspect", *folders, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = tiny_chat_xlora(tmp_path)
    assert [module["name"] for module in report["modules"]] == model.lora_layer_names
    base = tiny_chat_base()
    assert report["n_base_parameters"] == sum(p.numel() for p in base.parameters())
    assert sum(adapter["n_parameters"] for adapter in report["adapters"]) == sum(
        layer.lora_A.numel() + layer.lora_B.numel() for layer in model.lora_layers
    )


def test_inspect_reads_adapters_with_a_fresh_router(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    tiny_chat_xlora(tmp_path)  # writes the experts' folders
    adapters = ["--adapter", f"b={tmp_path / 'code'}", "--adapter", f"a={tmp_path / 'math'}"]
    assert main(["inspect", *folders[:2], *adapters, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [adapter["name"] for adapter in report["adapters"]] == ["b", "a"]
    assert report["config"]["layerwise_scalings"] is False


def test_inspect_shows_a_run(run_file: str, capsys: Capture) -> None:
    run = Run.load(run_file)
    assert main(["inspect", run_file]) == 0
    out = capsys.readouterr().out
    assert run.header.run_id in out
    assert repr(run.header.prompt_text) in out
    assert "+ 8 tokens, length; mean scalings: math 0.33, code 0.33, verse 0.33" in out
    assert main(["inspect", run_file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["adapters"] == list(EXPERTS)
    assert report["sampling"]["max_new_tokens"] == 8


# -------------------------------------------------------------------- help and refusals


@pytest.mark.parametrize("command", ["inspect", "generate", "export", "merge"])
def test_help_teaches_with_examples(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"\nexamples:\n  xlora {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "fox " * 200], "tokens, the model's context window is 128"),
        (["--prompt", "x", "--top-k", "4"], "from 1 to 3 (the number of adapters), got 4"),
        (["--prompt", "x", "--temperature", "0"], "temperature must be finite and > 0, got 0.0"),
        (["--prompt", "x", "--temperature", "nan"], "temperature must be finite and > 0, got nan"),
        (["--prompt", "x", "--arm", "expert:poetry"], "no expert 'poetry' in this model"),
        (["--prompt", "x", "--arm", "expert"], "--arm must be routed, merged, base or expert:NAME"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be a whole number >= 1"),
        (["--prompt", "x", "--csv", "no/such/a.csv"], "--csv no/such/a.csv: the folder no/such"),
        (["--prompt", "x", "--save", "."], "--save .: that is a folder"),
        (["--prompt", "x", "--width", "0"], "--width must be at least 1, got 0"),
        (["--prompt-file", "no.txt"], "the prompt file no.txt cannot be read: No such file"),
        (["--prompt", "x", "--adapter", "math"], "--adapter must be of the form NAME=VALUE"),
        (["--prompt", "x", "--adapter", "a=b", "--adapter", "a=c"], "--adapter names 'a' twice"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_generate_refuses_with_a_hint(
    folders: list[str], options: list[str], message: str, capsys: Capture
) -> None:
    assert message in refused(capsys, "generate", *folders, *options)


def test_missing_and_foreign_files_are_refused(
    folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not a run")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thing").touch()
    bad, latin = str(tmp_path / "bad.safetensors"), str(tmp_path / "latin.txt")
    assert "bad.safetensors" in refused(capsys, "inspect", bad)
    assert "bad.safetensors" in refused(capsys, "export", bad, "--csv", str(tmp_path / "a.csv"))
    assert "say where to write" in refused(capsys, "export", bad)
    assert "both write to stdout" in refused(capsys, "export", bad, "--csv", "-", "--json")
    assert "is not UTF-8 text" in refused(capsys, "generate", *folders, "--prompt-file", latin)
    assert "exists and is not empty" in refused(capsys, "merge", *folders, "--output", str(full))
    missing = ["--model", str(tmp_path / "nowhere"), "--checkpoint", str(tmp_path)]
    assert "nowhere" in refused(capsys, "inspect", *missing)
    output = str(tmp_path / "new")
    merge = ["merge", *folders, "--output", output, "--weights"]
    assert "could not convert string to float: 'x'" in refused(capsys, *merge, "math=x")
    assert "unknown adapters: 'poetry'" in refused(capsys, *merge, "poetry=1")
    assert not Path(output).exists()


def test_a_wrong_option_exits_with_2(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--prompt", "x", "--top-k", "many"])
    assert caught.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_a_terminal_takes_no_orders_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b]0;title\x07b\tc\n\x9b31m"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert safe(text) == text  # a file or a pipe gets what the model wrote
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert safe(text) == "a�]0;title�b\tc\n�31m"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert safe("naïve") == "na?ve"

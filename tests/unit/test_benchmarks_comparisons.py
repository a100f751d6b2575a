"""The comparisons with other software, and the targets, without the other software."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks import four_experts, llama_cpp, mistral_rs, options, peft_xlora, recording
from benchmarks.__main__ import main
from benchmarks.linear_router import with_linear_router
from benchmarks.other_program import OtherProgram, OtherProgramError
from benchmarks.targets import TARGETS, target_report
from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import Engine, SamplingParams, XLoraModel
from xlora_core.bench.sides import endless_answers
from xlora_core.demo import DEMO_CHECKPOINT
from xlora_core.errors import CheckpointError

QUESTION = "the sum of two numbers"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny base and a checkpoint that names its experts."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_chat_base(context_length=256).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tiny_chat_xlora(folder / "experts", context_length=256).save_pretrained(folder / "xlora")
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> XLoraModel:
    return XLoraModel.from_pretrained(tiny_chat_base(context_length=256), saved / "xlora").eval()


@pytest.fixture(scope="module")
def engine(model: XLoraModel) -> Any:
    with endless_answers(model), Engine(model, tiny_tokenizer()) as engine:
        yield engine


class FakeProgram:
    """Another engine that answers like ours, but for what a test changes."""

    def __init__(self, engine: Engine, **changes: Any) -> None:
        self.facts = {"version": "1.2.3", "dtype": "F32"}
        self._engine = engine
        self._changes = changes

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in question:
            run = self._engine.run(
                question["prompt"], sampling=SamplingParams(max_new_tokens=question["max_tokens"])
            )
            answer = {"text": run.text(), "n_prompt": 1, "n_tokens": question["max_tokens"]}
        else:
            answer = {"token_ids": [7] * question["n_tokens"]}
        return answer | {"seconds": 0.5} | self._changes


# -------------------------------------------------------------------- targets


def _documents(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: {"rows": some} for name, some in rows.items()}


def _verdicts(documents: dict[str, Any]) -> dict[str, str]:
    report = target_report(documents)
    return {
        target.benchmark: str(row["met"])
        for target, row in zip(TARGETS, report.rows, strict=True)
        if target.benchmark in documents
    }


def test_a_target_is_met_only_by_all_its_figures() -> None:
    rows = [{"PEFT/routed": value} for value in (20.0, 35.0, 100.0)]
    assert _verdicts(_documents(peft_xlora=rows)) == {"peft_xlora": "yes"}
    rows[1] = {"PEFT/routed": 34.9}
    assert _verdicts(_documents(peft_xlora=rows)) == {"peft_xlora": "no"}
    assert _verdicts(_documents(peft_xlora=rows[:2])) == {"peft_xlora": "not measured"}


def test_a_limit_from_above_is_met_from_below() -> None:
    assert _verdicts(_documents(arms=[{"/routed": 1.0}, {"/routed": 1.4}])) == {"arms": "yes"}
    assert _verdicts(_documents(arms=[{"/routed": 1.0}, {"/routed": 1.41}])) == {"arms": "no"}


def test_figures_are_found_by_what_stands_beside_them() -> None:
    rows = [{"adapters": 2, "/first": 1.0}, {"adapters": 16, "/first": 1.39}]
    assert _verdicts(_documents(adapters=rows)) == {"adapters": "yes"}
    assert _verdicts(_documents(adapters=rows[:1])) == {"adapters": "not measured"}


def test_the_gpu_counts_only_where_enough_guesses_were_right() -> None:
    rows = [
        {"of it": 0.9, "of stated": 0.5, "hit rate": 0.79},
        {"of it": 0.9, "of stated": 0.61, "hit rate": 0.8},
    ]
    assert _verdicts(_documents(bandwidth=rows)) == {"bandwidth": "yes"}
    assert _verdicts(_documents(bandwidth=rows[:1])) == {"bandwidth": "not measured"}


def test_what_was_not_measured_says_so() -> None:
    report = target_report({})
    assert {row["met"] for row in report.rows} == {"not measured"}
    assert len(report.rows) == len(TARGETS)


def test_every_target_names_a_benchmark_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().err
    assert all(target.benchmark.split()[0] in usage for target in TARGETS)
    assert main(["no-such"]) == 2


# --------------------------------------------------------------- mistral.rs


def test_mistral_rs_gets_the_layout_that_it_reads(saved: Path, tmp_path: Path) -> None:
    settings = mistral_rs.prepare(
        tmp_path, base=saved / "base", checkpoint=saved / "xlora", dtype="bfloat16"
    )
    base, adapters = Path(settings["model"]), Path(settings["adapters"])
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" in tensors
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    config = json.loads((base / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] > 0
    order = json.loads(Path(settings["order"]).read_text())
    xlora = json.loads((adapters / "xlora_config.json").read_text())
    assert order["base_model_id"] == xlora["base_model_id"] == str(base)
    assert order["order"] == ["math", "code", "verse"]
    assert len(order["layers"]) == 14
    files = {path.name for path in adapters.iterdir()}
    assert files == {
        "xlora_config.json",
        "xlora_classifier.safetensors",
        *(f"adapter_config-{name}.json" for name in order["order"]),
        *(f"adapter_model-{name}.safetensors" for name in order["order"]),
    }
    assert settings["dtype"] == "BF16"


def test_a_deep_router_becomes_the_linear_layer_nearest_to_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    def errors(depth: int) -> tuple[float, float]:
        """Mean squared difference to the router's logits, and their variance."""
        deep = tiny_chat_xlora(tmp_path / f"{depth}", xlora_depth=depth, xlora_size=48)
        linear = with_linear_router(
            deep, tokenizer, tiny_chat_base(), folder=tmp_path / f"saved {depth}"
        )
        assert linear.config_xlora.xlora_depth == 1
        ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
        wanted, found = (m.read_router(input_ids=ids).double() for m in (deep, linear))
        return float((wanted - found).square().mean()), float(wanted.var(dim=1).mean())

    error, variance = errors(1)
    assert error < 1e-2 * variance  # what is linear already stays what it was
    error, variance = errors(2)
    assert error < 0.5 * variance


def test_mistral_rs_is_compared_by_speed_and_text(model: XLoraModel, engine: Engine) -> None:
    longer = FakeProgram(engine)
    report = mistral_rs.measure(model, engine, longer, words=["a", "b"], n_tokens=6, rounds=1)
    both = report.rows[-1]
    assert [row["same text"] for row in report.rows] == ["yes", "yes", "2 of 2"]
    assert both["mistral.rs (tokens/s)"] == pytest.approx(5 / 0.5)
    ratio = both["routed (tokens/s)"] / both["mistral.rs (tokens/s)"]
    assert both["routed/mistral.rs"] == pytest.approx(ratio)
    other = FakeProgram(engine, text="something else")
    report = mistral_rs.measure(model, engine, other, words=["a"], n_tokens=6, rounds=1)
    assert [row["same text"] for row in report.rows] == ["no", "0 of 1"]


def test_a_missing_package_is_told_with_how_to_install_it(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nraise ModuleNotFoundError('no such engine')\n")
    python.chmod(0o755)
    given = ["--model", str(saved / "base"), "--checkpoint", str(saved / "xlora")]
    with pytest.raises(SystemExit) as ended:
        mistral_rs.main([*given, "--python", str(python)])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "no such engine" in err
    assert "hint: pip install" in err


# ------------------------------------------------------------------- llama.cpp


def _write_gguf(path: Path) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    packed = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tensor("matrix", gguf.quantize(values, packed), raw_dtype=packed)
    writer.add_tensor("vector", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.dequantize(gguf.quantize(values, packed), packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gguf_file_is_unpacked_with_all_that_it_says(tmp_path: Path, dtype: str) -> None:
    values = _write_gguf(tmp_path / "packed.gguf")
    path = llama_cpp.write_unpacked(tmp_path / "packed.gguf", tmp_path / "plain.gguf", dtype)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrix = tensors["matrix"]
    assert (
        matrix.tensor_type.name == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    )
    unpacked = gguf.dequantize(matrix.data, matrix.tensor_type)
    np.testing.assert_allclose(unpacked, values, rtol=0 if dtype == "float32" else 2**-8)
    assert tensors["vector"].tensor_type.name == "F32"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 1
    assert fields["tokenizer.ggml.tokens"] == ["a", "b"]


def test_llama_cpp_is_compared_by_speed_and_tokens(engine: Engine) -> None:
    report = llama_cpp.measure(
        engine,
        FakeProgram(engine, token_ids=[-1] * 5),
        contexts=[40],
        questions=[QUESTION],
        n_tokens=5,
        rounds=1,
        facts={"dtype": "float32"},
    )
    (row,) = report.rows
    assert row["llama.cpp (ms)"] == pytest.approx(1000 * 0.5 / 4)
    assert row["base/llama.cpp"] == pytest.approx(row["base (ms)"] / row["llama.cpp (ms)"])
    assert row["same tokens"] == "0 of 5"
    assert report.facts["llama-cpp-python"] == "1.2.3"


# ------------------------------------------------------------------------ PEFT


def test_peft_writes_the_same_tokens(saved: Path, model: XLoraModel, engine: Engine) -> None:
    args = options.new_parser("peft_xlora", "").parse_args(["--model", str(saved / "base")])
    report = peft_xlora.measure(
        model,
        engine,
        peft_xlora.peft_model(model, args),
        contexts=[40, 70],
        questions=[QUESTION, "def add"],
        n_tokens=4,
        n_peft_tokens=3,
        rounds=1,
    )
    assert [row["context"] for row in report.rows] == [40, 70]
    assert [row["same tokens"] for row in report.rows] == ["6 of 6", "6 of 6"]


# ------------------------------------------------------------------- recording


def test_the_record_is_switched_off_only_inside_of_the_block(engine: Engine) -> None:
    sampling = SamplingParams(max_new_tokens=4)
    with recording.no_record():
        nothing = engine.run(QUESTION, sampling=sampling).tracks[0]
    everything = engine.run(QUESTION, sampling=sampling).tracks[0]
    assert nothing.n_tokens == 0
    assert everything.n_tokens == everything.n_prompt + 4


def test_what_a_run_keeps_holds_at_least_the_router_logits(
    model: XLoraModel, engine: Engine
) -> None:
    report = recording.measure(model, engine, questions=[QUESTION], n_tokens=8, rounds=1)
    (row,) = report.rows
    assert row["logits (bytes/token)"] == 2 * 3 * 14
    assert row["kept (bytes/token)"] - row["logits (bytes/token)"] == row["beyond logits"]
    assert row["on/off"] == pytest.approx(row["on (ms)"] / row["off (ms)"])


# -------------------------------------------------------------------- all of them


def test_all_benchmarks_run_over_as_many_experts_as_their_targets_speak_of(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(*_: object) -> tuple[XLoraModel, None]:
        base = tiny_chat_base(context_length=256)
        return XLoraModel.from_pretrained(base, saved / "xlora").eval(), None

    name = tiny()[0].adapter_names[-1]
    experts: dict[str, list[str]] = {}

    def run(command: list[str], **_: object) -> None:
        benchmark, *options = command[3:]
        values = dict(itertools.pairwise(options))
        experts[benchmark] = []
        if "--checkpoint" in values:
            model = XLoraModel.from_pretrained(
                tiny_chat_base(context_length=256), values["--checkpoint"]
            )
            experts[benchmark] = model.adapter_names
        rows = [{"/routed": 1.25}] if benchmark == "arms" else []
        Path(values["--output"]).write_text(json.dumps({"rows": rows}), encoding="utf-8")

    monkeypatch.setattr(four_experts, "load_model", tiny)
    monkeypatch.setattr(four_experts, "KEPT", (name,))
    monkeypatch.setattr(subprocess, "run", run)
    assert main(["--quick"]) == 0
    over_some = {benchmark for benchmark, names in experts.items() if names == [name]}
    assert {"decode", "arms", "requests", "peft_xlora", "mistral_rs"} <= over_some
    assert experts["start"] == experts["adapters"] == []
    assert "1.25 | yes" in " ".join(capsys.readouterr().out.split())


def test_benchmarks_without_the_demo_say_so_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_demo(*_: object) -> None:
        raise CheckpointError("the demo's base model is not installed")

    names: list[str] = []
    monkeypatch.setattr(four_experts, "load_model", no_demo)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: names.append(command[3]))
    assert main(["--quick"]) == 0
    assert "reroute" in names
    assert "is not installed" in capsys.readouterr().err


def test_another_program_that_ends_says_what_it_said_last(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise ValueError('no weights')\n")
    with pytest.raises(OtherProgramError, match="status 1: ValueError: no weights"):
        OtherProgram(str(script), {})


def test_the_experts_that_stay_are_the_demos() -> None:
    config = json.loads((DEMO_CHECKPOINT / "xlora.json").read_text(encoding="utf-8"))
    assert set(four_experts.KEPT) < {adapter["name"] for adapter in config["adapters"]}

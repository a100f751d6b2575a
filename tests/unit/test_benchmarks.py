"""What ``xlora bench`` measures, on tiny models: it runs the right work and counts it right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import refused
from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import Arm, Engine, SamplingParams, XLoraModel
from xlora_core.bench import (
    Report,
    adapters,
    arms,
    bandwidth,
    decode,
    machine,
    random_parts,
    requests,
    reroute,
    sides,
    start,
    texts,
)
from xlora_core.bench.turns import Sample, take_turns, together
from xlora_core.cli import main
from xlora_core.engine.prompts import encode_prompt
from xlora_core.errors import ConfigError, EngineError

QUESTION = "the sum of two numbers"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts"), context_length=256)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, model: XLoraModel) -> dict[str, str]:
    """The options that name the tiny model on a command line."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_chat_base(context_length=256).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "xlora")
    return {"--model": str(folder / "base"), "--checkpoint": str(folder / "xlora")}


def _scripted(log: list[str], name: str, *seconds: float) -> Callable[[], Sample]:
    left = list(seconds)

    def turn() -> Sample:
        log.append(name)
        return Sample(seconds=left.pop(0), n_tokens=10)

    return turn


def _n_tokens(prompt: Any) -> int:
    encoded = encode_prompt(tiny_tokenizer(), prompt, context_length=int(1e9), vocab_size=int(1e9))
    return len(encoded.token_ids)


# ---------------------------------------------------------------------- turns


def test_the_sides_take_turns_another_first_each_round_and_the_quietest_turn_counts() -> None:
    log: list[str] = []
    best = take_turns(
        {
            "ours": _scripted(log, "ours", 3.0, 1.0, 2.0),
            "theirs": _scripted(log, "theirs", 5, 6, 4),
        },
        rounds=3,
    )
    assert log == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert {name: sample.ms for name, sample in best.items()} == {"ours": 100.0, "theirs": 400.0}
    assert list(best) == ["ours", "theirs"]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds must be a whole number >= 1, got 0"):
        take_turns({"ours": _scripted([], "ours")}, rounds=0)


def test_several_texts_count_by_their_tokens() -> None:
    parts = [
        Sample(seconds=1.0, n_tokens=10, n_context=7, n_guessed=10, n_hit=9),
        Sample(seconds=1.0, n_tokens=30, n_context=5, n_guessed=30, n_hit=11),
    ]
    both = together(parts)
    assert (both.ms, both.hit_rate, both.n_context) == (50.0, 0.5, 7)
    assert Sample(seconds=1.0, n_tokens=1).hit_rate is None


# --------------------------------------------------------------------- report


def test_a_report_is_a_markdown_table_and_a_json_document() -> None:
    rows = [{"side": "ours", "ms": 1.234, "n": 1024}, {"side": "theirs", "ms": None, "n": 2}]
    report = Report(name="decode", method="how", rows=rows, facts={"ranks": [8]}, notes=["note"])
    assert report.table().splitlines() == [
        "|   side |   ms |     n |",
        "| -----: | ---: | ----: |",
        "|   ours | 1.23 | 1,024 |",
        "| theirs |    - |     2 |",
    ]
    document = json.loads(json.dumps(report.document(machine.machine(), "xlora bench decode")))
    assert document["rows"] == rows
    assert document["facts"] == {"ranks": [8]}
    assert {"cpu", "cores", "torch_threads", "load_average"} <= set(document["machine"])


def test_a_machine_is_told_in_one_line_with_what_its_threads_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    words = machine.machine_words(machine.machine())
    assert "OMP_WAIT_POLICY=PASSIVE" in words
    assert f"{torch.get_num_threads()} threads" in words
    assert "\n" not in words


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize("n_tokens", [60, 100, 177])
def test_a_prompt_is_as_long_as_it_should_be_and_ends_with_the_question(n_tokens: int) -> None:
    prompt = texts.prompt_of(tiny_tokenizer(), QUESTION, n_tokens)
    assert _n_tokens(prompt) == n_tokens
    assert prompt[0]["content"].endswith(f"\n\n{QUESTION}")


def test_a_question_that_is_longer_already_stays_as_it_is() -> None:
    assert texts.prompt_of(tiny_tokenizer(), QUESTION, 3) == [{"role": "user", "content": QUESTION}]


def test_a_tokenizer_without_a_template_is_given_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert texts.prompt_of(tokenizer, QUESTION) == QUESTION


def test_prompts_come_from_a_file_of_texts_or_of_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["one", {"prompt": "two", "id": 2}]))
    assert texts.read_questions(file) == ("one", "two")
    assert texts.read_questions(None) == texts.QUESTIONS


@pytest.mark.parametrize("content", ["[]", "[1]", '[{"id": 1}]', '"', '[" "]'])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"prompts\.json"):
        texts.read_questions(file)


# ---------------------------------------------------------------------- sides


def test_the_slowest_arm_counts_without_its_first_token(model: XLoraModel) -> None:
    with sides.endless_answers(model), Engine(model, tiny_tokenizer()) as engine:
        run = engine.run(QUESTION, [Arm.routed(), Arm.base()], SamplingParams(max_new_tokens=6))
    for index, last in ((0, 2.0), (1, 4.5)):
        track = run.tracks[index]
        track.seconds.flags.writeable = True
        track.seconds[track.n_prompt :] = [1.0, *[1.5] * 4, last]
    sample = sides.slowest_arm(run)
    assert (sample.seconds, sample.n_tokens, sample.n_context) == (3.5, 5, run.tracks[0].n_prompt)
    assert sample.n_guessed == run.tracks[0].n_guessed


def test_an_answer_of_one_token_cannot_be_timed(model: XLoraModel) -> None:
    with Engine(model, tiny_tokenizer()) as engine:
        side = sides.engine_side(engine, QUESTION, [Arm.routed()], 1)
        with pytest.raises(ConfigError, match="a single token"):
            side()


def test_hugging_faces_side_reads_one_token_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_chat_base()
    widths: list[int] = []
    forward = base.forward

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(base, "forward", counted)
    sample = sides.hugging_face_side(base, [5, 6, 7], 4)()
    assert widths == [3, 1, 1, 1]
    assert (sample.n_tokens, sample.n_context) == (3, 3)


def test_generate_is_timed_from_its_first_token_and_does_not_stop() -> None:
    base = tiny_chat_base()
    base.generation_config.eos_token_id = list(range(100))  # would end at once
    sample = sides.generate_side(base, [5, 6, 7], 9)()
    assert (sample.n_tokens, sample.n_context) == (8, 3)


def test_answers_do_not_end_by_themselves_only_inside_of_the_block(model: XLoraModel) -> None:
    kept = model.base_model.generation_config.eos_token_id
    model.base_model.generation_config.eos_token_id = list(range(320))  # every answer ends at once
    try:
        with sides.endless_answers(model), Engine(model, tiny_tokenizer()) as engine:
            endless = engine.run(QUESTION, sampling=SamplingParams(max_new_tokens=5)).tracks[0]
        with Engine(model, tiny_tokenizer()) as engine:
            ended = engine.run(QUESTION, sampling=SamplingParams(max_new_tokens=5)).tracks[0]
    finally:
        model.base_model.generation_config.eos_token_id = kept
    assert endless.n_tokens - endless.n_prompt == 5
    assert ended.n_tokens - ended.n_prompt == 1


# ----------------------------------------------------------------- benchmarks


def test_decode_compares_every_side_at_every_context(model: XLoraModel) -> None:
    with sides.endless_answers(model):
        report = decode.measure(
            model,
            tiny_tokenizer(),
            tiny_chat_base(context_length=256),
            contexts=[40, 90],
            questions=[QUESTION, "def add"],
            n_tokens=6,
            rounds=1,
            overlap="on",
        )
    assert [row["context"] for row in report.rows] == [40, 90]
    first, second = report.rows
    for row in report.rows:
        assert row["routed/hf"] == pytest.approx(row["routed (ms)"] / row["hf (ms)"])
        assert row["two passes (ms)"] > 0
        assert 0 <= row["hit rate"] <= 1
    assert first["routed/first"] == 1
    assert second["routed/first"] == pytest.approx(second["routed (ms)"] / first["routed (ms)"])
    assert report.facts["adapters"] == 3
    assert report.facts["ranks"] == [4]


def test_arms_grow_from_the_routed_one_to_all_kinds(model: XLoraModel) -> None:
    report = arms.measure(model, tiny_tokenizer(), questions=[QUESTION], n_tokens=4, rounds=1)
    assert [row["arms"] for row in report.rows] == [
        "routed",
        "routed, merged",
        "routed, merged, base",
        "routed, merged, base, expert:math",
    ]
    assert report.rows[0]["/routed"] == 1


def test_requests_are_counted_together(model: XLoraModel) -> None:
    report = requests.measure(
        model,
        tiny_tokenizer(),
        questions=[QUESTION, "def add"],
        counts=[1, 3],
        n_tokens=4,
        rounds=1,
    )
    one, three = report.rows
    assert (one["requests"], three["requests"]) == (1, 3)
    assert three["tokens/s each"] == pytest.approx(three["tokens/s"] / 3)
    assert three["/one"] == pytest.approx(three["tokens/s"] / one["tokens/s"])


def test_adapters_are_made_in_every_number(tmp_path: Path) -> None:
    report = adapters.measure(
        tiny_chat_base, tiny_tokenizer(), questions=[QUESTION], counts=[1, 3], n_tokens=4, rounds=1
    )
    assert [row["adapters"] for row in report.rows] == [1, 3]
    assert report.facts["ranks"] == [8]
    assert report.facts["modules"] == 14  # seven in each of two blocks


def test_random_experts_sit_in_every_linear_module_but_the_head(tmp_path: Path) -> None:
    model = random_parts.random_xlora(
        tiny_chat_base(), tmp_path, n_adapters=2, rank=3, strength=1.0
    )
    assert model.adapter_names == ["0", "1"]
    assert {rank for layer in model.lora_layers for rank in layer.ranks} == {3}
    assert not any("lm_head" in name for name in model.lora_layer_names)
    ids = torch.tensor([[5, 6, 7]])
    mixed, base = model(ids).logits, tiny_chat_base()(ids).logits
    assert (mixed - base).abs().max() > 0.01


def test_numbers_are_tokens() -> None:
    text = random_parts.random_numbers(20, 512)
    ids = random_parts.number_tokenizer(512)(text)["input_ids"]
    assert " ".join(map(str, ids)) == text


def test_bandwidth_sets_a_step_against_the_weights_it_reads() -> None:
    report = bandwidth.measure(
        ["tiny"], device="cpu", dtype=torch.float32, context=8, n_tokens=4, rounds=1
    )
    (row,) = report.rows
    assert row["stated (GB/s)"] is None
    seconds = row["weights (GB)"] / row["reading (GB/s)"]
    assert row["of it"] == pytest.approx(1000 * seconds / row["routed (ms)"])


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_counts_as_weights_only_as_the_head(tmp_path: Path, tied: bool) -> None:
    base = random_parts.random_llama("tiny", device="cpu", dtype=torch.float32)
    if not tied:
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    n_base = sum(p.numel() for p in base.parameters()) - (0 if tied else 512 * 64)
    model = random_parts.random_xlora(base, tmp_path, n_adapters=2, rank=8, strength=0.1)
    n_router = sum(p.numel() for p in model.router.parameters())
    n_experts = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in model.lora_layers)
    assert bandwidth.weight_bytes(model) == 4 * (n_base + n_experts + n_router)


def test_reroute_times_every_set_of_knobs() -> None:
    report = reroute.measure(n_tokens=5, n_modules=3, n_adapters=2, rounds=1)
    assert {row["knobs"] for row in report.rows} >= {"as recorded", "top-k 2"}
    run = reroute.recorded_run(5, 3, 2)
    assert run.scalings().shape == (5, 3, 2)


def test_a_start_is_timed_stage_by_stage(saved_model: dict[str, str]) -> None:
    given = [word for pair in saved_model.items() for word in pair]
    report = start.measure(given, rounds=1)
    row, quietest = report.rows
    stages = [row[f"{stage} (s)"] for stage in start._STAGES]
    assert stages == sorted(stages)
    assert stages[0] > 0
    assert row["loading (s)"] == pytest.approx(stages[2] - stages[0])
    assert quietest["loading (s)"] == row["loading (s)"]


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"ended with status 1: .*there is no base model folder"):
        start.measure(["--model", str(tmp_path / "missing")], rounds=1)


# --------------------------------------------------------------- command line


def test_the_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    names = ("decode", "arms", "requests", "adapters", "reroute", "start", "bandwidth")
    assert all(f"\n  {name} " in out for name in names)


def test_a_result_is_printed_as_a_table_or_as_json_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tokens", "4", "--modules", "3", "--experts", "2", "--rounds", "1"]
    file = tmp_path / "reroute.json"
    assert main(["bench", "reroute", *given, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert "|  effective (ms) |" in out.replace("| effective", "|  effective")
    assert "modules 3" in out
    written = json.loads(file.read_text())
    assert written["benchmark"] == "reroute"
    assert written["command"].startswith("xlora bench reroute --tokens 4")
    assert main(["bench", "reroute", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["adapters"] == 2


def test_a_model_of_ones_own_is_measured(
    saved_model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([QUESTION]))
    given = [word for pair in saved_model.items() for word in pair]
    given += ["--prompts", str(prompts), "--tokens", "4", "--rounds", "1", "--json"]
    assert main(["bench", "decode", "--contexts", "40", *given]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"][0]["context"] == 40
    assert document["facts"]["texts"] == 1


def test_bandwidth_without_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "bandwidth"]) == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["decode", "--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["decode", "--contexts", "0", "64"], "--contexts must be at least 1, got 0 64"),
        (["arms", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["reroute", "--output", "missing/file.json"], "the folder missing is not there"),
        (["requests", "--prompts", "missing.json"], "the prompts in missing.json cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    given: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fault in refused(capsys, "bench", *given)

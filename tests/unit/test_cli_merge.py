"""``xlora merge`` on a tiny model on disk: every way to a mixture, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_chat import EXPERTS, tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import RoutingKnobs, XLoraConfig, XLoraModel
from xlora_core.cli import main
from xlora_core.freezing import (
    FrozenMixture,
    approximation_loss,
    freeze_rows,
    freeze_run,
    lora_of_mixture,
    read_texts,
    token_rows,
)
from xlora_core.recording import Run
from xlora_core.training.data import Example

Capture = pytest.CaptureFixture[str]
ROWS = [
    {"domain": "fox", "id": "1", "user": "the quick fox", "assistant": "jumps over the lazy dog"},
    {"domain": "fox", "id": "2", "user": "two numbers", "assistant": "the sum"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recorded run, and texts."""
    root = tmp_path_factory.mktemp("root")
    tiny_chat_base().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    tiny_chat_xlora(root / "experts").save_pretrained(root / "xlora")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "lines.txt").write_text("def add(a, b)\nthe sum of two numbers\n")
    arguments = ["generate", *model_options(root), "--prompt", "the fox", "--max-new-tokens", "8"]
    arms = ["--arm", "routed", "--arm", "expert:code", "--top-k", "2"]
    assert main([*arguments, *arms, "--save", str(root / "run.safetensors")]) == 0
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> XLoraModel:
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    return XLoraModel.from_pretrained(base, root / "xlora").eval()


def model_options(root: Path) -> list[str]:
    return ["--model", str(root / "base"), "--checkpoint", str(root / "xlora")]


def merge(root: Path, *options: str) -> int:
    return main(["merge", *model_options(root), *options])


def report(root: Path, capsys: Capture, *options: str) -> dict[str, Any]:
    """Returns the JSON of a command that must succeed."""
    capsys.readouterr()
    assert merge(root, "--json", *options) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def refused(root: Path, capsys: Capture, *options: str) -> str:
    """Returns stderr of a command that must exit with 2, without a traceback."""
    capsys.readouterr()
    assert merge(root, *options) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert "Traceback" not in out.err
    assert "\nhint: " in out.err
    return out.err


def examples(root: Path, name: str) -> list[Example]:
    return token_rows(read_texts(root / name), tiny_tokenizer(), context_length=128)


def saved_weights(path: Path) -> torch.Tensor:
    return FrozenMixture.load(path).weights


def constant_logits(model: XLoraModel, weights: Any) -> torch.Tensor:
    ids = torch.tensor([tiny_tokenizer()("the lazy dog")["input_ids"]])
    weights = torch.as_tensor(weights).double()
    with torch.no_grad():
        logits: torch.Tensor = model.main_pass(input_ids=ids, scalings=weights).logits
    return logits


def written_logits(folder: Path) -> torch.Tensor:
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the lazy dog")["input_ids"]])
    with torch.no_grad():
        logits: torch.Tensor = merged(ids).logits
    return logits


# ---------------------------------------------------------------- the mixture


def test_uniform_is_the_default_and_has_a_name(root: Path, tmp_path: Path, capsys: Capture) -> None:
    for options in ([], ["--weights", "uniform"]):
        path = tmp_path / f"{len(options)}.json"
        printed = report(root, capsys, "--save-weights", str(path), *options)
        assert printed["weights"] == {name: pytest.approx(1 / 3) for name in EXPERTS}
        assert printed["source"] == "uniform"
        assert torch.equal(saved_weights(path), torch.full((14, 3), 1 / 3, dtype=torch.float64))
    assert printed["output"] is None


@pytest.mark.parametrize(
    ("options", "arm", "tokens", "knobs"),
    [
        ([], 0, "response", None),
        (["--tokens", "prompt"], 0, "prompt", None),
        (["--tokens", "all", "--top-k", "1"], 0, "all", RoutingKnobs(top_k=1)),
        (["--arm", "1"], 1, "response", None),
    ],
)
def test_a_run_is_frozen(
    root: Path,
    tmp_path: Path,
    capsys: Capture,
    options: list[str],
    arm: int,
    tokens: Any,
    knobs: RoutingKnobs | None,
) -> None:
    run, path = str(root / "run.safetensors"), tmp_path / "mix.json"
    printed = report(root, capsys, "--from-run", run, "--save-weights", str(path), *options)
    expected = freeze_run(Run.load(run), arm, tokens=tokens, knobs=knobs)
    assert torch.equal(saved_weights(path), expected.weights)
    assert printed["weights"] == pytest.approx(expected.adapter_means())
    assert printed["n_tokens"] == expected.n_tokens
    assert printed["source"] == expected.source


def test_texts_are_frozen(root: Path, tmp_path: Path, capsys: Capture, model: XLoraModel) -> None:
    files = [str(root / "rows.jsonl"), str(root / "lines.txt")]
    path = tmp_path / "mix.json"
    options = ["--from-data", *files, "--save-weights", str(path), "--temperature", "0.5"]
    printed = report(root, capsys, *options)
    rows = examples(root, "rows.jsonl") + examples(root, "lines.txt")
    expected = freeze_rows(model, rows, knobs=RoutingKnobs(temperature=0.5))
    torch.testing.assert_close(saved_weights(path), expected.weights, atol=1e-6, rtol=0)
    assert printed["n_tokens"] == expected.n_tokens
    assert printed["source"].startswith("rows.jsonl, lines.txt, 4 rows, ")


def test_a_saved_mixture_is_applied_later(
    root: Path, tmp_path: Path, capsys: Capture, model: XLoraModel
) -> None:
    path, output = tmp_path / "mix.json", tmp_path / "merged"
    run = str(root / "run.safetensors")
    assert merge(root, "--from-run", run, "--save-weights", str(path)) == 0
    capsys.readouterr()
    assert merge(root, "--weights", str(path), "--output", str(output)) == 0
    assert "note:" not in capsys.readouterr().err
    expected = constant_logits(model, saved_weights(path))
    torch.testing.assert_close(written_logits(output), expected, atol=1e-5, rtol=1e-4)
    assert (expected - constant_logits(model, torch.ones(3) / 3)).abs().max() > 0.01


def test_a_mixture_of_other_experts_is_noted_or_refused(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, output = tmp_path / "mix.json", tmp_path / "merged"
    run = str(root / "run.safetensors")
    assert merge(root, "--from-run", run, "--save-weights", str(path)) == 0
    values = json.loads(path.read_text())
    values["adapter_hashes"]["code"] = "0" * 16
    path.write_text(json.dumps(values))
    capsys.readouterr()
    assert merge(root, "--weights", str(path), "--output", str(output)) == 0
    assert (
        "note: the mixture was frozen with other weights of code, or in another dtype"
        in capsys.readouterr().err
    )
    values["adapter_names"][1] = "poetry"
    path.write_text(json.dumps(values))
    error = refused(root, capsys, "--weights", str(path), "--output", str(tmp_path / "other"))
    assert "it has, the model lacks: 'poetry'; the model has: 'code'" in error
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("rank", [None, 2])
def test_one_lora(
    root: Path, tmp_path: Path, capsys: Capture, model: XLoraModel, rank: int | None
) -> None:
    output = tmp_path / "lora"
    options = ["--output", str(output), "--as", "lora", "--weights", "math=0.7", "verse=-0.2"]
    printed = report(root, capsys, *options, *([] if rank is None else ["--rank", str(rank)]))
    expected = lora_of_mixture(model, [0.7, 0, -0.2], rank=rank)
    assert printed["as"] == "lora"
    assert printed["lora"]["kept"] == pytest.approx(expected.kept)
    assert printed["lora"]["kept_in_total"] == pytest.approx(expected.kept_in_total)
    assert set(printed["lora"]["ranks"].values()) == {rank or 8}
    again = XLoraModel.from_base(
        tiny_chat_base(), XLoraConfig(adapters={"merged": str(output)})
    ).eval()
    mixture = constant_logits(model, [0.7, 0, -0.2])
    difference = (constant_logits(again, [1.0]) - mixture).abs().max()
    assert difference < 1e-4 if rank is None else 1e-3 < difference < 5


def test_what_is_lost_is_reported(
    root: Path, tmp_path: Path, capsys: Capture, model: XLoraModel
) -> None:
    files = [str(root / "rows.jsonl"), str(root / "lines.txt")]
    run = root / "run.safetensors"
    options = ["--from-run", str(run), "--report", *files]
    printed = report(root, capsys, *options, "--as", "lora", "--rank", "1")
    weights = freeze_run(Run.load(run))
    lora = lora_of_mixture(model, weights, rank=1)
    for file in files:
        expected = approximation_loss(
            model,
            weights,
            examples(root, Path(file).name),
            knobs=RoutingKnobs(top_k=2),  # the run's
            lora=lora,
        )
        found = printed["reports"][file]
        assert found["n_tokens"] == expected.n_tokens
        assert list(found["arms"]) == ["routed", "frozen", "lora", "uniform", "base"]
        for arm, loss in expected.arms.items():
            assert found["arms"][arm]["kl"] == pytest.approx(loss.kl, abs=1e-5)
            assert found["arms"][arm]["cross_entropy"] == pytest.approx(
                loss.cross_entropy, abs=1e-5
            )
    assert printed["output"] is None
    assert merge(root, *options) == 0
    out = capsys.readouterr()
    assert out.out.startswith("rows.jsonl\n2 rows, ")
    assert "\n\nlines.txt\n2 rows, " in out.out
    assert "mixture: math 0." in out.err
    assert "(mean over modules); run " in out.err


def test_long_rows_are_cut_only_on_request(root: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "long.txt").write_text("fox " * 200)
    options = ["--report", str(tmp_path / "long.txt")]
    assert "the model's context window is 128" in refused(root, capsys, *options)
    printed = report(root, capsys, *options, "--max-length", "50")
    assert printed["reports"][options[1]]["n_tokens"] == 49


# ---------------------------------------------------------------- help and refusals


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    out = capsys.readouterr().out
    for text in ("--from-run", "--from-data", "--as", "--rank", "--report", "\nexamples:\n"):
        assert text in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to do: --output FOLDER, --save-weights FILE or --report FILE"),
        (["--output", "x", "--rank", "4"], "--rank is for --as lora"),
        (["--output", "x", "--as", "lora", "--rank", "0"], "--rank must be at least 1, got 0"),
        (["--output", "x", "--arm", "1"], "--arm is for --from-run"),
        (["--output", "x", "--tokens", "all"], "--tokens is for --from-run and --from-data"),
        (["--output", "x", "--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--save-weights", "no/such/a.json"], "--save-weights no/such/a.json: its folder"),
        (["--output", "x", "--weights", "math"], "math cannot be read"),
        (["--output", "x", "--weights", "math", "code"], "--weights must be of the form"),
        (["--output", "x", "--weights", "math=much"], "could not convert string to float"),
        (["--output", "x", "--weights", "poetry=1"], "unknown adapters: 'poetry'"),
        (["--output", "x", "--weights", "math=0", "--as", "lora"], "is zero in every module"),
        (["--output", "x", "--from-run", "none.safetensors"], "none.safetensors"),
        (["--output", "x", "--from-data", "none.jsonl"], "none.jsonl"),
        (["--report", "none.txt"], "none.txt cannot be read as text"),
        (["--output", "x", "--top-k", "1"], "they need --from-run, --from-data or --report"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_come_with_a_hint(
    root: Path, capsys: Capture, options: list[str], message: str
) -> None:
    assert message in refused(root, capsys, *options)
    assert not Path("x").exists()


def test_knobs_must_fit_the_model(root: Path, capsys: Capture) -> None:
    lines = str(root / "lines.txt")
    assert "got 9" in refused(root, capsys, "--report", lines, "--top-k", "9")
    assert "'poetry'" in refused(root, capsys, "--report", lines, "--mute", "poetry")


def test_a_run_has_only_so_many_arms(root: Path, capsys: Capture) -> None:
    run = str(root / "run.safetensors")
    error = refused(root, capsys, "--output", "x", "--from-run", run, "--arm", "2")
    assert "there is no arm 2" in error


def test_two_mixtures_at_once_are_a_mistake(root: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        merge(root, "--output", "x", "--weights", "math=1", "--from-run", "run.safetensors")
    assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_an_existing_folder_is_refused_before_any_work(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thing").touch()
    error = refused(
        root, capsys, "--output", str(tmp_path), "--from-run", str(root / "run.safetensors")
    )
    assert "exists and is not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]

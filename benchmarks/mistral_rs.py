"""The routed arm beside mistral.rs's X-LoRA: the same base, experts and router, the same dtype.

mistral.rs is the one other engine that caches both passes of X-LoRA; it pays two passes a token.
Its Python package is optional (pip install -e '.[bench]'); give --python the interpreter of another
environment that has it. 0.6.0 is the newest version whose X-LoRA was seen to run on a CPU.

The checkpoint is converted to the original package's layout and laid out as mistral.rs wants it.
Both sides write the same text after a prompt of one token. After longer ones they do not: 0.6.0
transposes the attention's output twice where it reads several tokens at once, and so mixes up the
prompt. (With the same done to the attention of our model, ours writes what it writes.) What a
decoded token costs does not depend on it.

Its classifier of two layers expects the second to be as wide as a hidden state, whatever the
checkpoint says. So a deeper router is replaced on both sides by the linear layer nearest to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.linear_router import with_linear_router
from benchmarks.options import fail, new_parser, plain_dtype, show
from benchmarks.other_program import OtherProgram, OtherProgramError
from xlora_core import Arm, Engine, SamplingParams
from xlora_core.bench import Report
from xlora_core.bench.report import Cell
from xlora_core.bench.sides import engine_side, model_facts
from xlora_core.bench.turns import Sample, Side, take_turns, together
from xlora_core.cli import main as xlora
from xlora_core.cli import options
from xlora_core.demo import demo_base_folder, load_base
from xlora_core.threads import apart

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WORKER = "run_mistral_rs.py"
# One token each in the demo's vocabulary.
WORDS = ("The", "Once", "def", "Water")
METHOD = (
    "Decoded tokens a second after a prompt of one token, greedy, batch 1. routed: our engine; "
    "mistral.rs: its X-LoRA with cached passes, from its own clock; its base: the same without "
    "X-LoRA. Both run the same checkpoint, with a linear router; "
    "same text: whether they wrote the same. The sides take turns, the quietest round counts."
)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("mistral_rs", __doc__ or "")
    parser.add_argument("--python", metavar="FILE", help="interpreter that has mistralrs")
    parser.add_argument("--tokens", type=int, default=48, help="tokens a prompt (default: 48)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument(
        "--their-dtype",
        choices=sorted(_DTYPES),
        help="of mistral.rs's weights (default: as ours)",
    )
    parser.add_argument(
        "--with-base",
        action="store_true",
        help="also time mistral.rs on the plain base model, without X-LoRA",
    )
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        model, tokenizer, settings = apart(lambda: _prepared(args, Path(folder)))
        try:
            with ExitStack() as stack:
                others = [
                    stack.enter_context(OtherProgram(_WORKER, some, python=args.python))
                    for some in _programs(settings, with_base=args.with_base)
                ]
                engine = stack.enter_context(Engine(model, tokenizer))
                report = measure(
                    model, engine, *others, words=WORDS, n_tokens=args.tokens, rounds=args.rounds
                )
                show(report, args, argv)
        except OtherProgramError as error:
            fail(
                f"mistral.rs does not run: {error}",
                "pip install -e '.[bench]', or --python path/to/python with mistralrs==0.6.0",
            )


def _prepared(args: argparse.Namespace, folder: Path) -> tuple[XLoraModel, Any, dict[str, Any]]:
    """Returns model and tokenizer, and the settings of mistral.rs over the same."""
    model, tokenizer = options.load(args)
    if model.config_xlora.xlora_depth > 1:
        base, _ = load_base(args.model, dtype=args.dtype, device=args.device)
        model = with_linear_router(model, tokenizer, base, folder=folder / "deep")
    model.save_pretrained(folder / "xlora")
    settings = prepare(
        folder,
        base=demo_base_folder() if args.model == "demo" else Path(args.model),
        checkpoint=folder / "xlora",
        dtype=args.their_dtype or plain_dtype(args.dtype),
    )
    return model, tokenizer, settings


def _programs(settings: dict[str, Any], *, with_base: bool) -> list[dict[str, Any]]:
    """Returns the settings of every process: X-LoRA, and the base model if that is wanted."""
    of_base = {name: settings[name] for name in ("model", "dtype")}
    return [settings, of_base] if with_base else [settings]


def measure(
    model: XLoraModel,
    engine: Engine,
    other: OtherProgram,
    of_base: OtherProgram | None = None,
    *,
    words: Sequence[str],
    n_tokens: int,
    rounds: int,
) -> Report:
    """Times both sides after prompts of one token.

    Args:
        model: The X-LoRA model.
        engine: An engine over it.
        other: mistral.rs over the same checkpoint.
        of_base: mistral.rs over the base model alone.
        words: The prompts.
        n_tokens: Tokens decoded after each.
        rounds: How often each side has its turn.
    """
    rows: list[dict[str, Cell]] = []
    samples: list[dict[str, Sample]] = []
    for word in words:
        texts: list[str] = []
        sides = {
            "routed": engine_side(engine, word, [Arm.routed()], n_tokens),
            "mistral.rs": _side(other, word, n_tokens, texts),
        }
        if of_base is not None:
            sides["its base"] = _side(of_base, word, n_tokens, [])
        of = take_turns(sides, rounds)
        samples.append(of)
        ours = engine.run(word, sampling=SamplingParams(max_new_tokens=n_tokens)).text()
        rows.append({"prompt": word} | _row(of) | {"same text": _same(ours, texts[0])})
    of = {side: together(sample[side] for sample in samples) for side in samples[0]}
    same = sum(row["same text"] == "yes" for row in rows)
    rows.append({"prompt": "all"} | _row(of) | {"same text": f"{same} of {len(words)}"})
    facts = model_facts(model) | {"mistralrs": other.facts["version"]}
    facts |= {"its dtype": other.facts["dtype"]}
    facts |= {"tokens": n_tokens, "rounds": rounds}
    return Report(name="mistral_rs", method=METHOD, rows=rows, facts=facts)


def _row(of: dict[str, Sample]) -> dict[str, Cell]:
    row: dict[str, Cell] = {f"{side} (tokens/s)": 1000 / sample.ms for side, sample in of.items()}
    return row | {
        "hit rate": of["routed"].hit_rate,
        "routed/mistral.rs": of["mistral.rs"].ms / of["routed"].ms,
    }


def _same(ours: str, theirs: str) -> str:
    """Whether two answers are the same as far as both go: theirs may be a token longer."""
    ours, theirs = ours.lstrip(), theirs.lstrip()  # mistral.rs leaves out a space at the start
    n = min(len(ours), len(theirs))
    return "yes" if n and ours[:n] == theirs[:n] else "no"


def _side(other: OtherProgram, prompt: str, n_tokens: int, texts: list[str]) -> Side:
    def turn() -> Sample:
        answer = other.ask({"prompt": prompt, "max_tokens": n_tokens})
        texts.append(answer["text"])
        return Sample(
            seconds=answer["seconds"],
            n_tokens=answer["n_tokens"] - 1,
            n_context=answer["n_prompt"],
        )

    return turn


def prepare(folder: Path, *, base: Path, checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Writes base and checkpoint as mistral.rs 0.6.0 reads them; returns the worker's settings.

    Args:
        folder: A folder without base, adapters and original.
        base: The base model's folder.
        checkpoint: An X-LoRA checkpoint of any layout.
        dtype: Of the base weights that are written.
    """
    model, adapters, original = folder / "base", folder / "adapters", folder / "original"
    model.mkdir()
    adapters.mkdir()
    command = ["convert", str(checkpoint), str(original), "--to", "original", "--base", str(base)]
    if xlora(command):
        raise SystemExit(2)  # it has said why
    _write_base(base, model, getattr(torch, dtype))
    config = json.loads((original / "xlora_config.json").read_text(encoding="utf-8"))
    order = json.loads((original / "xlora_ordering.json").read_text(encoding="utf-8"))
    config["base_model_id"] = order["base_model_id"] = str(model)
    (adapters / "xlora_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    shutil.copy(original / "xlora_classifier.safetensors", adapters)
    for name in order["order"]:
        # It takes every file whose name holds the adapter's, of this folder alone.
        for stem, suffix in (("adapter_config", ".json"), ("adapter_model", ".safetensors")):
            shutil.copy(original / name / f"{stem}{suffix}", adapters / f"{stem}-{name}{suffix}")
    return {
        "model": str(model),
        "adapters": str(adapters),
        "order": str(folder / "order.json"),
        "dtype": _DTYPES[dtype],
    }


def _write_base(base: Path, target: Path, dtype: torch.dtype) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors |= load_file(file)
    # It does not tie the head to the embedding.
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        config["rope_theta"] = rope["rope_theta"]
    config |= {"tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch.")}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, target)

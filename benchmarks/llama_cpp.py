"""The base arm beside llama.cpp, over the same weights in the same type.

llama.cpp cannot run X-LoRA (its adapters have one scale for a whole text), so it is the mark for
the base arm alone. The demo's GGUF file is written anew with its weights unpacked to --dtype, or
taken as it is (--dtype packed), four bits a weight: then it is not the same arithmetic. The
package is optional and compiled at its installation: pip install llama-cpp-python, or --python
with the interpreter of another environment that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.options import fail, new_parser, plain_dtype, show
from benchmarks.other_program import OtherProgram, OtherProgramError
from xlora_core import Arm, Engine
from xlora_core.bench import Report
from xlora_core.bench.report import Cell
from xlora_core.bench.sides import engine_side, model_facts
from xlora_core.bench.texts import QUESTIONS, prompt_of
from xlora_core.bench.turns import Sample, Side, take_turns, together
from xlora_core.cli import options
from xlora_core.demo import find_gguf
from xlora_core.engine.prompts import encode_prompt
from xlora_core.threads import apart

METHOD = (
    "Milliseconds a token of the base model, batch 1, greedy. base: our engine's base arm; "
    "llama.cpp: eval and sample of llama-cpp-python. same tokens: how many of the first tokens "
    "both chose alike. The sides take turns, the quietest round counts, the mean over all texts."
)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("llama_cpp", __doc__ or "")
    parser.add_argument("--python", metavar="FILE", help="interpreter that has llama-cpp-python")
    parser.add_argument("--packed", action="store_true", help="llama.cpp takes the file as it is")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.model != "demo":
        fail("this benchmark knows the GGUF file of the demo alone", "leave --model out")
    dtype = plain_dtype(args.dtype)
    model, tokenizer = options.load(args)
    n_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        packed = find_gguf()[0]
        unpacked = Path(folder) / "model.gguf"
        gguf = packed if args.packed else apart(lambda: write_unpacked(packed, unpacked, dtype))
        settings = {
            "model": str(gguf),
            "n_threads": n_threads,
            "n_context": max(args.contexts) + args.tokens + 8,
        }
        try:
            with OtherProgram("run_llama_cpp.py", settings, python=args.python) as other:
                with Engine(model, tokenizer) as engine:
                    report = measure(
                        engine,
                        other,
                        contexts=args.contexts,
                        questions=QUESTIONS[: args.texts],
                        n_tokens=args.tokens,
                        rounds=args.rounds,
                        facts=model_facts(model)
                        | {"llama.cpp weights": "packed" if args.packed else dtype}
                        | {"llama.cpp threads": n_threads},
                    )
                show(report, args, argv)
        except OtherProgramError as error:
            fail(
                f"llama.cpp does not run: {error}",
                "pip install llama-cpp-python (compiled there), or --python path/to/python with it",
            )


def measure(
    engine: Engine,
    other: OtherProgram,
    *,
    contexts: Sequence[int],
    questions: Sequence[str],
    n_tokens: int,
    rounds: int,
    facts: dict[str, Any],
) -> Report:
    """Times both sides at every context.

    Args:
        engine: An engine over the demo.
        other: llama.cpp over the same weights.
        contexts: Tokens of the prompts.
        questions: One text is decoded for each.
        n_tokens: Tokens decoded per text.
        rounds: How often each side has its turn.
        facts: What the timings depend on.
    """
    rows: list[dict[str, Cell]] = []
    for context in contexts:
        parts, n_same = [], 0
        for question in questions:
            prompt = prompt_of(engine.tokenizer, question, context)
            size = int(1e9)
            ids = encode_prompt(
                engine.tokenizer, prompt, context_length=size, vocab_size=size
            ).token_ids
            written: list[list[int]] = []
            parts.append(
                take_turns(
                    {
                        "base": engine_side(engine, prompt, [Arm.base()], n_tokens),
                        "llama.cpp": _side(other, ids, n_tokens, written),
                    },
                    rounds,
                )
            )
            n_same += _n_same(engine, prompt, written[0])
        of = {side: together(part[side] for part in parts) for side in parts[0]}
        rows.append(
            {
                "context": of["base"].n_context,
                "base (ms)": of["base"].ms,
                "llama.cpp (ms)": of["llama.cpp"].ms,
                "base/llama.cpp": of["base"].ms / of["llama.cpp"].ms,
                "same tokens": f"{n_same} of {n_tokens * len(questions)}",
            }
        )
    facts = facts | {"llama-cpp-python": other.facts["version"]}
    facts |= {"texts": len(questions), "tokens": n_tokens, "rounds": rounds}
    return Report(name="llama_cpp", method=METHOD, rows=rows, facts=facts)


def _n_same(engine: Engine, prompt: Any, theirs: Sequence[int]) -> int:
    from xlora_core import SamplingParams

    track = engine.run(prompt, [Arm.base()], SamplingParams(max_new_tokens=len(theirs))).tracks[0]
    ours = track.token_ids[track.n_prompt :].tolist()
    differ = (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(ours), len(theirs)))


def _side(
    other: OtherProgram, token_ids: Sequence[int], n_tokens: int, written: list[list[int]]
) -> Side:
    def turn() -> Sample:
        answer = other.ask({"token_ids": list(token_ids), "n_tokens": n_tokens})
        written.append(answer["token_ids"])
        return Sample(seconds=answer["seconds"], n_tokens=n_tokens - 1, n_context=len(token_ids))

    return turn


def write_unpacked(source: Path, target: Path, dtype: str) -> Path:
    """Writes a GGUF file anew with its weights unpacked; returns ``target``.

    Args:
        source: A GGUF file.
        target: Where to.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the weight matrices; vectors are kept.
    """
    import gguf

    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float16": gguf.GGMLQuantizationType.F16,
    }
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for name, of_file in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer's own
        inner = of_file.types[-1] if len(of_file.types) > 1 else None
        writer.add_key_value(name, of_file.contents(), of_file.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = kinds[dtype] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

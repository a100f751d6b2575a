"""What the record of a run costs: time beside a run without one, and memory per token."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.options import new_parser, show
from xlora_core import Arm, Engine, SamplingParams
from xlora_core.bench import Report
from xlora_core.bench.report import Cell
from xlora_core.bench.sides import endless_answers, model_facts
from xlora_core.bench.texts import QUESTIONS, prompt_of
from xlora_core.bench.turns import Sample, Side, take_turns, together
from xlora_core.cli import options
from xlora_core.engine import TokenEvent
from xlora_core.recording import TrackRecorder

if TYPE_CHECKING:
    from xlora_core.engine.prompts import Prompt
    from xlora_core.model import XLoraModel

METHOD = (
    "Milliseconds a token of a routed arm, from its first to its last event; on: as it comes, off: "
    "with a recorder that writes nothing. The sides take turns, the quietest round counts, the "
    "mean over all texts. kept: bytes of Python and numpy memory that a finished run holds for "
    "each generated token, from two runs of different length; logits: L*K*2 bytes of them."
)
_WRITERS = ("append_prompt", "append", "set_router_logits", "set_knobs", "count_guess")


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("recording", __doc__ or "")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args(argv)
    model, tokenizer = options.load(args)
    with endless_answers(model), Engine(model, tokenizer) as engine:
        report = measure(
            model,
            engine,
            questions=QUESTIONS[: args.texts],
            n_tokens=args.tokens,
            rounds=args.rounds,
        )
    show(report, args, argv)


def measure(
    model: XLoraModel, engine: Engine, *, questions: Sequence[str], n_tokens: int, rounds: int
) -> Report:
    """Times decoding with and without a record, and counts what the record keeps.

    Args:
        model: The X-LoRA model.
        engine: An engine over it, whose answers do not end by themselves.
        questions: One text is decoded for each.
        n_tokens: Tokens decoded per text.
        rounds: How often each side has its turn per text.
    """
    prompts = [prompt_of(engine.tokenizer, question) for question in questions]
    parts = [
        take_turns(
            {
                "on": _side(engine, prompt, n_tokens, records=True),
                "off": _side(engine, prompt, n_tokens, records=False),
            },
            rounds,
        )
        for prompt in prompts
    ]
    of = {side: together(part[side] for part in parts) for side in parts[0]}
    kept = kept_bytes(engine, prompts[0], n_tokens, 4 * n_tokens)
    logits = 2 * len(model.adapter_names) * _n_routed_layers(model)
    row: dict[str, Cell] = {
        "on (ms)": of["on"].ms,
        "off (ms)": of["off"].ms,
        "on/off": of["on"].ms / of["off"].ms,
        "kept (bytes/token)": kept,
        "logits (bytes/token)": logits,
        "beyond logits": kept - logits,
    }
    facts = model_facts(model) | {"texts": len(questions), "tokens": n_tokens, "rounds": rounds}
    return Report(name="recording", method=METHOD, rows=[row], facts=facts)


def _n_routed_layers(model: XLoraModel) -> int:
    return len(model.lora_layer_names) if model.config_xlora.layerwise_scalings else 1


def _side(engine: Engine, prompt: Prompt, n_tokens: int, *, records: bool) -> Side:
    sampling = SamplingParams(max_new_tokens=n_tokens)

    def turn() -> Sample:
        with nullcontext() if records else no_record():
            times = [
                time.perf_counter()
                for event in engine.stream(prompt, [Arm.routed()], sampling)
                if isinstance(event, TokenEvent)
            ]
        return Sample(seconds=times[-1] - times[0], n_tokens=len(times) - 1)

    return turn


@contextmanager
def no_record() -> Iterator[None]:
    """Makes every recorder write nothing in a ``with`` block."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    patches = [patch.object(TrackRecorder, name, nothing) for name in _WRITERS]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def kept_bytes(engine: Engine, prompt: Prompt, few: int, many: int) -> int:
    """Returns how many bytes of Python and numpy a run holds for each generated token.

    The memory of two runs is compared, so what they have in common does not count.

    Args:
        engine: An engine whose answers do not end by themselves.
        prompt: The prompt of both.
        few: Tokens of the shorter run.
        many: Tokens of the longer run.
    """
    held = []
    for n_tokens in (few, few, many):  # the first fills caches
        gc.collect()
        tracemalloc.start()
        run = engine.run(prompt, [Arm.routed()], SamplingParams(max_new_tokens=n_tokens))
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del run
    return round((held[2] - held[1]) / (many - few))

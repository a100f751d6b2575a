"""Several requests at once beside one: what people who share an engine get together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xlora_core.bench.report import Cell, Report
from xlora_core.bench.sides import endless_answers, model_facts
from xlora_core.bench.texts import prompt_of
from xlora_core.bench.turns import Sample, Side, take_turns
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.prompts import Prompt

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

COUNTS = (1, 2, 4, 8)
METHOD = (
    "New tokens a second of n routed requests, greedy, different prompts, all submitted at once; "
    "from submission to the end of the last, prompts included. The groups take turns, the quietest "
    "round counts. /one: total tokens a second against a single request."
)


def measure(
    model: XLoraModel,
    tokenizer: Any,
    *,
    questions: Sequence[str],
    counts: Sequence[int] = COUNTS,
    n_tokens: int = 128,
    rounds: int = 2,
) -> Report:
    """Times groups of concurrent requests.

    Args:
        model: The X-LoRA model.
        tokenizer: Its tokenizer.
        questions: The prompts, taken in turn.
        counts: Sizes of the groups; the first is what the others are compared with.
        n_tokens: Tokens that each request writes; answers are as long if nothing else is said.
        rounds: How often each group has its turn.
    """
    prompts = [prompt_of(tokenizer, question) for question in questions]
    most = max(counts)
    with endless_answers(model), Engine(model, tokenizer, max_active=most) as engine:
        sides = {
            str(n): _side(engine, [prompts[i % len(prompts)] for i in range(n)], n_tokens)
            for n in counts
        }
        of = take_turns(sides, rounds)
    alone = next(iter(of.values()))
    rows: list[dict[str, Cell]] = [
        {
            "requests": int(name),
            "tokens/s": 1000 / sample.ms,
            "tokens/s each": 1000 / sample.ms / int(name),
            "/one": alone.ms / sample.ms,
            "hit rate": sample.hit_rate,
        }
        for name, sample in of.items()
    ]
    facts = model_facts(model) | {"tokens": n_tokens, "rounds": rounds}
    return Report(name="requests", method=METHOD, rows=rows, facts=facts)


def _side(engine: Engine, prompts: Sequence[Prompt], n_tokens: int) -> Side:
    sampling = SamplingParams(max_new_tokens=n_tokens)

    def turn() -> Sample:
        start = time.perf_counter()
        handles = [engine.submit(prompt, [Arm.routed()], sampling) for prompt in prompts]
        tracks = [handle.wait().tracks[0] for handle in handles]
        return Sample(
            seconds=time.perf_counter() - start,
            n_tokens=sum(track.n_tokens - track.n_prompt for track in tracks),
            n_guessed=sum(track.n_guessed for track in tracks),
            n_hit=sum(track.n_hit for track in tracks),
        )

    return turn

"""Many adapters beside few: what more experts cost a decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from xlora_core.bench.random_parts import random_xlora
from xlora_core.bench.report import Cell, Report
from xlora_core.bench.sides import endless_answers, engine_side, model_facts
from xlora_core.bench.texts import prompt_of
from xlora_core.bench.turns import take_turns, together
from xlora_core.config import Arm
from xlora_core.engine import Engine
from xlora_core.threads import apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = (2, 4, 8, 16)
# Weak experts: the texts stay the base's, and so alike for all numbers of adapters.
_STRENGTH = 0.05
METHOD = (
    "Milliseconds a token of a routed arm, greedy, with random experts in every linear module and "
    "a random router. The models take turns; the quietest round counts, the mean over all texts. "
    "/first: against the first line."
)


def measure(
    load_base: Callable[[], PreTrainedModel],
    tokenizer: Any,
    *,
    questions: Sequence[str],
    counts: Sequence[int] = COUNTS,
    rank: int = 8,
    n_tokens: int = 32,
    rounds: int = 3,
) -> Report:
    """Times a routed arm of one base model with several numbers of adapters.

    Args:
        load_base: Returns the base model anew; called once for each number.
        tokenizer: Its tokenizer.
        questions: One text is decoded for each.
        counts: Numbers of adapters.
        rank: Of every adapter.
        n_tokens: Tokens decoded per text.
        rounds: How often each model has its turn per text.
    """
    engines: dict[str, Engine] = {}
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        for count in counts:
            folder = stack.enter_context(TemporaryDirectory())
            add = partial(random_xlora, n_adapters=count, rank=rank, strength=_STRENGTH)
            model = apart(partial(add, load_base(), folder))
            with endless_answers(model):
                engines[str(count)] = stack.enter_context(Engine(model, tokenizer))
            facts = model_facts(model)
        parts = [
            take_turns(
                {
                    name: engine_side(
                        engine, prompt_of(tokenizer, question), [Arm.routed()], n_tokens
                    )
                    for name, engine in engines.items()
                },
                rounds,
            )
            for question in questions
        ]
    of = {name: together(part[name] for part in parts) for name in engines}
    first = next(iter(of.values())).ms
    rows: list[dict[str, Cell]] = [
        {
            "adapters": int(name),
            "ms": sample.ms,
            "/first": sample.ms / first,
            "hit rate": sample.hit_rate,
        }
        for name, sample in of.items()
    ]
    facts |= {
        "adapters": list(counts),
        "texts": len(questions),
        "tokens": n_tokens,
        "rounds": rounds,
    }
    return Report(name="adapters", method=METHOD, rows=rows, facts=facts)

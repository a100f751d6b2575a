"""Several arms over one prompt beside a single routed arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xlora_core.bench.report import Cell, Report
from xlora_core.bench.sides import endless_answers, engine_side, model_facts
from xlora_core.bench.texts import prompt_of
from xlora_core.bench.turns import take_turns, together
from xlora_core.config import Arm
from xlora_core.engine import Engine

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

METHOD = (
    "Milliseconds a token of the slowest arm, greedy, all arms of a request in the same steps; the "
    "requests take turns, the quietest round counts, the mean over all texts. /routed: against the "
    "routed arm alone. hit rate: of the guesses of the routed arm's next token."
)


def measure(
    model: XLoraModel,
    tokenizer: Any,
    *,
    questions: Sequence[str],
    n_tokens: int = 32,
    rounds: int = 3,
) -> Report:
    """Times requests of one to four arms: routed, merged, base, and the first expert.

    Args:
        model: The X-LoRA model.
        tokenizer: Its tokenizer.
        questions: One text is decoded for each.
        n_tokens: Tokens decoded per text and arm.
        rounds: How often each request has its turn per text.
    """
    arms = [Arm.routed(), Arm.merged(), Arm.base(), Arm.expert(model.adapter_names[0])]
    requests = {", ".join(arm.label for arm in arms[:n]): arms[:n] for n in range(1, len(arms) + 1)}
    with endless_answers(model), Engine(model, tokenizer) as engine:
        parts = [
            take_turns(
                {
                    name: engine_side(engine, prompt_of(tokenizer, question), some, n_tokens)
                    for name, some in requests.items()
                },
                rounds,
            )
            for question in questions
        ]
    of = {name: together(part[name] for part in parts) for name in requests}
    alone = next(iter(of.values())).ms
    rows: list[dict[str, Cell]] = [
        {"arms": name, "ms": sample.ms, "/routed": sample.ms / alone, "hit rate": sample.hit_rate}
        for name, sample in of.items()
    ]
    facts = model_facts(model) | {"texts": len(questions), "tokens": n_tokens, "rounds": rounds}
    return Report(name="arms", method=METHOD, rows=rows, facts=facts)

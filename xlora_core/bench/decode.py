"""One decoded token at growing context, beside Hugging Face's cached decoding of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from xlora_core.bench.report import Cell, Report
from xlora_core.bench.sides import engine_side, generate_side, hugging_face_side, model_facts
from xlora_core.bench.texts import prompt_of
from xlora_core.bench.turns import Sample, Side, take_turns, together
from xlora_core.config import Arm
from xlora_core.engine import Engine
from xlora_core.engine.overlap import OverlapMode
from xlora_core.engine.prompts import Prompt, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xlora_core.model import XLoraModel

CONTEXTS = (128, 512, 1024, 2000)
METHOD = (
    "Milliseconds a token, batch 1, greedy. hf: the plain base model's forward with Hugging "
    "Face's cache; generate: its generate; base: our engine's base arm; routed: our engine's "
    "X-LoRA; two passes: the same without guessing the next token. hit rate: how often the guess "
    "was right, - where none was made since it did not pay; routed/first: against the first line. "
    "The sides take turns; a side's figure is its quietest round, the mean over all tokens and "
    "texts."
)


def measure(
    model: XLoraModel,
    tokenizer: Any,
    base: PreTrainedModel,
    *,
    contexts: Sequence[int] = CONTEXTS,
    questions: Sequence[str],
    n_tokens: int = 32,
    rounds: int = 2,
    overlap: OverlapMode = "auto",
) -> Report:
    """Times a decode step of every side at every context.

    Args:
        model: The X-LoRA model.
        tokenizer: Its tokenizer.
        base: The same base model, plain.
        contexts: Tokens of the prompts.
        questions: One text is decoded for each.
        n_tokens: Tokens decoded per text.
        rounds: How often each side has its turn per text.
        overlap: Of the routed side's engine: ``"auto"`` as it comes.
    """
    rows: list[dict[str, Cell]] = []
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, tokenizer, overlap=overlap))
        two_passes = stack.enter_context(Engine(model, tokenizer, overlap="off"))
        for context in contexts:
            parts = [
                take_turns(
                    _sides(
                        engine,
                        two_passes,
                        base,
                        prompt_of(tokenizer, question, context),
                        n_tokens=n_tokens,
                    ),
                    rounds,
                )
                for question in questions
            ]
            of = {side: together(part[side] for part in parts) for side in parts[0]}
            rows.append(_row(of, first=rows[0] if rows else None))
    facts = model_facts(model) | {"overlap": overlap, "texts": len(questions)}
    facts |= {"tokens": n_tokens, "rounds": rounds}
    return Report(name="decode", method=METHOD, rows=rows, facts=facts)


def _sides(
    engine: Engine, two_passes: Engine, base: PreTrainedModel, prompt: Prompt, *, n_tokens: int
) -> dict[str, Side]:
    token_ids = encode_prompt(
        engine.tokenizer,
        prompt,
        context_length=base.config.max_position_embeddings,
        vocab_size=base.config.vocab_size,
    ).token_ids
    return {
        "hf": hugging_face_side(base, token_ids, n_tokens),
        "generate": generate_side(base, token_ids, n_tokens),
        "base": engine_side(engine, prompt, [Arm.base()], n_tokens),
        "routed": engine_side(engine, prompt, [Arm.routed()], n_tokens),
        "two passes": engine_side(two_passes, prompt, [Arm.routed()], n_tokens),
    }


def _row(of: dict[str, Sample], *, first: dict[str, Cell] | None) -> dict[str, Cell]:
    routed = of["routed"]
    row: dict[str, Cell] = {"context": routed.n_context}
    row |= {f"{side} (ms)": sample.ms for side, sample in of.items()}
    start = first["routed (ms)"] if first else routed.ms
    assert isinstance(start, float)
    return row | {
        "hit rate": routed.hit_rate,
        "routed/hf": routed.ms / of["hf"].ms,
        "two passes/hf": of["two passes"].ms / of["hf"].ms,
        "base/hf": of["base"].ms / of["hf"].ms,
        "routed/first": routed.ms / start,
    }

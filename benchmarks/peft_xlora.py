"""The routed arm beside PEFT's X-LoRA over the same base, experts and classifier.

PEFT keeps no cache: for every token it runs the whole text twice. A turn of its side is a few
whole forward passes at that context, and the least of what it does for a token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.options import new_parser, show
from xlora_core import Arm, Engine, SamplingParams
from xlora_core.bench import Report
from xlora_core.bench.report import Cell
from xlora_core.bench.sides import engine_side, model_facts
from xlora_core.bench.texts import QUESTIONS, prompt_of
from xlora_core.bench.turns import Sample, Side, take_turns, together
from xlora_core.cli import options
from xlora_core.threads import apart

if TYPE_CHECKING:
    from torch import nn

    from xlora_core.model import XLoraModel

METHOD = (
    "Milliseconds a token, batch 1, greedy. routed: our engine; PEFT: one forward call of its "
    "X-LoRA over the text so far, which is what its generate does for every token. same tokens: "
    "how many of PEFT's tokens the engine chose, too. The sides take turns, the quietest round "
    "counts, the mean over all texts."
)


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("peft_xlora", __doc__ or "")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the routed arm a turn")
    parser.add_argument("--peft-tokens", type=int, default=2, help="tokens of PEFT's side a turn")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    model, tokenizer = options.load(args)
    peft = apart(lambda: peft_model(model, args))
    with Engine(model, tokenizer) as engine:
        report = measure(
            model,
            engine,
            peft,
            contexts=args.contexts,
            questions=QUESTIONS[: args.texts],
            n_tokens=args.tokens,
            n_peft_tokens=args.peft_tokens,
            rounds=args.rounds,
        )
    show(report, args, argv)


def measure(
    model: XLoraModel,
    engine: Engine,
    peft: nn.Module,
    *,
    contexts: Sequence[int],
    questions: Sequence[str],
    n_tokens: int,
    n_peft_tokens: int,
    rounds: int,
) -> Report:
    """Times both sides at every context.

    Args:
        model: The X-LoRA model.
        engine: An engine over it.
        peft: PEFT's X-LoRA with the same weights.
        contexts: Tokens of the prompts.
        questions: One text is decoded for each.
        n_tokens: Tokens that the engine decodes per text.
        n_peft_tokens: Tokens that PEFT decodes per text.
        rounds: How often each side has its turn.
    """
    from peft import __version__ as peft_version

    rows: list[dict[str, Cell]] = []
    for context in contexts:
        parts, n_same = [], 0
        for question in questions:
            prompt = prompt_of(engine.tokenizer, question, context)
            track = engine.run(
                prompt, sampling=SamplingParams(max_new_tokens=n_peft_tokens)
            ).tracks[0]
            ids = track.token_ids[: track.n_prompt].tolist()
            written: list[int] = []
            parts.append(
                take_turns(
                    {
                        "routed": engine_side(engine, prompt, [Arm.routed()], n_tokens),
                        "PEFT": _side(peft, ids, n_peft_tokens, model.device, written),
                    },
                    rounds,
                )
            )
            ours = track.token_ids[track.n_prompt :].tolist()
            n_same += sum(a == b for a, b in zip(ours, written, strict=False))
        of = {side: together(part[side] for part in parts) for side in parts[0]}
        rows.append(
            {
                "context": of["routed"].n_context,
                "routed (ms)": of["routed"].ms,
                "PEFT (ms)": of["PEFT"].ms,
                "hit rate": of["routed"].hit_rate,
                "PEFT/routed": of["PEFT"].ms / of["routed"].ms,
                "same tokens": f"{n_same} of {n_peft_tokens * len(questions)}",
            }
        )
    facts = model_facts(model) | {"peft": peft_version, "texts": len(questions)}
    facts |= {"tokens": n_tokens, "tokens of PEFT": n_peft_tokens, "rounds": rounds}
    return Report(name="peft_xlora", method=METHOD, rows=rows, facts=facts)


def _side(
    peft: nn.Module,
    token_ids: Sequence[int],
    n_tokens: int,
    device: torch.device,
    written: list[int],
) -> Side:
    def turn() -> Sample:
        text = list(token_ids)
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(n_tokens):
                logits = peft(input_ids=torch.tensor([text], device=device)).logits
                text.append(int(logits[0, -1].argmax()))
        seconds = time.perf_counter() - start
        written[:] = text[len(token_ids) :]
        return Sample(seconds=seconds, n_tokens=n_tokens, n_context=len(token_ids))

    return turn


def peft_model(model: XLoraModel, args: argparse.Namespace) -> nn.Module:
    """Returns PEFT's X-LoRA over the same base, experts and classifier."""
    from peft import XLoraConfig, get_peft_model

    from xlora_core.demo import load_base

    base, _ = load_base(args.model, dtype=args.dtype, device=args.device)
    base.config.use_cache = False
    fields: dict[str, Any] = model.config_xlora.to_dict()
    # These are not PEFT's, and it fails with any other names than "0", "1", ...
    del fields["router"], fields["adapter_overrides"]
    fields["adapters"] = {str(i): path for i, path in enumerate(fields["adapters"].values())}
    reference = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", **fields))
    classifier: nn.Module = reference.base_model.internal_xlora_classifier
    classifier.load_state_dict(model.classifier.state_dict())
    return reference.eval()

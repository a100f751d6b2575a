"""Cost of one decoded token at growing context: the routed arm beside the plain base model.

Both sides take turns token by token in one process, so that whatever else the machine does
falls on both. The base is Hugging Face's own model with its own cache; the routed arm does all
that the engine does for a token, sampling and base log-probabilities included. ``--peft`` adds
PEFT's X-LoRA over the same experts, which runs the whole text twice for every token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report import new_parser, publish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xlora_core.model import XLoraModel

Step = Callable[[], object]


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("decode", __doc__ or "")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2000])
    parser.add_argument("--steps", type=int, default=12, help="tokens timed per context")
    parser.add_argument("--peft", action="store_true", help="also time PEFT's X-LoRA (slow)")
    args = parser.parse_args(argv)
    from xlora_core.cli.options import load
    from xlora_core.demo import load_base

    model, _ = load(args)
    base, _ = load_base(args.model, dtype=args.dtype, device=args.device)
    peft = _peft_model(model, args) if args.peft else None
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for context in args.contexts:
            rows.append(_row(model, base, peft, context, args.steps, first=rows[:1]))
    publish(
        "decode",
        rows,
        args,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        adapters=len(model.adapter_names),
        ranks=sorted({rank for layer in model.lora_layers for rank in layer.ranks}),
        modules=len(model.lora_layer_names),
        steps=args.steps,
    )


def _row(
    model: XLoraModel,
    base: PreTrainedModel,
    peft: torch.nn.Module | None,
    context: int,
    n_steps: int,
    *,
    first: list[dict[str, Any]],
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(1000, base.config.vocab_size - 1000, (context,), generator=generator)
    of_base, of_routed = _timed([_base_step(base, ids), _routed_step(model, ids)], n_steps)
    row = {
        "context": context,
        "base_ms": of_base,
        "routed_ms": of_routed,
        "routed/base": of_routed / of_base,
        "routed/first": of_routed / first[0]["routed_ms"] if first else 1.0,
    }
    if peft is not None:
        (of_peft,) = _timed([lambda: peft(input_ids=ids[None].to(base.device))], 2)
        row |= {"peft_ms": of_peft, "peft/routed": of_peft / of_routed}
    return row


def _timed(steps: list[Step], n: int) -> list[float]:
    """Returns the median milliseconds of each step; they take turns, the first round is free."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(n + 1):
        for times, step in zip(seconds, steps, strict=True):
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [1000 * statistics.median(times[1:]) for times in seconds]


def _base_step(base: PreTrainedModel, ids: torch.Tensor) -> Step:
    from transformers import DynamicCache

    cache = DynamicCache(config=base.config)
    token = ids[None].to(base.device)

    def step() -> None:
        nonlocal token
        output = base(input_ids=token, past_key_values=cache, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)

    step()  # reads the prompt
    return step


def _routed_step(model: XLoraModel, ids: torch.Tensor) -> Step:
    from xlora_core import Arm, SamplingParams
    from xlora_core.engine.arms import ArmDecoder
    from xlora_core.engine.sampling import Sampler, log_softmax, on_cpu

    decoder = ArmDecoder(model, Arm.routed(), with_base_logits=True)
    sampler = Sampler(SamplingParams(), [], n_alternatives=5)
    tokens = ids.tolist()

    def step() -> None:
        nonlocal tokens
        reading = decoder.read(tokens, model.default_knobs)
        tokens = [sampler.choose(reading.logits).token_id]
        if reading.base_logits is not None:
            log_softmax(on_cpu(reading.base_logits))[tokens[0]]

    step()  # reads the prompt
    return step


def _peft_model(model: XLoraModel, args: argparse.Namespace) -> torch.nn.Module:
    """Returns PEFT's X-LoRA over the same base, experts and classifier."""
    from peft import XLoraConfig, get_peft_model

    from xlora_core.demo import load_base

    base, _ = load_base(args.model, dtype=args.dtype, device=args.device)
    base.config.use_cache = False
    fields = model.config_xlora.to_dict()
    # PEFT fails with any other names than "0", "1", ...
    fields["adapters"] = {str(i): path for i, path in enumerate(fields["adapters"].values())}
    reference = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", **fields))
    classifier: torch.nn.Module = reference.base_model.internal_xlora_classifier
    classifier.load_state_dict(model.classifier.state_dict())
    return reference.eval()

"""The benchmarks of ``xlora bench``: the options of each, and what they become."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options

if TYPE_CHECKING:
    from xlora_core.bench import Report

    Parser = argparse.ArgumentParser


def _new(benchmarks: options.Commands, name: str, summary: str, text: str) -> Parser:
    parser = options.new_command(
        benchmarks, name, summary=summary, description=text, examples=f"  xlora bench {name}\n"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the result there, as JSON")
    return parser


def _add_rounds(parser: Parser, rounds: int) -> None:
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help=f"turns of each side; the quietest counts (default: {rounds})",
    )


def _add_texts(parser: Parser, *, tokens: int, texts: int, rounds: int) -> None:
    parser.add_argument(
        "--tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens decoded per text (default: {tokens})",
    )
    parser.add_argument(
        "--texts",
        type=int,
        default=texts,
        metavar="N",
        help=f"how many of the prompts are run (default: {texts})",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='your own prompts, as JSON: ["...", ...]; how often the next token is guessed '
        "depends on them (default: eight questions of different kinds)",
    )
    _add_rounds(parser, rounds)


def _questions(args: argparse.Namespace) -> tuple[str, ...]:
    from xlora_core.bench.texts import read_questions

    return read_questions(args.prompts)[: args.texts]


# ----------------------------------------------------------------- benchmarks


def _add_decode(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "decode",
        "a routed token beside Hugging Face's cached decoding of the base",
        "Times one decoded token at growing context: Hugging Face's base model with its cache,\n"
        "our engine's base arm, routed X-LoRA, and X-LoRA without guessing the next token.",
    )
    parser.set_defaults(measure=_decode)
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[128, 512, 1024, 2000],
        metavar="N",
        help="tokens of the prompts (default: 128 512 1024 2000)",
    )
    parser.add_argument(
        "--overlap",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether the routed side guesses the next token: auto where that pays (default)",
    )
    _add_texts(parser, tokens=48, texts=2, rounds=3)
    options.add_model_options(parser)
    return parser


def _decode(args: argparse.Namespace) -> Report:
    from xlora_core.bench import decode
    from xlora_core.demo import load_base

    questions = _questions(args)
    model, tokenizer = options.load(args)
    base, _ = load_base(args.model, dtype=args.dtype, device=args.device)
    return decode.measure(
        model,
        tokenizer,
        base,
        contexts=args.contexts,
        questions=questions,
        n_tokens=args.tokens,
        rounds=args.rounds,
        overlap=args.overlap,
    )


def _add_arms(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "arms",
        "several arms of one prompt beside the routed arm alone",
        "Times requests of one to four arms: routed, merged, base, and the first expert.",
    )
    parser.set_defaults(measure=_arms)
    _add_texts(parser, tokens=32, texts=4, rounds=3)
    options.add_model_options(parser)
    return parser


def _arms(args: argparse.Namespace) -> Report:
    from xlora_core.bench import arms

    questions = _questions(args)
    model, tokenizer = options.load(args)
    return arms.measure(
        model, tokenizer, questions=questions, n_tokens=args.tokens, rounds=args.rounds
    )


def _add_requests(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "requests",
        "several people at once beside one",
        "Times groups of routed requests that are submitted at once, from several people.",
    )
    parser.set_defaults(measure=_requests)
    _add_counts(parser, [1, 2, 4, 8], "sizes of the groups, the first is compared with")
    _add_texts(parser, tokens=128, texts=8, rounds=2)
    options.add_model_options(parser)
    return parser


def _add_counts(parser: Parser, counts: list[int], what: str) -> None:
    words = " ".join(map(str, counts))
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=counts,
        metavar="N",
        help=f"{what} (default: {words})",
    )


def _requests(args: argparse.Namespace) -> Report:
    from xlora_core.bench import requests

    questions = _questions(args)
    model, tokenizer = options.load(args)
    return requests.measure(
        model,
        tokenizer,
        questions=questions,
        counts=args.counts,
        n_tokens=args.tokens,
        rounds=args.rounds,
    )


def _add_adapters(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "adapters",
        "16 experts beside 2, random ones on the same base",
        "Times a routed token with several numbers of random experts on one base model. Only the\n"
        "base of the model options is used.",
    )
    parser.set_defaults(measure=_adapters)
    _add_counts(parser, [2, 4, 8, 16], "numbers of experts, the first is compared with")
    parser.add_argument(
        "--rank", type=int, default=8, metavar="R", help="of every expert (default: 8)"
    )
    _add_texts(parser, tokens=32, texts=2, rounds=3)
    options.add_model_options(parser)
    return parser


def _adapters(args: argparse.Namespace) -> Report:
    from xlora_core.bench import adapters
    from xlora_core.demo import load_base
    from xlora_core.threads import set_threads

    set_threads(args.threads)

    def load() -> Any:
        return load_base(args.model, dtype=args.dtype, device=args.device)

    questions = _questions(args)
    return adapters.measure(
        lambda: load()[0],
        load()[1],
        questions=questions,
        counts=args.counts,
        rank=args.rank,
        n_tokens=args.tokens,
        rounds=args.rounds,
    )


def _add_reroute(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "reroute",
        "other knobs over a recorded run, without the model",
        "Times run.scalings(knobs=...) over a run of random router logits.",
    )
    parser.set_defaults(measure=_reroute)
    for option, size, what in (
        ("--tokens", 512, "tokens of the run"),
        ("--modules", 210, "adapted modules"),
        ("--experts", 8, "experts"),
    ):
        parser.add_argument(
            option, type=int, default=size, metavar="N", help=f"{what} (default: {size})"
        )
    _add_rounds(parser, 20)
    return parser


def _reroute(args: argparse.Namespace) -> Report:
    from xlora_core.bench import reroute

    return reroute.measure(
        n_tokens=args.tokens,
        n_modules=args.modules,
        n_adapters=args.experts,
        rounds=args.rounds,
    )


def _add_start(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "start",
        "from the start of a process to the first token",
        "Starts processes that load the model and write one token, and times how far they are.",
    )
    parser.set_defaults(measure=_start)
    _add_rounds(parser, 3)
    options.add_model_options(parser)
    return parser


def _start(args: argparse.Namespace) -> Report:
    from xlora_core.bench import start

    given = ["--model", args.model]
    for name in ("checkpoint", "device", "dtype", "threads"):
        if getattr(args, name) is not None:
            given += [f"--{name}", str(getattr(args, name))]
    for adapter in args.adapter:
        given += ["--adapter", adapter]
    return start.measure(given, rounds=args.rounds)


def _add_bandwidth(benchmarks: options.Commands) -> Parser:
    parser = _new(
        benchmarks,
        "bandwidth",
        "random-weight models beside one read of their weights",
        "Times routed decoding of random-weight Llama shapes against the time that one read of\n"
        "their weights takes. Without a CUDA device it says so and ends, unless --device is given.",
    )
    parser.set_defaults(measure=_bandwidth)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["1b", "8b"],
        choices=("tiny", "1b", "3b", "8b"),
        help="shapes of the models (default: 1b 8b)",
    )
    parser.add_argument("--device", help="such as cuda:0 or cpu (default: cuda)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the weights (default: bfloat16)",
    )
    parser.add_argument("--experts", type=int, default=4, metavar="K", help="how many (default: 4)")
    parser.add_argument(
        "--rank", type=int, default=8, metavar="R", help="of every expert (default: 8)"
    )
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens of the prompt (default: 128)"
    )
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="tokens decoded (default: 64)"
    )
    _add_rounds(parser, 3)
    return parser


def _bandwidth(args: argparse.Namespace) -> Report:
    import torch

    from xlora_core.bench import Report, bandwidth
    from xlora_core.placement import DTYPES
    from xlora_core.threads import set_threads

    set_threads()
    if args.device is None and not torch.cuda.is_available():
        note = "Not measured: PyTorch sees no CUDA device here (--device cpu measures the CPU)."
        return Report(name="bandwidth", method=bandwidth.METHOD, rows=[], notes=[note])
    return bandwidth.measure(
        args.sizes,
        device=args.device or "cuda",
        dtype=DTYPES[args.dtype],
        n_adapters=args.experts,
        rank=args.rank,
        context=args.context,
        n_tokens=args.tokens,
        rounds=args.rounds,
    )


ALL = (
    _add_decode,
    _add_arms,
    _add_requests,
    _add_adapters,
    _add_reroute,
    _add_start,
    _add_bandwidth,
)

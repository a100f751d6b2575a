"""Ways to foresee the next token, and how many reads of the weights a token costs with each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.options import new_parser, show
from xlora_core import Arm, Engine, SamplingParams
from xlora_core.bench import Report
from xlora_core.bench.report import Cell
from xlora_core.bench.sides import model_facts
from xlora_core.bench.texts import QUESTIONS, prompt_of
from xlora_core.cli import options

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

METHOD = (
    "Counted, not timed, over the answers to all questions. reads/token: runs over the weights for "
    "a generated token. Without guesses there are two, with a hit rate a there are 2 - a. Guesses "
    "are drafts where the engine drafts (docs/engine.md). Prompt "
    "lookup takes the longest run of at most 3 tokens at the text's end, proposes what followed "
    "when it occurred before, and reads the proposal with the scaling pass, then with the main "
    "pass: two runs for the tokens that were right and one more."
)
_LONGEST_RUN = 3
_SHORTEST_RUN = 2


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("guessing", __doc__ or "")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--siblings", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args(argv)
    model, tokenizer = options.load(args)
    report = measure(
        model,
        tokenizer,
        questions=QUESTIONS,
        n_tokens=args.tokens,
        siblings=args.siblings,
        drafts=args.drafts,
    )
    show(report, args, argv)


def measure(
    model: XLoraModel,
    tokenizer: Any,
    *,
    questions: Sequence[str],
    n_tokens: int,
    siblings: Sequence[int],
    drafts: Sequence[int],
) -> Report:
    """Counts hits of guesses, and what prompt lookup would have proposed.

    Args:
        model: The X-LoRA model.
        tokenizer: Its tokenizer.
        questions: One greedy answer each.
        n_tokens: Most tokens of an answer.
        siblings: Numbers of guesses that are read at once.
        drafts: Lengths of a proposal.
    """
    prompts = [prompt_of(tokenizer, question) for question in questions]
    sampling = SamplingParams(max_new_tokens=n_tokens)
    rows: list[dict[str, Cell]] = [{"way": "none", "right": None, "reads/token": 2.0}]
    answers: list[tuple[list[int], int]] = []
    for n_guesses in siblings:
        with Engine(model, tokenizer, overlap="on", n_guesses=n_guesses) as engine:
            tracks = [engine.run(prompt, [Arm.routed()], sampling).tracks[0] for prompt in prompts]
        rate = sum(t.n_hit for t in tracks) / sum(t.n_guessed for t in tracks)
        name = f"guess, {n_guesses} at once" if n_guesses > 1 else "guess"
        rows.append({"way": name, "right": rate, "reads/token": 2 - rate})
        answers = [(track.token_ids.tolist(), track.n_prompt) for track in tracks]
    for length in drafts:
        found = [lookup(ids, n_prompt, length) for ids, n_prompt in answers]
        n_written = sum(len(ids) - n_prompt for ids, n_prompt in answers)
        n_rounds, n_proposed, n_right = (sum(of) for of in zip(*found, strict=True))
        rows.append(
            {
                "way": f"prompt lookup, {length} tokens",
                "right": n_right / n_proposed if n_proposed else None,
                "reads/token": 2 * n_rounds / n_written,
            }
        )
    facts = model_facts(model) | {"texts": len(questions), "tokens": n_tokens}
    return Report(name="guessing", method=METHOD, rows=rows, facts=facts)


def lookup(token_ids: Sequence[int], n_prompt: int, length: int) -> tuple[int, int, int]:
    """Returns what prompt lookup would have done for a text: rounds, tokens proposed, tokens right.

    Args:
        token_ids: Prompt and answer.
        n_prompt: Tokens of the prompt.
        length: Most tokens of a proposal.
    """
    place, n_rounds, n_proposed, n_right = n_prompt, 0, 0, 0
    while place < len(token_ids):
        proposed = _followed(token_ids[:place], length)
        right = 0
        for token, written in zip(proposed, token_ids[place:], strict=False):
            if token != written:
                break
            right += 1
        n_rounds, n_proposed, n_right = n_rounds + 1, n_proposed + len(proposed), n_right + right
        place += right + 1  # the main pass writes one more than was right
    return n_rounds, n_proposed, n_right


def _followed(text: Sequence[int], length: int) -> Sequence[int]:
    """Returns what followed the last tokens of a text where they occurred last before."""
    for n_run in range(_LONGEST_RUN, _SHORTEST_RUN - 1, -1):
        run = text[-n_run:]
        for start in range(len(text) - n_run - 1, -1, -1):
            if text[start : start + n_run] == run:
                return text[start + n_run : start + n_run + length]
    return ()

"""The sides of a comparison: this project's engine, and Hugging Face's own decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from xlora_core.bench.turns import Sample, Side
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.prompts import Prompt
from xlora_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run


def engine_side(engine: Engine, prompt: Prompt, arms: Sequence[Arm], n_tokens: int) -> Side:
    """Returns a side that runs one request to its end, and times the tokens after the first.

    Args:
        engine: The engine; nobody else may use it meanwhile.
        prompt: The prompt.
        arms: The arms; the slowest one counts.
        n_tokens: Tokens to write, >= 2. An answer may end before.
    """
    sampling = SamplingParams(max_new_tokens=n_tokens)
    return lambda: slowest_arm(engine.run(prompt, arms, sampling))


def slowest_arm(run: Run) -> Sample:
    """Returns the tokens of a run's slowest arm, less the first: that took the prompt's time.

    Guesses are those of all arms.

    Raises:
        ConfigError: If no arm wrote two tokens.
    """
    timed = [
        Sample(
            seconds=float(track.seconds[-1] - track.seconds[track.n_prompt]),
            n_tokens=track.n_tokens - track.n_prompt - 1,
            n_context=track.n_prompt,
        )
        for track in run.tracks
        if track.n_tokens - track.n_prompt > 1
    ]
    if not timed:
        raise ConfigError(
            f"the answer to {run.header.prompt_text[-60:]!r} is a single token, which cannot be "
            "timed",
            hint="take prompts with longer answers (--prompts), and --tokens of at least 2",
        )
    slowest = max(timed, key=lambda sample: sample.ms)
    return Sample(
        seconds=slowest.seconds,
        n_tokens=slowest.n_tokens,
        n_context=slowest.n_context,
        n_guessed=sum(track.n_guessed for track in run.tracks),
        n_hit=sum(track.n_hit for track in run.tracks),
    )


def hugging_face_side(base: PreTrainedModel, token_ids: Sequence[int], n_tokens: int) -> Side:
    """Returns a side that decodes greedily with the plain base model and its cache.

    It is the least that cached decoding with Hugging Face takes: the model's forward on the last
    token, and the largest logit. ``generate`` does more beside.

    Args:
        base: The plain base model.
        token_ids: The prompt.
        n_tokens: Tokens to write, >= 2; the first is not timed.
    """
    from transformers import DynamicCache

    def turn() -> Sample:
        cache = DynamicCache(config=base.config)
        token = torch.tensor([list(token_ids)], device=base.device)
        started = 0.0
        with torch.inference_mode():
            for n in range(n_tokens):
                output = base(
                    input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                token = output.logits[:, -1].argmax(-1, keepdim=True)
                token.item()  # whoever wants the text waits for every token
                if n == 0:
                    started = time.perf_counter()
        seconds = time.perf_counter() - started
        return Sample(seconds=seconds, n_tokens=n_tokens - 1, n_context=len(token_ids))

    return turn


def generate_side(base: PreTrainedModel, token_ids: Sequence[int], n_tokens: int) -> Side:
    """Returns a side that calls Hugging Face's ``generate`` on the plain base model.

    Args:
        base: The plain base model.
        token_ids: The prompt.
        n_tokens: Tokens to write, >= 2; the first is not timed.
    """

    def turn() -> Sample:
        clock = _Clock()
        generate: Any = base.generate  # transformers' annotation is that of a tensor
        ids = torch.tensor([list(token_ids)], device=base.device)
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            streamer=clock,
        )
        first, last = clock.times[1], clock.times[-1]  # the prompt comes before the first token
        return Sample(seconds=last - first, n_tokens=n_tokens - 1, n_context=len(token_ids))

    return turn


class _Clock:
    """A streamer for ``generate`` that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: the last token has come."""


@contextmanager
def endless_answers(model: XLoraModel) -> Iterator[None]:
    """Keeps engines that are made in a ``with`` block from ending an answer by themselves.

    For timings of several texts side by side, which all have to be equally long.
    """
    # Any: transformers' annotation has no empty list.
    settings: Any = model.base_model.generation_config
    kept = settings.eos_token_id
    settings.eos_token_id = []
    try:
        yield
    finally:
        settings.eos_token_id = kept


def model_facts(model: XLoraModel) -> dict[str, Any]:
    """Returns what a timing of a model depends on, as plain JSON types."""
    base = model.base_model
    return {
        "architecture": type(base).__name__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "adapters": len(model.adapter_names),
        "ranks": sorted({rank for layer in model.lora_layers for rank in layer.ranks}),
        "modules": len(model.lora_layer_names),
    }

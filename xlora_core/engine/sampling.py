"""Choosing the next token from a language model's logits, with the request's own random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.config import SamplingParams
from xlora_core.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own, before any sampling knob.

    Attributes:
        token_id: The token.
        logprob: Its natural log-probability.
        alternative_ids: The most likely tokens, best first.
        alternative_logprobs: Their log-probabilities.
    """

    token_id: int
    logprob: float
    alternative_ids: list[int]
    alternative_logprobs: list[float]


class Sampler:
    """Picks the tokens of one arm.

    Every arm has its own generator, seeded alike: arms whose distributions agree draw the same
    token, so what differs between arms comes from the models and not from the dice. For the same
    reason a guess, made from the base model's logits, draws with the noise that the choice it
    anticipates will draw with.

    Args:
        params: Temperature, top-p, top-k, repetition penalty, seed.
        prompt_ids: The prompt; the repetition penalty counts its tokens, too.
        n_alternatives: Number of most likely tokens to report.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], *, n_alternatives: int
    ) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed)
        self._noise: Tensor | None = None  # of the next choice
        self._seen = sorted(set(prompt_ids)) if params.repetition_penalty != 1.0 else []
        self._n_alternatives = n_alternatives

    def choose(self, logits: Tensor) -> Choice:
        """Returns the next token.

        Args:
            logits: ``[V]``, the model's logits after the last token, any device.

        Raises:
            EngineError: If the logits hold NaN or infinity.
        """
        logits = on_cpu(logits)
        total = log_total(logits)
        token_id = int(self._scores(logits).argmax())
        self._noise = None
        if self._params.repetition_penalty != 1.0:
            self._seen.append(token_id)
        best = torch.topk(logits, min(self._n_alternatives, logits.shape[0]))
        return Choice(
            token_id=token_id,
            logprob=float(logits[token_id] - total),
            alternative_ids=best.indices.tolist(),
            alternative_logprobs=(best.values - total).tolist(),
        )

    def guess(self, logits: Tensor, n: int = 1) -> list[int]:
        """Returns the tokens that the next choice would most likely be, from other logits.

        The first is what ``choose`` would return for these logits. Nothing is used up: the next
        choice draws with the same noise.

        Args:
            logits: ``[V]``, another model's logits after the same tokens, finite.
            n: How many tokens to name.
        """
        scores = self._scores(on_cpu(logits))
        if n == 1:
            return [int(scores.argmax())]
        return [int(token) for token in torch.topk(scores, min(n, scores.shape[0])).indices]

    def _scores(self, logits: Tensor) -> Tensor:
        """Returns ``[V]`` of which the largest is the token drawn."""
        params = self._params
        if params.repetition_penalty != 1.0:
            logits = _penalised(logits, self._seen, params.repetition_penalty)
        if params.temperature == 0:
            return logits
        # The best logit becomes 0, so that no temperature, however small, overflows.
        logits = (logits - logits.max()) / params.temperature
        if params.top_k is not None and params.top_k < logits.shape[0]:
            least = torch.topk(logits, params.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if params.top_p < 1:
            logits = _nucleus(logits, params.top_p)
        # The exponential race draws from softmax(logits) with one noise value per token: two
        # distributions under the same noise agree as often as they can.
        if self._noise is None:
            noise = torch.empty_like(logits).exponential_(generator=self._generator)
            noise.clamp_(min=torch.finfo(noise.dtype).tiny)  # 0 would make a dropped token NaN
            self._noise = noise.log_()
        return logits - self._noise


def on_cpu(logits: Tensor) -> Tensor:
    """Returns logits on the CPU, where all sampling happens, in float32 (or float64)."""
    return logits.detach().to("cpu", torch.promote_types(logits.dtype, torch.float32))


def log_total(logits: Tensor) -> Tensor:
    """Returns what to take off logits ``[V]`` to have log-probabilities.

    Raises:
        EngineError: If the logits hold NaN or infinity (a token at -inf is allowed).
    """
    total = torch.logsumexp(logits, dim=-1)
    if not torch.isfinite(total):
        raise EngineError(
            "the model's logits are not finite (NaN or infinity)",
            hint="lower the global weight; if it happens at 1.0, an adapter or the base model is "
            "damaged or overflows in its dtype: load it in float32",
        )
    return total


def logprob_of(logits: Tensor, token_id: int) -> float:
    """Returns a token's natural log-probability under logits ``[V]``, any device.

    Raises:
        EngineError: If the logits hold NaN or infinity.
    """
    logits = on_cpu(logits)
    return float(logits[token_id] - log_total(logits))


def _penalised(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Source: CTRL (arXiv 1909.05858), as ``RepetitionPenaltyLogitsProcessor``."""
    index = torch.tensor(seen, dtype=torch.long)
    score = logits[index]
    return logits.index_put((index,), torch.where(score < 0, score * penalty, score / penalty))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches ``top_p``."""
    ordered = torch.sort(logits, descending=True, stable=True)
    probabilities = torch.softmax(ordered.values, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    return logits.masked_fill(
        torch.zeros_like(logits, dtype=torch.bool).scatter_(0, ordered.indices, before >= top_p),
        -torch.inf,
    )

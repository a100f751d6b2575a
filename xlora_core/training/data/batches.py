"""Token rows -> padded batches, in an order that a seed fixes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlora_core.errors import ConfigError
from xlora_core.training.data.encoding import IGNORE, Example

NO_DOMAIN = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded examples.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 0 on padding.
        labels: ``[B, T]`` int64, ``IGNORE`` outside the answers.
        domains: B lists of T domains, "" outside the answers and on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    domains: list[list[str]]

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on a device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            domains=self.domains,
        )

    def domain_indices(self, domains: Mapping[str, int]) -> Tensor:
        """Returns the index of each token's domain, int64 ``[B, T]``; ``NO_DOMAIN`` for none."""
        indices = [[domains.get(name, NO_DOMAIN) for name in row] for row in self.domains]
        return torch.tensor(indices, device=self.labels.device)


def pad_id(tokenizer: Any) -> int:
    """Returns the token id to pad with; padding is masked, so any will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in ids if i is not None))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pads examples on the right to one batch ``[B, T]``."""
    width = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full_like(input_ids, IGNORE)
    mask = torch.zeros_like(input_ids)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = torch.tensor(example.input_ids)
        labels[i, : len(example)] = torch.tensor(example.labels)
        mask[i, : len(example)] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        domains=[e.domains + [""] * (width - len(e)) for e in examples],
    )


def by_length(examples: Sequence[Example], rows: int) -> list[list[Example]]:
    """Returns all examples in groups of ``rows`` of similar length, so that little is padded."""
    ordered = sorted(examples, key=len)
    return [ordered[i : i + rows] for i in range(0, len(ordered), rows)]


def step_order(
    lengths: Sequence[int], rows: int, steps: int, *, seed: int = 0, window: int = 32
) -> list[list[int]]:
    """Returns the examples of each step: ``steps`` lists of ``rows`` indices of similar length.

    Examples are shuffled, sorted by length within windows of ``window`` steps (so that little
    is padded), and the steps of a window are shuffled again. A last, smaller window of an
    epoch is carried into the next one.

    Args:
        lengths: Length of each example in tokens.
        rows: Examples of a step.
        steps: How many steps to plan.
        seed: Seed of the order; nothing else enters it.
        window: Steps of a window.

    Raises:
        ConfigError: If there are fewer examples than a step has rows.
    """
    if len(lengths) < rows:
        raise ConfigError(
            f"a step has {rows} rows, but there are only {len(lengths)} examples",
            hint="give more rows, or ask for smaller steps with --rows and --accumulation",
        )
    rng = random.Random(seed)
    pool: list[int] = []
    order: list[list[int]] = []
    while True:
        pool += rng.sample(range(len(lengths)), len(lengths))
        while len(pool) >= rows:
            chunk, pool = pool[: rows * window], pool[rows * window :]
            chunk, rest = chunk[: len(chunk) // rows * rows], chunk[len(chunk) // rows * rows :]
            pool = rest + pool
            chunk.sort(key=lambda index: lengths[index])
            groups = [chunk[i : i + rows] for i in range(0, len(chunk), rows)]
            rng.shuffle(groups)
            order += groups
            if len(order) >= steps:
                return order[:steps]

"""A model's router as one linear layer, for a program that reads no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlora_core.bench.texts import QUESTIONS, prompt_of
from xlora_core.checkpoint import read_checkpoint
from xlora_core.engine.prompts import encode_prompt
from xlora_core.model import XLoraModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of each text that the layer is fitted to.
_N_TOKENS = 400
# A share of the hidden states' mean square: keeps the fit from following single tokens.
_RIDGE = 1e-4


def with_linear_router(
    model: XLoraModel,
    tokenizer: Any,
    base: PreTrainedModel,
    *,
    folder: Path,
    questions: Sequence[str] = QUESTIONS,
) -> XLoraModel:
    """Returns the model with the linear layer that is nearest to its router.

    Nearest in the squares of router logits, over the tokens of some texts.

    Args:
        model: A model with a classifier.
        tokenizer: Its tokenizer.
        base: Its base model, without experts.
        folder: A folder that does not exist yet, for its checkpoint.
        questions: What the texts end with.
    """
    weight, bias = _nearest_layer(*_read(model, tokenizer, questions))
    model.save_pretrained(folder)
    checkpoint = read_checkpoint(folder)
    config = replace(checkpoint.config, xlora_depth=1)
    linear = XLoraModel(base, config, checkpoint.adapters).eval()
    linear.classifier.load_state_dict({"layers.0.weight": weight, "layers.0.bias": bias})
    return linear


@torch.no_grad()
def _read(model: XLoraModel, tokenizer: Any, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns hidden states ``[N, H]`` and router logits ``[N, L * K]`` of all texts' tokens."""
    read: list[tuple[Tensor, Tensor]] = []
    hook = model.classifier.register_forward_hook(
        lambda _, inputs, logits: read.append((inputs[0].flatten(0, 1), logits.flatten(2)[0]))
    )
    size = int(1e9)
    with hook:
        for question in questions:
            prompt = prompt_of(tokenizer, question, _N_TOKENS)
            ids = encode_prompt(tokenizer, prompt, context_length=size, vocab_size=size).token_ids
            model.read_router(input_ids=torch.tensor([ids], device=model.device))
    hidden, logits = (torch.cat(parts) for parts in zip(*read, strict=True))
    return hidden, logits


def _nearest_layer(hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns weight ``[L * K, H]`` and bias ``[L * K]``."""
    hidden, logits = hidden.double(), logits.double()
    middle, mean = hidden.mean(0), logits.mean(0)
    hidden = hidden - middle
    squares = hidden.T @ hidden
    squares += _RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
    weight = torch.linalg.solve(squares, hidden.T @ (logits - mean)).T
    return weight, mean - weight @ middle

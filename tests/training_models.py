"""What tests of training share: a tokenizer of letters, rows, and short settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_base
from xlora_core.config import ExpertTrainConfig, RouterTrainConfig
from xlora_core.training.data import Example, Row, encode_rows
from xlora_core.training.progress import Progress

CHARACTERS = "abcdefghijklmnopqrstuvwxyzUA0123456789 .?\n"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U{{ m['content'] }}\nA"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% else %}{{ m['content'] }}<e>{% endif %}{% endfor %}"
)
PAD = 0
ROUTER = RouterTrainConfig(
    steps=6,
    rows=4,
    max_length=60,
    warmup_steps=1,
    dtype="float32",
    autocast=False,
    eval_every=3,
)
EXPERT = ExpertTrainConfig(
    domain="0",
    steps=6,
    rows=4,
    max_length=60,
    warmup_steps=1,
    rank=4,
    dtype="float32",
    autocast=False,
    eval_every=3,
)


def letter_tokenizer() -> Any:
    """A tokenizer of one token per letter, ids below the tiny models' vocabulary size."""
    vocab = {"<p>": 0, "<b>": 1, "<e>": 2, "<u>": 3}
    vocab |= {c: i for i, c in enumerate(CHARACTERS, start=4)}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<e>",
        pad_token="<p>",
        unk_token="<u>",
        chat_template=TEMPLATE,
    )


def row(user: str = "one?", assistant: str = "two", domain: str = "math") -> Row:
    return Row(domain=domain, id=user, user=user, assistant=assistant)


def examples(n: int = 16, domain: str = "0") -> list[Example]:
    rows = [row(f"{i}?", "abc" * (1 + i % 3), domain) for i in range(n)]
    return encode_rows(rows, letter_tokenizer(), 60)


def write_rows(path: Path, values: list[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


def tiny_base_folder(folder: Path) -> str:
    """Writes a tiny base model with its tokenizer."""
    tiny_base().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


class CallAt(Progress):
    """Calls something after the optimiser step of a number."""

    def __init__(self, step: int, call: Callable[[], object]) -> None:
        self.at = step
        self.call = call
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        if step == self.at:
            self.call()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}

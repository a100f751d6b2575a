"""A small real tokenizer, trained in-process, and a tiny random X-LoRA model that fits it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import families, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LINES = [
    "the quick brown fox jumps over the lazy dog",
    "user and assistant talk about the sum of two numbers",
    "def add(a, b): return a + b",
    "naïve café, 你好, 🙂 and more of the same",
]


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of about 320 tokens with a ChatML template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_chat_base(
    family: str = "llama", *, context_length: int = 128, seed: int = 0
) -> PreTrainedModel:
    """Returns a tiny random base model with the vocabulary of ``tiny_tokenizer``."""
    config = families()[family].config
    config.update(
        {
            "vocab_size": len(tiny_tokenizer()),
            "max_position_embeddings": context_length,
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer().eos_token_id,
            "pad_token_id": tiny_tokenizer().pad_token_id,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


EXPERTS = ("math", "code", "verse")


def write_chat_experts(folder: Path, family: str = "llama") -> dict[str, str]:
    """Writes random experts for ``tiny_chat_base``; returns name -> folder."""
    base = tiny_chat_base(family)
    targets = families()[family].targets
    return {
        name: str(write_lora(folder / name, base, targets, seed=i + 1))
        for i, name in enumerate(EXPERTS)
    }


def tiny_chat_xlora(
    folder: Path, family: str = "llama", *, context_length: int = 128, **config: object
) -> XLoraModel:
    """Returns a tiny X-LoRA model with three experts that routes visibly."""
    settings = {"layerwise_scalings": True} | config
    model = XLoraModel.from_base(
        tiny_chat_base(family, context_length=context_length),
        XLoraConfig(adapters=write_chat_experts(folder, family), **settings),  # type: ignore[arg-type]  # settings are XLoraConfig's
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()

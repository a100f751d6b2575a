"""Random models, adapters and tokenizers, for timings that depend on shapes alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

# Llama-like shapes by the number of parameters: hidden size, feed-forward size, blocks, heads,
# heads of keys and values, whether the head is tied to the embedding. "tiny" is for trying out.
_SHAPES = {
    "tiny": (64, 128, 2, 4, 2, True),
    "1b": (2048, 8192, 16, 32, 8, True),
    "3b": (3072, 8192, 28, 24, 8, True),
    "8b": (4096, 14336, 32, 32, 8, False),
}
SIZES = tuple(_SHAPES)
_VOCABULARY = {"tiny": 512}
_DEFAULT_VOCABULARY = 128_256


def random_llama(size: str, *, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Llama with random weights, made where it stays.

    Args:
        size: One of ``SIZES``.
        device: Where the weights are.
        dtype: Their dtype.
    """
    hidden, inner, blocks, heads, kv_heads, tied = _SHAPES[size]
    config = LlamaConfig(
        vocab_size=_VOCABULARY.get(size, _DEFAULT_VOCABULARY),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings: Any = model.generation_config
    settings.eos_token_id = []  # no answer ends by itself
    model.eval()
    return model


def number_tokenizer(n_tokens: int) -> Any:
    """Returns a tokenizer whose tokens are the numbers below ``n_tokens``, with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(n_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))  # noqa: S106  # text, no secret
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_numbers(n: int, n_tokens: int) -> str:
    """Returns a text of n tokens of ``number_tokenizer(n_tokens)``."""
    ids = torch.randint(n_tokens, (n,), generator=torch.Generator().manual_seed(0))
    return " ".join(map(str, ids.tolist()))


def random_xlora(
    base: PreTrainedModel, folder: str | Path, *, n_adapters: int, rank: int, strength: float
) -> XLoraModel:
    """Returns a base model with random experts in all its linear modules, and a random router.

    Args:
        base: The base model; its modules are replaced.
        folder: Where the experts are written.
        n_adapters: K.
        rank: Of every adapter.
        strength: Standard deviation of ``lora_B`` over that of ``lora_A``: how far the mixture is
            from its base, and so how often the base guesses its next token.
    """
    names = [str(i) for i in range(n_adapters)]
    adapters = {
        name: str(_write_adapter(Path(folder) / name, base, rank=rank, strength=strength, seed=i))
        for i, name in enumerate(names)
    }
    config = XLoraConfig(adapters=adapters, layerwise_scalings=True)
    model = XLoraModel.from_base(base, config).eval()
    with torch.no_grad():  # that of a fresh classifier is too even to route visibly
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
    return model


def _write_adapter(
    folder: Path, base: PreTrainedModel, *, rank: int, strength: float, seed: int
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = _linear_modules(base)
    tensors = {}
    for path, module in modules.items():
        key = f"base_model.model.{path}.lora_"
        spread = module.in_features**-0.5
        A = torch.randn(rank, module.in_features, generator=generator) * spread
        B = torch.randn(module.out_features, rank, generator=generator) * spread * strength
        tensors[f"{key}A.weight"] = A.to(base.dtype)
        tensors[f"{key}B.weight"] = B.to(base.dtype)
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _linear_modules(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """Returns the linear modules by path, without the language model's head."""
    head = base.get_output_embeddings()
    return {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def n_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Returns the memory of tensors, each counted once, in bytes."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

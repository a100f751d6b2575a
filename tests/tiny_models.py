"""Tiny random models and adapters, built, never downloaded. All experts have non-zero lora_B."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from xlora_core.config import XLoraConfig
from xlora_core.layers import linear_features
from xlora_core.model import XLoraModel

VOCAB_SIZE = 97
HIDDEN_SIZE = 32
CONTEXT_LENGTH = 128
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT_LENGTH,
} | _TOKENS


@dataclass(frozen=True)
class Family:
    """An architecture: how to make a tiny one, and which modules an adapter targets in it."""

    config: PretrainedConfig
    targets: tuple[str, ...]


def families() -> dict[str, Family]:
    """Returns one tiny config per architecture, fresh at each call."""
    return {
        "llama": Family(
            LlamaConfig(**_LLAMA_LIKE),
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        "gpt2": Family(
            GPT2Config(
                vocab_size=VOCAB_SIZE,
                n_embd=HIDDEN_SIZE,
                n_layer=2,
                n_head=4,
                n_positions=CONTEXT_LENGTH,
                **_TOKENS,
            ),
            ("c_attn", "c_proj", "c_fc"),
        ),
        "opt": Family(
            OPTConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=HIDDEN_SIZE,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                word_embed_proj_dim=HIDDEN_SIZE,
                **_TOKENS,
            ),
            ("q_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ),
        "gemma": Family(GemmaConfig(**_LLAMA_LIKE), ("q_proj", "v_proj", "down_proj")),
        "qwen2": Family(
            Qwen2Config(**{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}),
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        ),
        "gpt_neox": Family(
            GPTNeoXConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=HIDDEN_SIZE,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                **_TOKENS,
            ),
            ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        ),
    }


def tiny_base(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Returns a tiny random base model; the same weights for the same seed and dtype."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(families()[family].config)
    with torch.no_grad():
        # The default initialisation is so small that all logits are alike.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def write_lora(
    folder: Path,
    base: nn.Module,
    targets: Sequence[str],
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    b_scale: float = 0.1,
    config: Mapping[str, object] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a random LoRA in PEFT's folder format for the modules whose name ends so.

    ``extra`` are further tensors of the file, by their names without PEFT's prefix.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in base.named_modules():
        if path.rpartition(".")[2] in targets:
            out_features, in_features = linear_features(module)
            key = f"base_model.model.{path}.lora_"
            lora_A = torch.randn(rank, in_features, generator=generator) * 0.2
            lora_B = torch.randn(out_features, rank, generator=generator) * b_scale
            tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = (
                lora_A.to(dtype),
                lora_B.to(dtype),
            )
    for name, tensor in (extra or {}).items():
        tensors[f"base_model.model.{name}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": "c_attn" in targets or "c_fc" in targets,
    }
    settings.update(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_experts(
    folder: Path, family: str = "llama", n_adapters: int = 3, **options: object
) -> dict[str, str]:
    """Writes n experts named "0", "1", ... for a family's targets; returns name -> folder."""
    base = tiny_base(family)
    targets = families()[family].targets
    return {
        str(i): str(write_lora(folder / f"expert-{i}", base, targets, seed=i + 1, **options))  # type: ignore[arg-type]  # options are write_lora's
        for i in range(n_adapters)
    }


def tiny_xlora(
    folder: Path,
    family: str = "llama",
    *,
    n_adapters: int = 3,
    dtype: torch.dtype = torch.float32,
    classifier_scale: float = 2.0,
    **config: object,
) -> XLoraModel:
    """Returns a tiny X-LoRA model whose classifier routes visibly (not near uniform)."""
    adapters = write_experts(folder, family, n_adapters)
    settings = {"layerwise_scalings": True, "xlora_size": 16} | config
    model = XLoraModel.from_base(
        tiny_base(family, dtype=dtype),
        XLoraConfig(adapters=adapters, **settings),  # type: ignore[arg-type]  # settings are XLoraConfig's
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, classifier_scale / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny_prompt(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Returns random token ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)

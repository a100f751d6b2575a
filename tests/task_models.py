"""Tiny models of other kinds than causal language models, with adapters that PEFT itself wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)

VOCAB_SIZE, HIDDEN_SIZE, N_LABELS = 97, 32, 3
_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "pad_token_id": 0}


@dataclass(frozen=True)
class Task:
    """A model, what an adapter of it targets, and an input.

    Attributes:
        build: Makes the model; random, the caller seeds.
        targets: ``target_modules`` of the adapters, a list or a pattern.
        inputs: Arguments of forward, batch of 3.
        labels: For the loss.
        lora: Further fields of PEFT's ``LoraConfig``.
    """

    build: Callable[[], PreTrainedModel]
    targets: Sequence[str] | str
    inputs: Callable[[], dict[str, Tensor]]
    labels: Tensor | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)


def _bert(labels: int | None = None) -> BertConfig:
    return BertConfig(**_TEXT, **({} if labels is None else {"num_labels": labels}))


def llama_config(**fields: object) -> LlamaConfig:
    """Returns a tiny decoder's config."""
    return LlamaConfig(**_TEXT, bos_token_id=1, eos_token_id=2, **fields)


def text() -> dict[str, Tensor]:
    """Returns three texts, two of them padded on the right."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    ids = torch.randint(3, VOCAB_SIZE, (3, 7), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def images() -> dict[str, Tensor]:
    """Returns three images of random pixels."""
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)}


def _causal(config: Any) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_config(config)


TASKS: dict[str, Task] = {
    "bare encoder": Task(lambda: BertModel(_bert()), ["query", "value", "dense"], text),
    "masked language model": Task(
        lambda: BertForMaskedLM(_bert()), ["query", "value"], text, text()["input_ids"]
    ),
    "encoder with a classification head": Task(
        lambda: AutoModelForSequenceClassification.from_config(_bert(N_LABELS)),
        r".*(query|value|pooler\.dense)",
        text,
        torch.tensor([0, 2, 1]),
        {"task_type": "SEQ_CLS"},
    ),
    "decoder with a classification head": Task(
        lambda: AutoModelForSequenceClassification.from_config(llama_config(num_labels=N_LABELS)),
        ["q_proj", "v_proj"],
        text,
        torch.tensor([0, 2, 1]),
        {"task_type": "SEQ_CLS"},
    ),
    "image classifier with an adapted convolution": Task(
        lambda: AutoModelForImageClassification.from_config(
            ViTConfig(**_SIZES, image_size=16, patch_size=4, num_labels=N_LABELS)
        ),
        ["q_proj", "v_proj", "projection"],
        images,
        torch.tensor([0, 2, 1]),
    ),
    "adapted embedding": Task(_causal(llama_config()), ["embed_tokens", "q_proj"], text),
    "adapted embedding that scales its output": Task(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**_TEXT, num_key_value_heads=2, head_dim=8, layer_types=None)
        ),
        ["embed_tokens", "q_proj"],
        text,
    ),
    "tied embedding and head, both adapted": Task(
        _causal(llama_config(tie_word_embeddings=True)), ["embed_tokens", "lm_head", "q_proj"], text
    ),
    "adapted positions": Task(
        lambda: BertForMaskedLM(_bert()), ["position_embeddings", "query"], text
    ),
    "bias on lora_B": Task(
        lambda: BertForMaskedLM(_bert()), ["query", "dense"], text, lora={"lora_bias": True}
    ),
    "wholly trained embedding": Task(
        _causal(llama_config()), ["q_proj"], text, lora={"modules_to_save": ["embed_tokens"]}
    ),
}


def task_base(name: str, seed: int = 0) -> PreTrainedModel:
    """Returns a task's model in float64, random weights large enough to matter."""
    torch.manual_seed(seed)
    model = TASKS[name].build()
    # The models of a task share a config, and saving one writes its dtype there.
    model.config = copy.deepcopy(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
            elif parameter.abs().max() == 0:  # biases
                parameter.normal_(0, 0.1)
    return model.double().eval()


def peft_lora(name: str, seed: int) -> Any:
    """Returns PEFT's plain LoRA over a task's model, all its weights random."""
    task = TASKS[name]
    model = get_peft_model(
        task_base(name),
        LoraConfig(r=4, lora_alpha=8, target_modules=task.targets, **task.lora),
        autocast_adapter_dtype=False,
    )
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.normal_(0, 0.2)
    return model.eval()


def peft_experts(folder: Path, name: str, n: int = 3) -> dict[str, str]:
    """Writes n of those adapters with PEFT; returns "e0", "e1", ... -> folder."""
    paths = {f"e{seed}": folder / f"expert-{seed}" for seed in range(n)}
    for seed, path in enumerate(paths.values()):
        peft_lora(name, seed).save_pretrained(str(path))
    return {expert: str(path) for expert, path in paths.items()}

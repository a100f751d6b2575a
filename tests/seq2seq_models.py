"""Tiny random encoder-decoders with adapters, and the routed mixture worked out by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

_COMMON = {"vocab_size": VOCAB_SIZE, "d_model": HIDDEN_SIZE, "pad_token_id": 0, "eos_token_id": 2}


@dataclass(frozen=True)
class Seq2SeqFamily:
    """An architecture.

    Attributes:
        build: Makes a tiny model; random, the caller seeds.
        targets: What an adapter targets.
        reads_source: Whether a module, by its path, reads the source's tokens.
        start: Token that the decoder starts with.
    """

    build: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    reads_source: Callable[[str], bool]
    start: int


def t5() -> PreTrainedModel:
    config = T5Config(
        **_COMMON, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def bart() -> PreTrainedModel:
    config = BartConfig(
        **_COMMON,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        bos_token_id=1,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


FAMILIES = {
    "t5": Seq2SeqFamily(
        t5,
        ("q", "k", "v", "o", "wi", "wo"),
        lambda path: (
            path.startswith("encoder.") or path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        ),
        start=0,
    ),
    "bart": Seq2SeqFamily(
        bart,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        lambda path: (
            path.startswith("model.encoder.")
            or path.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        ),
        start=2,
    ),
}


def tiny_seq2seq(
    family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """Returns a tiny random base model; the same weights for the same seed and dtype."""
    torch.manual_seed(seed)
    model = FAMILIES[family].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def write_seq2seq_experts(folder: Path, family: str, n_adapters: int = 3) -> dict[str, str]:
    """Writes n experts named "e0", "e1", ...; returns name -> folder."""
    base = tiny_seq2seq(family)
    targets = FAMILIES[family].targets
    return {
        f"e{i}": str(write_lora(folder / f"e{i}", base, targets, seed=i + 1))
        for i in range(n_adapters)
    }


def randomise(model: XLoraModel, scale: float = 2.0) -> XLoraModel:
    """Gives the classifier weights that route visibly (not near uniform)."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
    return model.eval()


def seq2seq_xlora(
    folder: Path,
    family: str,
    *,
    n_adapters: int = 3,
    dtype: torch.dtype = torch.float64,
    **config: object,
) -> XLoraModel:
    """Returns a tiny X-LoRA model over an encoder-decoder; its experts are in ``folder``."""
    settings = {"layerwise_scalings": True} | config
    model = XLoraModel.from_base(
        tiny_seq2seq(family, dtype=dtype),
        XLoraConfig(adapters=write_seq2seq_experts(folder, family, n_adapters), **settings),  # type: ignore[arg-type]  # settings are XLoraConfig's
    )
    return randomise(model)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Returns random token ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


# ---------------------------------------------------------------- the mixture by hand


@dataclass(frozen=True)
class ByHand:
    """What the routed model yields.

    Attributes:
        loss: Of the labels.
        logits: ``[B, T, V]``.
        source: Scalings of the source's tokens, ``[B, S, L, K]``.
        target: Of the target's, ``[B, T, L, K]``.
    """

    loss: Tensor
    logits: Tensor
    source: Tensor
    target: Tensor


def run_by_hand(
    model: XLoraModel,
    family: str,
    source: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    route: Callable[[Tensor], Tensor] = lambda scalings: scalings,
    constant: float = 0.0,
) -> ByHand:
    """Runs a plain base model twice, with the experts added from outside, one by one.

    It shares no code with ``XLoraModel``: which side a module follows is read off its name, and
    the experts off their files.

    Args:
        model: The model in question; only its classifier's weights and experts' folders are used.
        family: Its base model's.
        source: ``[B, S]``.
        labels: ``[B, T]``, -100 where no loss is wanted.
        mask: ``[B, S]``.
        route: What top-k, global weight and the like make of scalings.
        constant: The scaling pass's scaling of every expert.
    """
    base, kind = tiny_seq2seq(family), FAMILIES[family]
    started = torch.full_like(labels[:, :1], kind.start)
    shifted = torch.cat([started, labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], dim=1)
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": shifted}
    experts = [
        (
            load_file(Path(folder) / "adapter_model.safetensors"),
            json.loads((Path(folder) / "adapter_config.json").read_text()),
        )
        for folder in model.config_xlora.adapters.values()
    ]
    paths = [p for p, _ in base.named_modules() if p.rpartition(".")[2] in kind.targets]
    of_module: dict[str, Tensor] = {}

    def add(path: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            for k, (weights, config) in enumerate(experts):
                key = f"base_model.model.{path}.lora_"
                A, B = (weights[f"{key}{name}.weight"].double() for name in "AB")
                share = of_module[path][..., k, None]
                y = y + config["lora_alpha"] / config["r"] * share * (args[0] @ A.T @ B.T)
            return y

        return hook

    for path in paths:
        base.get_submodule(path).register_forward_hook(add(path))
        of_module[path] = torch.full((1, 1, len(experts)), constant, dtype=torch.float64)
    with torch.no_grad():
        first = base(**inputs, output_hidden_states=True, use_cache=False)
    sides = []
    for hidden in (first.encoder_last_hidden_state, first.decoder_hidden_states[-1]):
        logits = model.classifier.layers(hidden)
        logits = logits.reshape(*hidden.shape[:2], -1, len(experts))
        sides.append(logits.softmax(-1).expand(-1, -1, len(paths), -1))
    for index, path in enumerate(paths):
        of_module[path] = route(sides[0 if kind.reads_source(path) else 1])[:, :, index]
    logits = base(**inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return ByHand(loss, logits, *sides)


def one_per_family(factory: pytest.TempPathFactory) -> Callable[[str], XLoraModel]:
    """Returns a maker of one float64 model per family, for tests that do not change it."""
    return functools.cache(lambda family: seq2seq_xlora(factory.mktemp(family), family))

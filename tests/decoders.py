"""Tiny decoders of many architectures, and how their rows are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.tiny_models import CONTEXT_LENGTH, HIDDEN_SIZE, VOCAB_SIZE, families, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

WINDOW = 5
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
} | _TOKENS
_LLAMA_LIKE = _WIDE | {"head_dim": 8}
_GPT_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": HIDDEN_SIZE,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT_LENGTH,
} | _TOKENS
_FALCON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
} | _TOKENS
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
_Q_AND_V = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Decoder:
    """An architecture.

    Attributes:
        config: How to make a tiny one.
        targets: What an adapter targets.
        masks: In which form its modules are told what a row sees: ``explicit`` or ``padding``.
        tolerance: Of equality in float64; more where the architecture computes in float32.
    """

    config: PretrainedConfig
    targets: tuple[str, ...]
    masks: str = "explicit"
    tolerance: float = 1e-9


def decoders() -> dict[str, Decoder]:
    """Returns every architecture whose rows are read, fresh configs at each call."""
    known = {name: Decoder(family.config, family.targets) for name, family in families().items()}
    return known | {
        "phi": Decoder(hf.PhiConfig(**_WIDE), ("q_proj", "v_proj", "fc1")),
        "phi3": Decoder(hf.Phi3Config(**_WIDE, sliding_window=WINDOW), ("qkv_proj", "o_proj")),
        "gemma2": Decoder(hf.Gemma2Config(**_LLAMA_LIKE, sliding_window=WINDOW), _Q_AND_V),
        "gemma3": Decoder(hf.Gemma3TextConfig(**_LLAMA_LIKE, sliding_window=WINDOW), _Q_AND_V),
        "qwen2_window": Decoder(
            hf.Qwen2Config(
                **_WIDE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
            ),
            _Q_AND_V,
        ),
        "qwen3": Decoder(hf.Qwen3Config(**_LLAMA_LIKE), _Q_AND_V),
        "mistral_window": Decoder(
            hf.MistralConfig(**_LLAMA_LIKE, sliding_window=WINDOW), ("q_proj", "down_proj")
        ),
        "mixtral": Decoder(
            hf.MixtralConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2), _Q_AND_V
        ),
        "gpt_oss": Decoder(
            hf.GptOssConfig(
                **_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
            ),
            _Q_AND_V,
        ),
        "falcon": Decoder(hf.FalconConfig(**_FALCON), ("query_key_value", "dense")),
        "falcon_alibi": Decoder(
            hf.FalconConfig(**_FALCON, alibi=True), ("query_key_value", "dense"), "padding"
        ),
        "bloom": Decoder(
            hf.BloomConfig(
                vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, n_layer=2, n_head=4, **_TOKENS
            ),
            ("query_key_value", "dense_h_to_4h"),
            "padding",
        ),
        "mpt": Decoder(
            hf.MptConfig(
                vocab_size=VOCAB_SIZE,
                d_model=HIDDEN_SIZE,
                n_layers=2,
                n_heads=4,
                max_seq_len=CONTEXT_LENGTH,
            ),
            ("Wqkv", "out_proj"),
            "padding",
            tolerance=1e-5,
        ),
        "gptj": Decoder(hf.GPTJConfig(**_GPT_LIKE, rotary_dim=4), _Q_AND_V, tolerance=1e-5),
        "gpt_bigcode": Decoder(hf.GPTBigCodeConfig(**_GPT_LIKE), ("c_attn",)),
        "stablelm": Decoder(hf.StableLmConfig(**_WIDE), _Q_AND_V),
        "cohere": Decoder(hf.CohereConfig(**_WIDE, logit_scale=0.3), _Q_AND_V),
        "granite": Decoder(hf.GraniteConfig(**_WIDE, logits_scaling=3.0), _Q_AND_V),
    }


def refused_decoders() -> dict[str, tuple[Decoder, str]]:
    """Returns architectures whose texts are read one by one, and a part of what the log says."""
    return {
        # Its windows are its own and count from the end of the longest row.
        "gpt_neo": (
            Decoder(
                hf.GPTNeoConfig(
                    vocab_size=VOCAB_SIZE,
                    hidden_size=HIDDEN_SIZE,
                    num_layers=2,
                    num_heads=4,
                    max_position_embeddings=CONTEXT_LENGTH,
                    window_size=WINDOW,
                    attention_types=[[["global", "local"], 1]],
                    **_TOKENS,
                ),
                _Q_AND_V,
            ),
            "differ from the model's own",
        ),
        "mamba": (
            Decoder(
                hf.MambaConfig(
                    vocab_size=VOCAB_SIZE,
                    hidden_size=HIDDEN_SIZE,
                    num_hidden_layers=2,
                    state_size=4,
                    **_TOKENS,
                ),
                ("in_proj",),
            ),
            "LinearAttentionLayer",
        ),
        "recurrent_gemma": (
            Decoder(
                hf.RecurrentGemmaConfig(
                    vocab_size=VOCAB_SIZE,
                    hidden_size=HIDDEN_SIZE,
                    num_hidden_layers=3,
                    intermediate_size=48,
                    num_attention_heads=4,
                    lru_width=HIDDEN_SIZE,
                    **_TOKENS,
                ),
                ("q_proj",),
            ),
            "LinearAttentionLayer",
        ),
        "dynamic_rope": (
            Decoder(
                hf.GemmaConfig(
                    **_LLAMA_LIKE,
                    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                ),
                _Q_AND_V,
            ),
            "depend on how long a text is",
        ),
        "shared_keys": (
            Decoder(
                hf.Gemma3nTextConfig(
                    **(_LLAMA_LIKE | {"num_hidden_layers": 4}),
                    hidden_size_per_layer_input=8,
                    vocab_size_per_layer_input=VOCAB_SIZE,
                    num_kv_shared_layers=2,
                    sliding_window=WINDOW,
                    layer_types=["sliding_attention", "full_attention"] * 2,
                    laurel_rank=4,
                ),
                ("q_proj",),
            ),
            "DummyLayer",
        ),
    }


def longrope_decoder() -> Decoder:
    """Returns an architecture whose rotary frequencies change at 16 tokens."""
    return Decoder(
        hf.Phi3Config(**_WIDE, original_max_position_embeddings=16, rope_parameters=_LONGROPE),
        ("qkv_proj", "o_proj"),
    )


def decoder_xlora(
    folder: Path,
    decoder: Decoder,
    *,
    n_adapters: int = 2,
    dtype: torch.dtype = torch.float64,
    extra_targets: Sequence[str] = (),
) -> XLoraModel:
    """Returns a random X-LoRA model of an architecture, which routes visibly."""
    torch.manual_seed(0)
    # The fast products of a mixture of experts have no float64.
    base = AutoModelForCausalLM.from_config(decoder.config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    adapters = {
        str(i): str(
            write_lora(folder / str(i), base, (*decoder.targets, *extra_targets), seed=i + 1)
        )
        for i in range(n_adapters)
    }
    model = XLoraModel.from_base(
        base.to(dtype).eval(), XLoraConfig(adapters=adapters, layerwise_scalings=True)
    )
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    return model.eval()

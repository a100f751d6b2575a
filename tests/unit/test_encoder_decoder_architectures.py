"""The architectures that docs/encoder-decoder.md names: what runs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from tests.seq2seq_models import randomise, tokens
from tests.tiny_models import write_lora
from xlora_core.config import XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STARTED = IDS | {"decoder_start_token_id": 2}
SIDES = ("encoder", "decoder")
LAYERS = {f"{side}_layers": 1 for side in SIDES} | {f"{side}_ffn_dim": 16 for side in SIDES}
BART_LIKE = STARTED | LAYERS | {"d_model": 16} | {f"{side}_attention_heads": 2 for side in SIDES}
T5_LIKE = STARTED | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BERT = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BART_TARGETS, T5_TARGETS = ("q_proj", "k_proj", "v_proj", "fc1"), ("q", "k", "v", "wo")
NEAR = {"atol": 1e-11, "rtol": 1e-9}


def t5gemma() -> hf.PreTrainedModel:
    side = BERT | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4} | IDS
    return hf.T5GemmaForConditionalGeneration(
        hf.T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=97)
    )


def bert_to_bert() -> hf.PreTrainedModel:
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        hf.BertConfig(**BERT), hf.BertConfig(**BERT)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.EncoderDecoderModel(config)


def whisper() -> hf.PreTrainedModel:
    sizes = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 20}
    unset = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**BART_LIKE, **sizes, **unset))


def made(name: str, config: str, **fields: Any) -> Callable[[], hf.PreTrainedModel]:
    return lambda: getattr(hf, name)(getattr(hf, config)(**fields))


def bart_like(name: str, config: str) -> tuple[Callable[[], hf.PreTrainedModel], tuple[str, ...]]:
    return made(name, config, **BART_LIKE, max_position_embeddings=32), BART_TARGETS


def t5_like(name: str, config: str) -> tuple[Callable[[], hf.PreTrainedModel], tuple[str, ...]]:
    return made(name, config, **T5_LIKE), T5_TARGETS


RUN = {
    "mbart": bart_like("MBartForConditionalGeneration", "MBartConfig"),
    "marian": bart_like("MarianMTModel", "MarianConfig"),
    "pegasus": bart_like("PegasusForConditionalGeneration", "PegasusConfig"),
    "blenderbot": bart_like("BlenderbotForConditionalGeneration", "BlenderbotConfig"),
    "m2m100": bart_like("M2M100ForConditionalGeneration", "M2M100Config"),
    "mt5": t5_like("MT5ForConditionalGeneration", "MT5Config"),
    "umt5": t5_like("UMT5ForConditionalGeneration", "UMT5Config"),
    "longt5": t5_like("LongT5ForConditionalGeneration", "LongT5Config"),
    "t5gemma": (t5gemma, ("q_proj", "k_proj", "v_proj", "down_proj")),
    "bert to bert": (bert_to_bert, ("query", "key", "value", "dense")),
    "whisper": (whisper, BART_TARGETS),
}
# How the keys and values of cross-attention are called.
CROSS = ("encoder_attn.", "EncDecAttention.", "cross_attn.", "crossattention.self.")
KEYS_AND_VALUES = (".k", ".v", "k_proj", "v_proj", ".key", ".value")


def tiny(build: Callable[[], hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    base = build().double().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return base


def xlora(
    folder: Path, build: Callable[[], hf.PreTrainedModel], targets: tuple[str, ...]
) -> XLoraModel:
    adapters = {
        f"e{i}": str(write_lora(folder / f"e{i}", tiny(build), targets, seed=i)) for i in range(2)
    }
    config = XLoraConfig(adapters=adapters, layerwise_scalings=True)
    return randomise(XLoraModel.from_base(tiny(build), config))


def a_source(architecture: str) -> dict[str, Tensor]:
    if architecture != "whisper":
        return {"input_ids": tokens(2, 4)}
    generator = torch.Generator().manual_seed(0)
    return {"input_features": torch.randn(2, 8, 12, dtype=torch.float64, generator=generator)}


@pytest.mark.parametrize("architecture", RUN)
def test_keys_and_values_of_cross_attention_follow_the_source(
    tmp_path: Path, architecture: str
) -> None:
    model = xlora(tmp_path, *RUN[architecture])
    inputs = a_source(architecture) | {"labels": tokens(2, 4, seed=1)}
    changed: dict[str, set[str]] = {}
    expected = model(**inputs).logits
    routed = model.scaling_pass(**inputs)
    target, source = (
        model.route(logits) for logits in (routed.router_logits, routed.encoder_router_logits)
    )
    encoded = model.encode(**a_source(architecture))
    labels = {"labels": inputs["labels"], "encoder_outputs": encoded}
    again = model.main_pass(scalings=target, encoder_scalings=source, **labels).logits
    torch.testing.assert_close(again, expected, **NEAR)
    # Which modules of the decoder change what it says when one side's scalings change?
    for side in ("source", "target"):
        changed[side] = set()
        for index, path in enumerate(model.lora_layer_names):
            bumped = {"source": source, "target": target}
            bumped[side] = bumped[side].clone()
            bumped[side][:, :, index] += 1.0
            logits = model.main_pass(
                scalings=bumped["target"], encoder_scalings=bumped["source"], **labels
            ).logits
            if (logits - expected).abs().max() > 1e-9:
                changed[side].add(path)
    crossing = {
        path
        for path in model.lora_layer_names
        if any(f".{name}" in path for name in CROSS) and path.endswith(KEYS_AND_VALUES)
    }
    assert len(crossing) == 2
    assert changed["source"] == crossing
    of_encoder = {p for p in model.lora_layer_names if "decoder." not in p}
    assert changed["target"] == set(model.lora_layer_names) - of_encoder - crossing


@pytest.mark.parametrize("architecture", [name for name in RUN if name != "whisper"])
def test_cached_is_uncached(tmp_path: Path, architecture: str) -> None:
    model = xlora(tmp_path, *RUN[architecture])
    cached, uncached = (
        model.generate(
            **a_source(architecture),
            max_new_tokens=5,
            num_beams=2,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert cached.shape[1] == 6
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("architecture", RUN)
def test_a_constant_mixture_is_the_merged_model(tmp_path: Path, architecture: str) -> None:
    model = xlora(tmp_path, *RUN[architecture])
    inputs = a_source(architecture) | {"labels": tokens(2, 4, seed=1)}
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    expected = model.main_pass(scalings=weights, **inputs).logits
    merged = model.merge_and_unload(weights.tolist())(**inputs).logits
    torch.testing.assert_close(expected, merged, **NEAR)


def test_a_decoder_that_reads_several_streams_is_refused_when_it_runs(tmp_path: Path) -> None:
    sides = {
        f"num_{side}_{name}": n
        for side in SIDES
        for name, n in (("layers", 1), ("attention_heads", 2))
    }
    build = made(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        **STARTED,
        **sides,
        hidden_size=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = xlora(tmp_path, build, ("query_proj",))
    with pytest.raises(ModelError, match=r"prophetnet\.decoder\.layers\.0\.self_attn\.query_proj"):
        model(input_ids=tokens(1, 4), labels=tokens(1, 3))


def test_an_encoder_that_reads_windows_is_refused_when_it_runs(tmp_path: Path) -> None:
    build = made(
        "LEDForConditionalGeneration",
        "LEDConfig",
        **BART_LIKE,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        attention_window=4,
    )
    model = xlora(tmp_path, build, ("query",))
    with pytest.raises(ModelError, match=r"adapted module .* got input of shape \[4, 2, 16\]"):
        model(input_ids=tokens(2, 4), labels=tokens(2, 3))


def test_a_decoder_that_wants_more_of_its_encoder_is_refused_at_once(tmp_path: Path) -> None:
    sparse = {f"num_sparse_{side}_layers": 0 for side in SIDES}
    build = made(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        **T5_LIKE,
        **sparse,
        num_decoder_layers=1,
    )
    with pytest.raises(ModelError, match="cannot be run on an encoder's output: .*router_logits"):
        xlora(tmp_path, build, ("q",))

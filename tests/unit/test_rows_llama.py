"""The fast step for Llama-shaped models: whose it is, what it does to them, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.gated_models import gated_xlora
from tests.row_texts import assert_as_alone, random_text, read_on
from tests.tiny_models import CONTEXT_LENGTH, families, tiny_prompt, tiny_xlora, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch, Segment
from xlora_core.rows.llama import LlamaRows

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
FITTING = {
    "llama": hf.LlamaConfig(**SHAPE),
    "tied": hf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "one_kv_head": hf.LlamaConfig(**SHAPE | {"num_key_value_heads": 1}),
    "biases": hf.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama3_rope": hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "yarn_rope": hf.LlamaConfig(**SHAPE, rope_parameters=YARN_ROPE),
    "mistral": hf.MistralConfig(**SHAPE, sliding_window=None),
    "mistral_wide_window": hf.MistralConfig(**SHAPE, sliding_window=CONTEXT_LENGTH),
    "qwen2": hf.Qwen2Config(**SHAPE),
    "qwen3": hf.Qwen3Config(**SHAPE),
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
NOT_FITTING = {
    "gemma": hf.GemmaConfig(**SHAPE),
    "mistral_window": hf.MistralConfig(**SHAPE, sliding_window=5),
    "qwen2_window": hf.Qwen2Config(**SHAPE, **WINDOW),
    "qwen3_window": hf.Qwen3Config(**SHAPE, **WINDOW),
    "dynamic_rope": hf.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
}


def uneven_xlora(folder: Path, config: PretrainedConfig, **settings: object) -> XLoraModel:
    """Returns a float64 model whose experts differ in rank, targets and kind of scaling."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.3)
    base = base.to(torch.float64).eval()
    everything = families()["llama"].targets
    adapters = {
        "all": write_lora(folder / "all", base, everything, rank=2, seed=1),
        "some": write_lora(
            folder / "some",
            base,
            ("k_proj", "up_proj"),
            rank=5,
            seed=2,
            config={"use_rslora": True},
        ),
        "other": write_lora(folder / "other", base, ("q_proj", "down_proj"), rank=3, seed=3),
    }
    # Of the second expert alone, to have modules without any.
    names = settings.pop("adapters", list(adapters))
    assert isinstance(names, list)
    model = XLoraModel.from_base(
        base,
        XLoraConfig(
            adapters={name: str(adapters[name]) for name in names},
            **{"layerwise_scalings": True} | settings,  # type: ignore[arg-type]  # XLoraConfig's
        ),
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


# ---------------------------------------------------------------- its numbers


@pytest.mark.parametrize("adapters", [["all", "some", "other"], ["some"]], ids=["three", "one"])
@pytest.mark.parametrize("name", sorted(FITTING))
def test_mixed_batches_are_each_text_alone(tmp_path: Path, name: str, adapters: list[str]) -> None:
    """Chunks, single tokens, siblings, rows used again and a cache that grows, all at once."""
    model = uneven_xlora(tmp_path, FITTING[name], adapters=adapters)
    reader = LlamaRows(model)
    adapted = random_text(model, 2, 20, adapted=True, seed=1)
    plain = random_text(model, 0, 14, adapted=False, seed=2)
    short = random_text(model, 3, 4, adapted=True, seed=3)
    read_on(reader, [(plain, 9)])
    read_on(reader, [(plain, 1), (adapted, 7)])
    read_on(reader, [(adapted, 1), (plain, 1), (short, 3)], n_wrong=2)
    read_on(reader, [(short, 1), (adapted, 1)])
    assert_as_alone(model, reader, short, 1e-10)
    again = random_text(model, 3, 3, adapted=False, seed=4)
    read_on(reader, [(again, 2), (adapted, 9)], n_wrong=1)
    read_on(reader, [(again, 1), (plain, 1), (adapted, 1)], n_wrong=1)
    read_on(reader, [(adapted, 1), (plain, 2)])
    for text in (adapted, plain, again):
        assert_as_alone(model, reader, text, 1e-10)


def test_one_set_of_scalings_serves_all_modules(model: XLoraModel) -> None:
    ids = tiny_prompt(1, 6)[0]
    scalings = torch.rand(6, 1, 3, dtype=torch.float64)
    reader = LlamaRows(model)
    reader.cache.grow(1, 6)
    hidden = reader.read(
        RowBatch(token_ids=ids, segments=[Segment(row=0, start=0, n=6)], scalings=scalings)
    )
    expected = model.main_pass(scalings=scalings[None], input_ids=ids[None]).logits[0]
    torch.testing.assert_close(reader.logits(hidden), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "lengths",
    [
        {5: 3, 0: 90, 1: 88, 3: 4, 6: 70, 4: 89, 2: 2},
        {4: 8, 0: 9, 2: 7},
        {1: 5, 3: 5},
        {0: 6, 1: 6, 2: 6},
    ],
    ids=["far_apart", "every_second", "alike", "one_after_another"],
)
def test_rows_in_any_order_and_of_any_length(model: XLoraModel, lengths: dict[int, int]) -> None:
    """Row -> length: rows that attend in one call, and rows that cannot."""
    reader = LlamaRows(model)
    texts = [
        random_text(model, row, n, adapted=row % 2 == 0, seed=row) for row, n in lengths.items()
    ]
    read_on(reader, [(text, text.n_left - 1) for text in texts])
    read_on(reader, [(text, 1) for text in texts])
    for text in texts:
        assert_as_alone(model, reader, text, 1e-10)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 8, 9, 17])
def test_float32_chooses_the_tokens_of_float64(tmp_path: Path, n_rows: int) -> None:
    """Few and many rows are computed in different ways; each is greedy decoding."""
    wide = tiny_xlora(tmp_path / "64", dtype=torch.float64)
    narrow = tiny_xlora(tmp_path / "32")
    readers = [LlamaRows(wide), LlamaRows(narrow)]
    chosen = []
    for reader, model in zip(readers, (wide, narrow), strict=True):
        texts = [
            random_text(model, row, 12, adapted=row < n_rows - 1, seed=row) for row in range(n_rows)
        ]
        for _ in range(12):
            read_on(reader, [(text, 1) for text in texts])
        logits = reader.logits(torch.cat([h for text in texts for h in text.hidden]))
        chosen.append(logits.argmax(-1).tolist())
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) > 1


def test_bfloat16_is_as_near_as_the_models_own_pass(tmp_path: Path) -> None:
    exact = tiny_xlora(tmp_path / "64", dtype=torch.float64)
    rounded = tiny_xlora(tmp_path / "16", dtype=torch.bfloat16)
    ids = tiny_prompt(1, 24)
    scalings = torch.rand(1, 24, len(exact.lora_layer_names), 3)
    with torch.no_grad():
        expected = exact.main_pass(scalings=scalings.double(), input_ids=ids).logits[0]
        own = rounded.main_pass(scalings=scalings, input_ids=ids).logits[0]
    reader = LlamaRows(rounded)
    reader.cache.grow(1, 24)
    hidden = [
        reader.read(
            RowBatch(
                token_ids=ids[0, i : i + 1],
                segments=[Segment(row=0, start=i)],
                scalings=scalings[0, i : i + 1],
            )
        )
        for i in range(24)
    ]
    logits = reader.logits(torch.cat(hidden))
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 1.5 * (own - expected).norm()


# ---------------------------------------------------------------- what it does to the model


def test_the_models_own_passes_stay_what_they_were(model: XLoraModel) -> None:
    ids = tiny_prompt()
    scalings = torch.rand(2, 9, len(model.lora_layer_names), 3, dtype=torch.float64)

    def passes() -> list[torch.Tensor]:
        main = model.main_pass(scalings=scalings, input_ids=ids).logits
        return [main, model.scaling_pass(input_ids=ids).router_logits]

    before = passes()
    LlamaRows(model)
    for mine, own in zip(passes(), before, strict=True):
        assert torch.equal(mine, own)


def test_weights_take_no_memory_twice(model: XLoraModel) -> None:
    def n_bytes() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        return sum(storage.nbytes() for storage in storages.values())

    before = n_bytes()
    reader = LlamaRows(model)
    assert n_bytes() == before
    qkv = reader._blocks[0].projections[0].weight
    attention = model.base_model.model.layers[0].self_attn
    for parameter in (attention.v_proj.base_layer.weight, attention.v_proj.lora_A):
        assert parameter.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


def test_a_trained_expert_is_read_as_it_is_now(model: XLoraModel) -> None:
    """Weights are shared, not copied: what changes them in place changes what is read."""
    reader = LlamaRows(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    text = random_text(model, 0, 8, adapted=True)
    read_on(reader, [(text, 8)])
    assert_as_alone(model, reader, text, 1e-10)


def test_a_second_reader_reads_the_same(model: XLoraModel) -> None:
    LlamaRows(model)
    reader = LlamaRows(model)
    text = random_text(model, 0, 8, adapted=True)
    read_on(reader, [(text, 8)])
    assert_as_alone(model, reader, text, 1e-10)


def test_what_is_saved_is_byte_for_byte_the_same(model: XLoraModel, tmp_path: Path) -> None:
    def files(folder: str) -> dict[str, bytes]:
        model.save_pretrained(tmp_path / folder)
        model.base_model.save_pretrained(tmp_path / folder / "base")
        paths = sorted((tmp_path / folder).rglob("*"))
        return {str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in paths if p.is_file()}

    before = files("before")
    LlamaRows(model)
    after = files("after")
    assert before.keys() == after.keys()
    assert any(name.endswith(".safetensors") for name in before)
    assert [name for name in before if before[name] != after[name]] == []


def test_what_it_returns_is_no_part_of_the_cache_or_of_a_graph(model: XLoraModel) -> None:
    """Whoever gets hidden states may change them, and train on them."""
    reader = LlamaRows(model)
    reader.cache.grow(1, 4)
    batch = RowBatch(token_ids=tiny_prompt(1, 4)[0], segments=[Segment(row=0, start=0, n=4)])
    hidden = reader.read(batch)
    logits = reader.logits(hidden)
    hidden.zero_()
    logits.zero_()
    assert not hidden.requires_grad
    assert model.classifier(hidden).requires_grad
    assert reader.logits(reader.read(batch)).abs().max() > 0


# ---------------------------------------------------------------- whose it is


@pytest.mark.parametrize("name", sorted(FITTING))
def test_it_fits_llama_shaped_models(tmp_path: Path, name: str) -> None:
    assert LlamaRows.fits(uneven_xlora(tmp_path, FITTING[name]))


@pytest.mark.parametrize("name", sorted(NOT_FITTING))
def test_it_does_not_fit_models_that_compute_something_else(tmp_path: Path, name: str) -> None:
    model = uneven_xlora(tmp_path, NOT_FITTING[name])
    assert not LlamaRows.fits(model)
    with pytest.raises(ModelError, match="cannot be read by LlamaRows"):
        LlamaRows(model)


def test_it_does_not_fit_routers_in_every_layer(tmp_path: Path) -> None:
    assert not LlamaRows.fits(gated_xlora(tmp_path))


class _Doubling(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _replace_linear(model: XLoraModel) -> None:
    layer = model.base_model.model.layers[0].self_attn.q_proj
    layer.base_layer = _Doubling(32, 32)


def _cast_one_weight(model: XLoraModel) -> None:
    model.base_model.model.layers[1].mlp.up_proj.base_layer.to(torch.float32)


def _offload_one_block(model: XLoraModel) -> None:
    model.base_model.model.layers[1].to("meta")


def _merge(model: XLoraModel) -> None:
    model.merge_and_unload()


def _watch(model: XLoraModel) -> None:
    model.base_model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change", [_replace_linear, _cast_one_weight, _offload_one_block, _merge, _watch]
)
def test_it_does_not_fit_changed_models(
    model: XLoraModel, change: Callable[[XLoraModel], None]
) -> None:
    assert LlamaRows.fits(model)
    change(model)
    assert not LlamaRows.fits(model)


def test_hooks_that_transformers_leaves_behind_do_not_count(model: XLoraModel) -> None:
    model.scaling_pass(input_ids=torch.tensor([[1, 2]]), with_lm_logits=True)
    hooked = model.base_model.model.layers[0]
    assert vars(hooked)["_forward_hooks"], "transformers installs none any more: drop this case"
    assert LlamaRows.fits(model)

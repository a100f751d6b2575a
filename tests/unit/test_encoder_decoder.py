"""Encoder-decoders: every module follows the tokens that it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5EncoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from tests.seq2seq_models import (
    FAMILIES,
    bart,
    one_per_family,
    randomise,
    run_by_hand,
    seq2seq_xlora,
    t5,
    tiny_seq2seq,
    tokens,
    write_seq2seq_experts,
)
from tests.tiny_models import write_lora
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.encoder_decoder import XLoraEncoderOutput
from xlora_core.engine import Engine
from xlora_core.errors import ConfigError, ModelError
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-11, "rtol": 1e-9}
MakeModel = Callable[[str], XLoraModel]
both = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    return one_per_family(tmp_path_factory)


def shifted(family: str, labels: Tensor) -> Tensor:
    start = torch.full_like(labels[:, :1], FAMILIES[family].start)
    return torch.cat([start, labels[:, :-1]], dim=1)


# ---------------------------------------------------------------- against the mixture by hand


@pytest.mark.parametrize("target_length", [3, 6])
@both
def test_loss_logits_and_scalings_are_those_by_hand(
    make: MakeModel, family: str, target_length: int
) -> None:
    """A target as long as the source is no reason to mistake one for the other."""
    model, source, labels = make(family), tokens(2, 6), tokens(2, target_length, seed=1)
    labels[0, -1] = -100
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    expected = run_by_hand(model, family, source, labels, mask=mask)
    output = model(input_ids=source, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss, **NEAR)
    torch.testing.assert_close(output.logits, expected.logits, **NEAR)
    torch.testing.assert_close(model.get_latest_scalings(), expected.target, **NEAR)
    torch.testing.assert_close(model.get_latest_encoder_scalings(), expected.source, **NEAR)
    plain = tiny_seq2seq(family)(input_ids=source, attention_mask=mask, labels=labels)
    assert (output.logits - plain.logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "route", "constant"),
    [
        pytest.param({"layerwise_scalings": False}, lambda s: s, 0.0, id="shared"),
        pytest.param({"global_scaling_weight": -0.5}, lambda s: -0.5 * s, 0.0, id="global weight"),
        pytest.param(
            {"top_k_lora": 1},
            lambda s: s * torch.zeros_like(s).scatter(-1, s.argmax(-1, keepdim=True), 1.0),
            0.0,
            id="top-k",
        ),
        pytest.param({"scaling_pass_value": 0.4}, lambda s: s, 0.4, id="scaling pass value"),
    ],
)
@both
def test_every_option_on_both_sides(
    tmp_path: Path,
    family: str,
    config: dict[str, object],
    route: Callable[[Tensor], Tensor],
    constant: float,
) -> None:
    model = seq2seq_xlora(tmp_path, family, **config)
    source, labels = tokens(2, 5), tokens(2, 4, seed=1)
    expected = run_by_hand(model, family, source, labels, route=route, constant=constant)
    output = model(input_ids=source, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, **NEAR)
    torch.testing.assert_close(output.loss, expected.loss, **NEAR)


@both
def test_knobs_of_one_call_reach_both_sides(make: MakeModel, family: str) -> None:
    model, source, labels = make(family), tokens(2, 5), tokens(2, 4, seed=1)
    knobs = RoutingKnobs(global_weight=0.3)
    expected = run_by_hand(model, family, source, labels, route=lambda s: 0.3 * s)
    output = model(input_ids=source, labels=labels, knobs=knobs)
    torch.testing.assert_close(output.logits, expected.logits, **NEAR)
    source_alone = model.encode(input_ids=source, knobs=knobs).last_hidden_state
    torch.testing.assert_close(output.encoder_last_hidden_state, source_alone, **NEAR)


@both
def test_the_three_ways_to_give_a_target_agree(make: MakeModel, family: str) -> None:
    model, source, labels = make(family), tokens(2, 5), tokens(2, 4, seed=1)
    ids = shifted(family, labels)
    expected = model(input_ids=source, labels=labels).logits
    by_ids = model(input_ids=source, decoder_input_ids=ids).logits
    embeds = model.get_input_embeddings()(ids)
    by_embeds = model(input_ids=source, decoder_inputs_embeds=embeds).logits
    torch.testing.assert_close(by_ids, expected, **NEAR)
    torch.testing.assert_close(by_embeds, expected, **NEAR)


@both
def test_a_source_given_as_embeddings(make: MakeModel, family: str) -> None:
    model, source, labels = make(family), tokens(2, 5), tokens(2, 4, seed=1)
    embeds = model.get_input_embeddings()(source)
    torch.testing.assert_close(
        model(inputs_embeds=embeds, labels=labels).logits,
        model(input_ids=source, labels=labels).logits,
        **NEAR,
    )


def test_bart_makes_the_target_of_the_source_where_there_is_none(make: MakeModel) -> None:
    model, source = make("bart"), tokens(2, 5)
    expected = model(input_ids=source, decoder_input_ids=shifted("bart", source)).logits
    torch.testing.assert_close(model(input_ids=source).logits, expected, **NEAR)


def test_a_model_that_shifts_its_labels_only_in_its_forward(tmp_path: Path) -> None:
    """M2M100 has no ``prepare_decoder_input_ids_from_labels``."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("layers", "ffn_dim", "attention_heads"), 2)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sizes.items()}
    base = M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=97, d_model=32, max_position_embeddings=64, **sides)
    ).double()
    assert not hasattr(base, "prepare_decoder_input_ids_from_labels")
    folder = write_lora(tmp_path, base, ("q_proj", "k_proj", "v_proj"))
    model = randomise(XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)})))
    source, labels = tokens(2, 5), tokens(2, 4, seed=1)
    start = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
    ids = torch.cat([start, labels[:, :-1]], dim=1)
    expected = model(input_ids=source, decoder_input_ids=ids).logits
    scalings = model.get_latest_scalings()
    torch.testing.assert_close(model(input_ids=source, labels=labels).logits, expected, **NEAR)
    torch.testing.assert_close(model.get_latest_scalings(), scalings, **NEAR)


# ---------------------------------------------------------------- laws


@both
def test_no_weight_is_the_base_model(make: MakeModel, family: str) -> None:
    model, inputs = make(family), {"input_ids": tokens(2, 5), "labels": tokens(2, 4, seed=1)}
    expected = tiny_seq2seq(family)(**inputs)
    output = model(**inputs, knobs=RoutingKnobs(global_weight=0.0))
    torch.testing.assert_close(output.logits, expected.logits, **NEAR)
    with model.disable_adapter():
        disabled = model(**inputs)
    torch.testing.assert_close(disabled.logits, expected.logits, **NEAR)
    assert model.get_latest_scalings() is None
    assert model.get_latest_encoder_scalings() is None


@both
def test_uniform_scalings_are_the_merged_model(tmp_path: Path, family: str) -> None:
    model = seq2seq_xlora(tmp_path, family)
    inputs = {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4, seed=1)}
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    routed = model(**inputs).logits
    constant = model.main_pass(
        scalings=torch.full((3,), 1 / 3, dtype=torch.float64), **inputs
    ).logits
    merged = model.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(routed, merged, **NEAR)
    torch.testing.assert_close(constant, merged, **NEAR)
    with pytest.raises(ModelError, match="was merged"):
        model(**inputs)
    with pytest.raises(ModelError, match="was merged"):
        model.encode(input_ids=inputs["input_ids"])


@both
def test_a_batch_is_its_rows_alone(make: MakeModel, family: str) -> None:
    model, source, target = make(family), tokens(3, 6), tokens(3, 4, seed=1)
    together = model(input_ids=source, decoder_input_ids=target).logits
    for row in range(3):
        alone = model(input_ids=source[[row]], decoder_input_ids=target[[row]]).logits
        torch.testing.assert_close(together[[row]], alone, **NEAR)


@both
def test_the_targets_scalings_do_not_depend_on_later_tokens(make: MakeModel, family: str) -> None:
    model, source, target = make(family), tokens(1, 6), tokens(1, 5, seed=1)
    model(input_ids=source, decoder_input_ids=target)
    before = model.get_latest_scalings()
    model(input_ids=source, decoder_input_ids=target[:, :3])
    torch.testing.assert_close(model.get_latest_scalings(), before[:, :3], **NEAR)


# BART counts positions from the first token, pad or not: there it is no law of the base model.
@pytest.mark.parametrize(
    ("family", "padding"), [("bart", "right"), ("t5", "right"), ("t5", "left")]
)
def test_padding_of_source_and_target_changes_nothing(
    make: MakeModel, family: str, padding: str
) -> None:
    model, source, labels = make(family), tokens(1, 4), tokens(1, 3, seed=1)
    alone = model(input_ids=source, labels=labels)
    pad = (2, 0) if padding == "left" else (0, 2)
    padded = model(
        input_ids=torch.nn.functional.pad(source, pad, value=0),
        attention_mask=torch.nn.functional.pad(torch.ones_like(source), pad),
        labels=torch.nn.functional.pad(labels, (0, 2), value=-100),
    )
    torch.testing.assert_close(padded.loss, alone.loss, **NEAR)
    torch.testing.assert_close(padded.logits[:, :3], alone.logits, **NEAR)
    source_rows = slice(2, None) if padding == "left" else slice(0, 4)
    scalings = model.get_latest_encoder_scalings()[:, source_rows]
    model(input_ids=source, labels=labels)
    torch.testing.assert_close(scalings, model.get_latest_encoder_scalings(), **NEAR)


@both
def test_the_scaling_pass_runs_no_head_and_no_expert(make: MakeModel, family: str) -> None:
    model, calls = make(family), []
    head = model.base_model.get_output_embeddings()
    handles = [
        head.register_forward_hook(lambda *_: calls.append("head")),
        model.lora_layers[0].register_forward_hook(lambda *_: calls.append("encoder")),
        model.lora_layers[-1].register_forward_hook(lambda *_: calls.append("decoder")),
    ]
    try:
        model(input_ids=tokens(1, 5), labels=tokens(1, 3))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["encoder", "encoder", "decoder", "decoder", "head"]


# ---------------------------------------------------------------- the log


@both
def test_the_log_follows_the_target_and_a_second_one_the_source(
    tmp_path: Path, family: str
) -> None:
    model = seq2seq_xlora(tmp_path, family)
    model(input_ids=tokens(1, 2), labels=tokens(1, 2))
    model.enable_scalings_logging()
    model(input_ids=tokens(2, 5), labels=tokens(2, 3))
    model(input_ids=tokens(1, 7), labels=tokens(1, 4))
    model.disable_scalings_logging()
    model(input_ids=tokens(1, 2), labels=tokens(1, 3))
    n_layers = len(model.lora_layer_names)
    assert [list(t.shape) for t in model.get_scalings_log()] == [
        [2, 3, n_layers, 3],
        [1, 4, n_layers, 3],
    ]
    assert [list(t.shape) for t in model.get_encoder_scalings_log()] == [
        [2, 5, n_layers, 3],
        [1, 7, n_layers, 3],
    ]
    assert {length: where for length, (where, _) in model.get_bucketed_scalings_log().items()} == {
        3: [0],
        4: [1],
    }
    assert list(model.get_latest_encoder_scalings().shape) == [1, 2, n_layers, 3]
    for entry in (*model.get_scalings_log(), *model.get_encoder_scalings_log()):
        torch.testing.assert_close(entry.sum(-1), torch.ones_like(entry[..., 0]))
        assert not entry.requires_grad
    model.clear_scalings_log()
    assert model.get_scalings_log() == model.get_encoder_scalings_log() == []
    assert model.get_latest_encoder_scalings() is None


# ---------------------------------------------------------------- each pass on its own


@both
def test_the_passes_one_by_one_are_the_forward(make: MakeModel, family: str) -> None:
    model, inputs = make(family), {"input_ids": tokens(2, 5), "labels": tokens(2, 4, seed=1)}
    expected = model(**inputs)
    routed = model.scaling_pass(**inputs)
    scalings = model.route(routed.router_logits)
    of_source = model.route(routed.encoder_router_logits)
    output = model.main_pass(scalings=scalings, encoder_scalings=of_source, **inputs)
    torch.testing.assert_close(output.logits, expected.logits, **NEAR)
    torch.testing.assert_close(output.loss, expected.loss, **NEAR)
    encoded = model.encode(input_ids=inputs["input_ids"])
    assert isinstance(encoded, XLoraEncoderOutput)
    target = {"encoder_outputs": encoded, "labels": inputs["labels"]}
    torch.testing.assert_close(model(**target).logits, expected.logits, **NEAR)
    again = model.scaling_pass(**target, with_lm_logits=True)
    torch.testing.assert_close(again.router_logits, routed.router_logits, **NEAR)
    base_logits = tiny_seq2seq(family)(**inputs).logits[:, -1:]
    torch.testing.assert_close(again.lm_logits, base_logits, **NEAR)
    main = model.main_pass(scalings=scalings, **target)
    torch.testing.assert_close(main.logits, expected.logits, **NEAR)


def test_main_pass_asks_for_the_sources_scalings(make: MakeModel) -> None:
    model, inputs = make("t5"), {"input_ids": tokens(2, 5), "labels": tokens(2, 4)}
    n_layers = len(model.lora_layer_names)
    scalings = torch.rand(2, 4, n_layers, 3, dtype=torch.float64)
    with pytest.raises(ModelError, match="but none for the source's tokens"):
        model.main_pass(scalings=scalings, **inputs)
    with pytest.raises(ModelError, match=r"\[2, 4, .*, 3\], expected \[2, 5, .*, 3\]"):
        model.main_pass(scalings=scalings, encoder_scalings=scalings, **inputs)
    with pytest.raises(ModelError, match=r"\[2, 4, .*, 3\], expected \[2, 3, .*, 3\]"):
        model.main_pass(
            scalings=scalings,
            encoder_scalings=scalings.mean(dim=(0, 1)),
            **inputs | {"labels": tokens(2, 3)},
        )


# ---------------------------------------------------------------- what is refused


def test_a_plain_encoders_output_is_refused(make: MakeModel) -> None:
    model = make("t5")
    hidden = torch.zeros(1, 3, 32, dtype=torch.float64)
    for plain in (BaseModelOutput(last_hidden_state=hidden), (hidden,)):
        with pytest.raises(ModelError, match=r"must be an XLoraEncoderOutput.*\n.*model\.encode"):
            model(encoder_outputs=plain, decoder_input_ids=tokens(1, 2))


def test_a_source_encoded_with_the_adapters_off_serves_no_routed_call(make: MakeModel) -> None:
    model, target = make("t5"), tokens(1, 2)
    routed = model.encode(input_ids=tokens(1, 3))
    with model.disable_adapter():
        plain = model.encode(input_ids=tokens(1, 3))
        with pytest.raises(ModelError, match="switched on, now they are off"):
            model(encoder_outputs=routed, decoder_input_ids=target)
        model(encoder_outputs=plain, decoder_input_ids=target)
    with pytest.raises(ModelError, match="switched off, now they are on"):
        model(encoder_outputs=plain, decoder_input_ids=target)


def test_encoder_and_decoder_of_different_width_are_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**sizes, hidden_size=16, intermediate_size=16),
        BertConfig(**sizes, hidden_size=32, intermediate_size=16),
    )
    base = EncoderDecoderModel(config)
    folder = write_lora(tmp_path, base.decoder, ("query",))
    with pytest.raises(ModelError, match="is 16 wide, its decoder 32"):
        XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))


def test_a_router_per_layer_is_refused(tmp_path: Path) -> None:
    adapters = write_seq2seq_experts(tmp_path, "t5", 1)
    with pytest.raises(ConfigError, match="router is 'per_layer'.*encoder-decoder"):
        XLoraModel.from_base(t5(), XLoraConfig(adapters=adapters, router="per_layer"))


def test_a_decoder_that_cannot_be_tried_out_leaves_its_base_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = bart(), write_seq2seq_experts(tmp_path, "bart", 1)

    def fail(*_: object, **__: object) -> None:
        raise TypeError("no such argument")

    with monkeypatch.context() as patched:
        patched.setattr(base.model, "forward", fail)
        with pytest.raises(ModelError, match="cannot be run on an encoder's output: no such"):
            XLoraModel.from_base(base, XLoraConfig(adapters=adapters))
    XLoraModel.from_base(base, XLoraConfig(adapters=adapters))  # its modules are its own


def test_a_module_that_reads_both_texts_is_refused_when_it_runs(tmp_path: Path) -> None:
    """One projection for self- and cross-attention: no shape tells its tokens apart for sure."""
    base = bart()
    layer = base.model.decoder.layers[0]
    layer.encoder_attn.k_proj = layer.self_attn.k_proj
    folder = write_lora(tmp_path, base, ("k_proj",))
    path = "model.decoder.layers.0.self_attn.k_proj"
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    layer.encoder_attn.k_proj = layer.self_attn.k_proj
    model._sides = None  # as after any change of modules
    with pytest.raises(ModelError, match=f"{path} runs in the decoder.*\n.*target_modules"):
        model(input_ids=tokens(1, 3), labels=tokens(1, 3))


def test_making_a_model_leaves_modes_and_random_numbers_alone(tmp_path: Path) -> None:
    base, adapters = bart().train(), write_seq2seq_experts(tmp_path, "bart", 1)
    config = XLoraConfig(adapters=adapters)
    torch.manual_seed(1)
    model = XLoraModel.from_base(base, config)
    assert all(module.training for module in model.modules())
    labels = tokens(1, 4)
    loss = model(input_ids=tokens(1, 4), labels=labels).loss
    assert loss.requires_grad


def test_the_engine_refuses_it(make: MakeModel) -> None:
    with pytest.raises(ModelError, match=r"is an encoder-decoder.*\n.*model\.generate"):
        Engine(make("t5"), tokenizer=None)


def test_encode_is_for_encoder_decoders(tmp_path: Path) -> None:
    """An encoder of such a model, taken alone, is an encoder like any other."""
    torch.manual_seed(0)
    base = T5EncoderModel(t5().config).double().eval()
    folder = write_lora(tmp_path, base, ("q", "v"))
    model = randomise(XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)})))
    ids = tokens(2, 5)
    assert model(input_ids=ids).last_hidden_state.shape == (2, 5, 32)
    assert model.get_latest_scalings().shape[:2] == (2, 5)
    with pytest.raises(ModelError, match="is no encoder-decoder"):
        model.encode(input_ids=ids)
    with pytest.raises(ModelError, match="T5EncoderModel writes no text"):
        Engine(model, tokenizer=None)


def test_a_classification_head_follows_the_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BartConfig(**bart().config.to_dict() | {"num_labels": 3})
    base = BartForSequenceClassification(config).double().eval()
    folder = write_lora(tmp_path, base, ("q_proj", "k_proj", "v_proj", "dense"))
    model = randomise(XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)})))
    ids = torch.cat([tokens(2, 5), torch.full((2, 1), 2)], dim=1)
    assert model.lora_layer_names[-1] == "classification_head.dense"
    output = model(input_ids=ids, labels=torch.tensor([0, 2]))
    merged = model.merge_and_unload()(input_ids=ids, labels=torch.tensor([0, 2]))
    # One adapter under softmax is that adapter everywhere, whichever tokens it follows.
    torch.testing.assert_close(output.logits, merged.logits, **NEAR)
    torch.testing.assert_close(output.loss, merged.loss, **NEAR)

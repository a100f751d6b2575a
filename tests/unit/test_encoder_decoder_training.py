"""Encoder-decoders: gradients, checkpoints, half precision, and adapters that PEFT wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.gradients import trainable
from tests.seq2seq_models import (
    FAMILIES,
    randomise,
    run_by_hand,
    seq2seq_xlora,
    tiny_seq2seq,
    tokens,
)
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-11, "rtol": 1e-9}
both = pytest.mark.parametrize("family", sorted(FAMILIES))
SOURCE, LABELS = tokens(2, 5), tokens(2, 4, seed=1)


def backward(model: XLoraModel, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of one backward pass through a call per batch."""
    torch.manual_seed(11)  # both runs draw the same dropout
    sum(model(input_ids=source, labels=labels).loss for source, labels in batches).backward()
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return gradients


# ---------------------------------------------------------------- gradients


@both
def test_the_classifiers_gradient_is_the_one_by_hand(tmp_path: Path, family: str) -> None:
    """It comes from both sides: over source tokens and over target tokens."""
    model = seq2seq_xlora(tmp_path, family)
    gradients = backward(model, (SOURCE, LABELS))
    assert set(gradients) == {"classifier.layers.0.weight", "classifier.layers.0.bias"}
    run_by_hand(model, family, SOURCE, LABELS).loss.backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(gradients[name], parameter.grad, **NEAR)
    of_module = gradients["classifier.layers.0.bias"].reshape(-1, 3).abs().sum(-1)
    assert (of_module > 1e-9).all(), "a module's rows got no gradient"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trains_adapters", [True, False])
@both
def test_gradient_checkpointing_changes_no_gradient(
    tmp_path: Path, family: str, trains_adapters: bool, use_reentrant: bool
) -> None:
    model = seq2seq_xlora(tmp_path, family, use_trainable_adapters=trains_adapters).train()
    # The second source is as long as its target: recomputed under the scalings of its own call.
    batches = ((SOURCE, LABELS), (tokens(1, 3, seed=2), tokens(1, 3, seed=3)))
    expected = backward(model, *batches)
    assert all(gradient.abs().max() > 1e-9 for gradient in expected.values())
    assert len(expected) == (2 + 2 * len(model.lora_layers) if trains_adapters else 2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: dict[str, list[bool]] = {"encoder": [], "decoder": []}
    hooked = {"encoder": model.lora_layers[0], "decoder": model.lora_layers[-1]}
    for side, layer in hooked.items():
        layer.register_forward_hook(
            lambda *_, seen=calls[side]: seen.append(torch.is_grad_enabled())
        )
    checkpointed = backward(model, *batches)
    # A scaling pass without a graph, a main pass, and once more inside backward; per batch.
    assert len(calls["encoder"]) == len(calls["decoder"]) == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-10, rtol=1e-8)


@both
def test_transformers_own_seq2seq_trainer_trains_it(tmp_path: Path, family: str) -> None:
    model = seq2seq_xlora(tmp_path / "experts", family, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": SOURCE[0], "labels": LABELS[0]}] * 8
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=5,
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(model(input_ids=SOURCE[:1], labels=LABELS[:1]).loss.item())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss - 0.1
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"classifier.layers.0.weight", "classifier.layers.0.bias"}
    written = model.generate(SOURCE[:1], max_length=5)
    predicted = trainer.predict(rows[:2]).predictions
    assert predicted[:, : written.shape[1]].tolist() == written.tolist() * 2


# ---------------------------------------------------------------- keeping it


@both
def test_a_checkpoint_gives_the_same_model(tmp_path: Path, family: str) -> None:
    model = seq2seq_xlora(
        tmp_path / "experts", family, use_trainable_adapters=True, top_k_lora=2, dtype=torch.float32
    )
    with torch.no_grad():
        for layer in model.lora_layers:
            layer.lora_B.mul_(1.5)  # as training would
    model.save_pretrained(tmp_path / "saved")
    base = tiny_seq2seq(family, dtype=torch.float32)
    loaded = XLoraModel.from_pretrained(base, tmp_path / "saved").eval()
    assert loaded.lora_layer_names == model.lora_layer_names
    expected = model(input_ids=SOURCE, labels=LABELS).logits
    assert torch.equal(loaded(input_ids=SOURCE, labels=LABELS).logits, expected)


# ---------------------------------------------------------------- T5 in half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wo_stays_in_float32_under_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """T5's last feed-forward projection overflows in half precision, so it is kept wider."""
    exact = seq2seq_xlora(tmp_path / "a", "t5", dtype=torch.float32)
    base = tiny_seq2seq("t5", dtype=dtype)
    for name, module in base.named_modules():
        if name.endswith(".wo"):
            module.float()
    model = randomise(XLoraModel.from_base(base, exact.config_xlora))
    for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True):
        kept = torch.float32 if path.endswith(".wo") else dtype
        assert layer.weight.dtype == layer.lora_A.dtype == kept
    output = model(input_ids=SOURCE, labels=LABELS)
    assert output.logits.dtype == dtype
    expected = exact(input_ids=SOURCE, labels=LABELS)
    near = {torch.float16: 0.02, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=near, rtol=near)
    torch.testing.assert_close(
        model.get_latest_encoder_scalings(), exact.get_latest_encoder_scalings(), atol=near, rtol=0
    )


# ---------------------------------------------------------------- adapters that PEFT wrote

# target_modules, and some of the modules that they name
PEFTS_TARGETS = {
    "t5": (
        ["q", "v", "wi", "wo", "embed_tokens", "lm_head"],
        {
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.1.layer.1.EncDecAttention.v",
            "decoder.block.0.layer.2.DenseReluDense.wo",
            "decoder.embed_tokens",
            "lm_head",
        },
    ),
    "bart": (
        ["q_proj", "k_proj", "v_proj", "fc1", "lm_head"],
        {
            "model.encoder.layers.0.self_attn.q_proj",
            "model.decoder.layers.1.encoder_attn.k_proj",
            "lm_head",
        },
    ),
}


@both
def test_one_adapter_of_pefts_is_pefts_own_model(tmp_path: Path, family: str) -> None:
    """Under softmax one adapter has weight 1 on both sides: plain LoRA."""
    targets, some_paths = PEFTS_TARGETS[family]
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, lora_alpha=8, target_modules=targets)
    torch.manual_seed(3)
    peft = get_peft_model(tiny_seq2seq(family), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    peft.save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(tiny_seq2seq(family), tmp_path).eval()
    model = XLoraModel.from_base(tiny_seq2seq(family), XLoraConfig(adapters={"one": str(tmp_path)}))
    assert some_paths <= set(model.lora_layer_names)
    ours = randomise(model)(input_ids=SOURCE, labels=LABELS)
    theirs = expected(input_ids=SOURCE, labels=LABELS)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)
    torch.testing.assert_close(ours.loss, theirs.loss, **NEAR)
    plain = tiny_seq2seq(family)(input_ids=SOURCE, labels=LABELS)
    assert (ours.logits - plain.logits).abs().max() > 0.1
    settings = {"max_new_tokens": 6, "num_beams": 2}
    written = expected.generate(input_ids=SOURCE, **settings)
    assert torch.equal(model.generate(SOURCE, **settings), written)

"""Training routers on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from tests.tiny_models import tiny_base, tiny_xlora, write_experts, write_lora
from tests.training_models import (
    PAD,
    ROUTER,
    examples,
    letter_tokenizer,
    row,
    weights_of,
)
from xlora_core.config import RouterTrainConfig, XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import collate
from xlora_core.training.router import (
    RouterTrainer,
    fresh_model,
    routed_call,
    router_examples,
    train_router,
)

ROUTERS = ["classifier", "per_layer"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_experts(tmp_path_factory.mktemp("experts"))


def routers_of(model: XLoraModel) -> set[str]:
    name = "gates" if model.is_routed_per_layer else "classifier"
    names = {f"{name}.{n}" for n, _ in model.router.named_parameters()}
    assert len(names) == (2 * len(model.lora_layers) if model.is_routed_per_layer else 2)
    return names


def trainer_of(model: XLoraModel, folder: Path, settings: RouterTrainConfig) -> RouterTrainer:
    mixed = [*examples(8, "0"), *examples(8, "1")]
    return RouterTrainer(model, PAD, mixed, examples(4), folder, settings)


def gradients(
    model: XLoraModel, folder: Path, settings: RouterTrainConfig
) -> dict[str, torch.Tensor]:
    """The gradients of the first step, by the trainer's own passes; dropout draws the same."""
    trainer = trainer_of(model, folder, settings)
    batches, _ = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), settings.accumulation, torch.device("cpu")
    )
    model.zero_grad()
    torch.manual_seed(3)
    for batch in batches:
        trainer.training_step(model, batch)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_fresh_model_is_the_uniform_merge(adapters: dict[str, str]) -> None:
    model = fresh_model(tiny_base(), adapters, ROUTER)
    logits = model.scaling_pass(input_ids=torch.tensor([[5, 6, 7]])).router_logits
    torch.testing.assert_close(model.route(logits), torch.full_like(logits, 1 / 3))


def test_the_loss_of_a_pass_is_the_models_own(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    trainer = RouterTrainer(model, PAD, examples(), [], tmp_path, ROUTER)
    batch = collate(examples(3), PAD)
    answers = trainer.answer_pass(trainer.collated(examples(3)))
    expected = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    torch.testing.assert_close(answers.losses.mean(), expected, rtol=1e-5, atol=1e-5)
    assert answers.domains.tolist() == [0] * len(answers.losses)
    # The scalings are those of the token before each answer token.
    latest = model.get_latest_scalings()
    assert latest is not None
    writers = (batch.labels[:, 1:] != -100).nonzero()
    by_hand = torch.stack([latest[b, t] for b, t in writers.tolist()])
    torch.testing.assert_close(answers.scalings, by_hand)


@pytest.mark.parametrize("router", ["classifier", "per_layer"])
def test_a_routed_call_gives_the_router_logits_of_that_call(tmp_path: Path, router: str) -> None:
    model = fresh_model(tiny_base(), write_experts(tmp_path), replace(ROUTER, router=router))
    for parameter in model.router.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    logits, router_logits = routed_call(model, input_ids=ids, use_cache=False)
    assert torch.equal(logits, model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(router_logits, model.read_router(input_ids=ids))
    router_logits.sum().backward()
    assert all(p.grad is not None for p in model.router.parameters())


def test_training_lowers_the_loss_and_changes_the_classifier_only(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    lowers_the_loss_and_changes_the_router_only(adapters, tmp_path, ROUTER)


def test_training_lowers_the_loss_and_changes_the_gates_only(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    settings = replace(ROUTER, router="per_layer")
    lowers_the_loss_and_changes_the_router_only(adapters, tmp_path, settings)


def lowers_the_loss_and_changes_the_router_only(
    adapters: dict[str, str], tmp_path: Path, settings: RouterTrainConfig
) -> None:
    model = fresh_model(tiny_base(), adapters, settings)
    model.base_model.config.use_cache = True
    before = weights_of(model)
    log = train_router(model, PAD, examples(), examples(4), tmp_path / "out", settings)
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    assert [step for step, _ in log.heldout_loss] == [0, 3, 6]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == routers_of(model)
    assert not model.training
    assert model.base_model.config.use_cache  # the trainer would switch it off for good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["train_loss"] == log.train_loss
    assert written["settings"]["steps"] == 6
    assert log.seconds > 0
    figures = log.heldout_routing[-1][1]
    assert set(figures) == {"entropy", "mass:0", "mass:1", "mass:2", "right_mass", "right_top"}
    assert sum(figures[f"mass:{k}"] for k in range(3)) == pytest.approx(1, abs=1e-3)
    assert figures["entropy"] < log.heldout_routing[0][1]["entropy"] == 1


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("train_adapters", [False, True])
def test_what_was_trained_is_read_back(
    adapters: dict[str, str], tmp_path: Path, train_adapters: bool, router: str
) -> None:
    settings = replace(ROUTER, train_adapters=train_adapters, router=router)
    model = fresh_model(tiny_base(), adapters, settings)
    before = weights_of(model)
    train_router(model, PAD, examples(), [], tmp_path / "out", settings)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    experts = {n for n in before if n.endswith((".lora_A", ".lora_B"))}
    assert changed == routers_of(model) | (experts if train_adapters else set())
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("label_loss", [0.0, 0.5])
def test_accumulation_of_two_times_four_rows_is_one_pass_of_eight(
    tmp_path: Path, balanced: bool, label_loss: float
) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64, use_trainable_adapters=True)
    settings = replace(ROUTER, rows=8, balanced=balanced, label_loss=label_loss)
    whole = gradients(model, tmp_path / "a", settings)
    halves = gradients(model, tmp_path / "b", replace(settings, rows=4, accumulation=2))
    assert len(whole) == 2 + 2 * len(model.lora_layers)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-8
        torch.testing.assert_close(halves[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("train_adapters", [False, True])
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_trains_to_the_same_weights(
    adapters: dict[str, str], tmp_path: Path, mode: str, train_adapters: bool, router: str
) -> None:
    shape = replace(ROUTER, depth=2, size=8, steps=3, learning_rate=1e-2, router=router)
    settings = replace(shape, train_adapters=train_adapters)
    trained = []
    for name in ("off", mode):
        torch.manual_seed(0)
        model = fresh_model(tiny_base(dtype=torch.float64), adapters, settings)
        before = weights_of(model)
        calls: list[bool] = []
        model.lora_layers[0].register_forward_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        train_router(
            model,
            PAD,
            examples(),
            [],
            tmp_path / name,
            replace(settings, gradient_checkpointing=name),
        )
        assert not model.base_model.is_activation_checkpointing
        # Scaling pass, main pass; and once more inside backward if it recomputes.
        passes = (1 if router == "per_layer" else 2) + (name != "off")
        assert len(calls) == settings.steps * passes
        trained.append(weights_of(model))
    moved = {n for n in before if not torch.equal(trained[0][n], before[n])}
    assert moved >= {
        f"{'gates' if router == 'per_layer' else 'classifier'}.{n}"
        for n, _ in model.router.named_parameters()
    }
    for weight in moved:
        torch.testing.assert_close(trained[1][weight], trained[0][weight], rtol=1e-7, atol=1e-9)


def test_autocast_leaves_router_and_trained_weights_in_float32(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    settings = replace(ROUTER, autocast=True, train_adapters=True, learning_rate=1e-2)
    model = fresh_model(tiny_base(), adapters, settings)
    seen: set[torch.dtype] = set()
    model.classifier.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    inside: set[torch.dtype] = set()
    hidden = cast("Any", model.lora_layers[0]).base_layer
    hidden.register_forward_hook(lambda *call: inside.add(call[-1].dtype))
    log = train_router(model, PAD, examples(), examples(4), tmp_path / "out", settings)
    assert seen == {torch.float32}
    assert inside == {torch.bfloat16}
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    # Not patched: what it computes afterwards is float32 again.
    assert model(input_ids=torch.tensor([[5]])).logits.dtype == torch.float32


def test_a_bfloat16_base_trains_a_float32_router(adapters: dict[str, str], tmp_path: Path) -> None:
    settings = replace(ROUTER, autocast=True, dtype="bfloat16", learning_rate=1e-2)
    model = fresh_model(tiny_base(dtype=torch.bfloat16), adapters, settings)
    log = train_router(model, PAD, examples(), examples(4), tmp_path / "out", settings)
    assert {p.dtype for p in model.classifier.parameters()} == {torch.float32}
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01


def test_the_balance_loss_evens_out_a_router(adapters: dict[str, str], tmp_path: Path) -> None:
    def evenness(weight: float) -> float:
        settings = replace(ROUTER, balance_loss=weight, steps=20, learning_rate=0.05, eval_every=20)
        model = fresh_model(tiny_base(), adapters, settings)
        with torch.no_grad():
            cast("Any", model.classifier.layers[-1]).bias.view(-1, 3)[:, 0] = 2.0
        log = train_router(model, PAD, examples(), examples(4), tmp_path / str(weight), settings)
        if weight:
            values = [value["balance"] for _, value in log.auxiliary_losses]
            assert values[-1] < values[0] / 2
        return log.heldout_routing[-1][1]["entropy"]

    assert evenness(10.0) > evenness(0.0) + 0.02


@pytest.mark.parametrize("router", ROUTERS)
def test_the_label_loss_teaches_which_expert_is_meant(
    adapters: dict[str, str], tmp_path: Path, router: str
) -> None:
    long = replace(ROUTER, steps=20, learning_rate=0.05, eval_every=20)
    settings = replace(long, label_loss=5.0, router=router)
    model = fresh_model(tiny_base(), adapters, settings)
    log = train_router(model, PAD, examples(domain="2"), examples(4, "2"), tmp_path / "a", settings)
    assert log.heldout_routing[-1][1]["right_top"] > 0.95
    assert len(log.auxiliary_losses) == 20
    # It may be on for the first steps only.
    model = fresh_model(tiny_base(), adapters, settings)
    short = replace(settings, label_steps=3)
    log = train_router(model, PAD, examples(domain="2"), [], tmp_path / "b", short)
    assert [step for step, _ in log.auxiliary_losses] == [1, 2, 3]


def test_auxiliary_losses_need_scalings_that_sum_to_one(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    config = XLoraConfig(adapters=adapters, enable_softmax=False)
    model = XLoraModel.from_base(tiny_base(), config)
    with pytest.raises(ConfigError, match="need scalings that sum to 1"):
        train_router(model, PAD, examples(), [], tmp_path, replace(ROUTER, label_loss=1.0))


def test_auxiliary_losses_of_gates_need_a_gradient(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    settings = replace(
        ROUTER, router="per_layer", label_loss=1.0, gradient_checkpointing="reentrant"
    )
    model = fresh_model(tiny_base(), adapters, settings)
    with pytest.raises(ConfigError, match="must be off or non-reentrant"):
        train_router(model, PAD, examples(), [], tmp_path, settings)


def encoder_decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [tiny_base, encoder_decoder])
def test_a_plain_trainer_trains_a_router_too(
    tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    base = make()
    targets = ("q_proj", "v_proj", "q", "v")
    adapters = {n: str(write_lora(tmp_path / n, base, targets, seed=i)) for i, n in enumerate("ab")}
    model = XLoraModel.from_base(base, XLoraConfig(adapters=adapters, layerwise_scalings=True))
    before = weights_of(model)
    row = {"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 8)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == routers_of(
        model
    )


def test_routers_of_encoder_decoders_are_left_to_it(tmp_path: Path) -> None:
    base = encoder_decoder()
    adapters = {"a": str(write_lora(tmp_path / "a", base, ("q", "v")))}
    model = XLoraModel.from_base(base, XLoraConfig(adapters=adapters))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder") as e:
        train_router(model, PAD, examples(), [], tmp_path / "out", ROUTER)
    assert "transformers.Trainer itself" in e.value.hint


def test_the_mixture_has_as_many_rows_of_each_domain() -> None:
    rows = {
        "a": [row(f"{i}", "x", "a") for i in range(40)],
        "b": [row(f"{i}", "y", "b") for i in range(40)],
    }
    settings = replace(ROUTER, steps=5, accumulation=2, mixed_share=0.25)
    kinds = [
        frozenset(e.domains) - {""} for e in router_examples(rows, letter_tokenizer(), settings)
    ]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {frozenset("a"): 15, frozenset("b"): 15, frozenset("ab"): 10}
    more = router_examples(rows, letter_tokenizer(), replace(settings, label_start_rows=60))
    assert len(more) == 15 + 2 * 23  # a quarter mixed, the rest shared out and rounded up
    fewer = router_examples(rows, letter_tokenizer(), replace(settings, label_start_rows=20))
    assert len(fewer) == 40

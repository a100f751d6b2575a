"""Several threads, one model: each gets its own results. Barriers force the worst interleaving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import tiny_prompt, tiny_xlora
from xlora_core.config import RoutingKnobs
from xlora_core.model import XLoraModel

KNOBS = (
    RoutingKnobs(top_k=1, temperature=0.5),
    RoutingKnobs(temperature=2.0, global_weight=-1.0),
)
PROMPTS = (tiny_prompt(batch=2, length=9), tiny_prompt(batch=2, length=9, seed=1))


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64, scaling_pass_value=0.25)


@contextmanager
def in_step(*modules: nn.Module, threads: int = 2) -> Iterator[None]:
    """Makes the threads wait for each other at every call of the modules.

    Both are inside the same pass then, each holding its own scalings. A thread that fails
    breaks the barrier, so the other does not wait for ever.
    """
    barrier = threading.Barrier(threads, timeout=60)

    def wait(*_: object) -> None:
        barrier.wait()

    hooks = [module.register_forward_pre_hook(wait) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def at_once(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(call) for call in calls]]


def generate(model: XLoraModel, which: int) -> Tensor:
    tokens: Tensor = model.generate(
        input_ids=PROMPTS[which],
        attention_mask=torch.ones_like(PROMPTS[which]),
        knobs=KNOBS[which],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    return tokens


def test_generations_with_different_knobs_at_once(model: XLoraModel) -> None:
    alone = [generate(model, 0), generate(model, 1)]
    swapped = model.generate(
        input_ids=PROMPTS[0],
        attention_mask=torch.ones_like(PROMPTS[0]),
        knobs=KNOBS[1],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    assert not torch.equal(alone[0], swapped), "the knobs make no difference here"
    # Every adapted module and the classifier is a meeting point.
    with in_step(model.classifier, *model.lora_layers):
        together = at_once(lambda: generate(model, 0), lambda: generate(model, 1))
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_forward_calls_of_different_shapes_at_once(model: XLoraModel) -> None:
    """In PEFT 59 of 60 such calls raised; equal shapes would have mixed silently."""
    prompts = [tiny_prompt(batch=b, length=t) for b, t in ((1, 3), (2, 5), (3, 8), (1, 9))]

    def forward(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids).logits
            return logits

    alone = [forward(ids) for ids in prompts]
    with in_step(model.classifier, model.lora_layers[0], model.lora_layers[-1], threads=4):
        together = at_once(*(lambda ids=ids: forward(ids) for ids in prompts))
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine, expected)


def test_routed_merged_and_base_passes_at_once(model: XLoraModel) -> None:
    """As the arms of a comparison run: one thread's constant must not reach another's."""
    ids = PROMPTS[0]
    mixtures = (None, torch.ones(3).double() / 3, torch.tensor([0.0, 1.0, 0.0]).double())

    def main_pass(scalings: Tensor | None) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model.main_pass(input_ids=ids, scalings=scalings).logits
            return logits

    alone = [main_pass(mixture) for mixture in mixtures]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    with in_step(*model.lora_layers, threads=3):
        together = at_once(*(lambda m=mixture: main_pass(m) for mixture in mixtures))
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine, expected)


def test_one_thread_trains_while_another_generates(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64)
    ids = PROMPTS[0]

    def gradient() -> Tensor:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        weight = model.classifier.layers[0].weight
        assert weight.grad is not None
        grad = weight.grad.clone()
        weight.grad = None
        return grad

    alone = gradient(), generate(model, 1)
    together = at_once(gradient, lambda: generate(model, 1))
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_the_log_may_be_read_while_others_write_it(model: XLoraModel) -> None:
    model.enable_scalings_logging()
    done = threading.Event()
    lengths: list[int] = []

    def write() -> None:
        try:
            for _ in range(3):
                generate(model, 0)
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            lengths.append(len(model.get_scalings_log()))
            model.get_bucketed_scalings_log()

    at_once(write, read)
    assert lengths == sorted(lengths)
    log = model.get_scalings_log()
    assert [t.shape[1] for t in log] == list(range(9, 17)) * 3
